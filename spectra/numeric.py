"""What counts as a number where a caller gives one, be it Python's own or numpy's; truth values never do."""

from __future__ import annotations

from math import isfinite
from numbers import Integral, Real
from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number.

    >>> is_whole(2), is_whole(2.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def is_share(value: object) -> TypeGuard[float]:
    """Whether a value is a number from 0 to 1, as cosines and shares are."""
    return is_number(value) and 0 <= value <= 1

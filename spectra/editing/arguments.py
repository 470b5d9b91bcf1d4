"""Numbers that a caller gave for an edit: what is none is refused before anything is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spectra.errors import SpectraError
from spectra.numeric import is_number, is_whole


def number(value: Any, name: str, example: str = "0.5") -> float:
    """A finite number as Python's own. Raises SpectraError for text, NaN and the like."""
    if not is_number(value):
        raise SpectraError(f"{name} is {value!r}; give a number such as {example}")
    return float(value)


def whole(value: Any, name: str) -> int:
    """A whole number as Python's own. Raises SpectraError for 2.5, 2.0, "2" and the like."""
    if not is_whole(value):
        raise SpectraError(f"{name} is {value!r}; give a whole number")
    return int(value)


def wholes(values: Any, name: str) -> tuple[int, ...]:
    """Some whole numbers. Raises SpectraError where there is none: a list that came out empty is not "all"."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise SpectraError(f"{name} is {values!r}; give a list of whole numbers, such as [0, 3]")
    found = tuple(whole(value, f"one of {name}") for value in values)
    if not found:
        raise SpectraError(f"{name} is empty, and so names nothing to edit; give at least one, or leave it out for all")
    return found

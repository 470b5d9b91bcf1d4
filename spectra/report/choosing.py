"""What a user calls a matrix, a quantity or a model, found among what there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from spectra.errors import SpectraError
from spectra.report.wording import listed, printable


def known(name: str, names: Sequence[str], what: str) -> None:
    """Raises `SpectraError` with the closest of `names` where `name` is none of them; `what` says what it should be."""
    if name in names:
        return
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or list(names)[:3]
    shown = ", ".join(repr(each) for each in close) or "none: it is empty"
    raise SpectraError(f"{name!r} is not {what}; the closest are {shown}")


def full_name(name: str, names: Sequence[str], what: str) -> str:
    """The one of `names` that is `name`, or that ends in it after a dot, `.weight` aside.

    Raises: `SpectraError` where there is none, or where several end so.

    >>> full_name("0.query", ["bert.0.query.weight", "bert.10.query.weight"], "a matrix")
    'bert.0.query.weight'
    """
    ending = f".{_bare(name)}"
    found = [name] if name in names else [each for each in names if f".{_bare(each)}".endswith(ending)]
    if len(found) > 1:
        raise SpectraError(
            f"{printable(name)!r} is the end of {len(found)} names ({listed(found)}): give more of the one you mean"
        )
    if not found:
        known(name, names, what)
    return found[0]


def _bare(name: str) -> str:
    """A name without `.weight`, which may stand before a `[part]`."""
    return re.sub(r"\.weight(?=\[|$)", "", name)

"""The definitions of all columns, read from the document that holds them."""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib.resources import files

from spectra.errors import SpectraError

ENTRY = re.compile(r"^- `(?P<name>\w+)`: (?P<text>.*(?:\n  .*)*)", re.MULTILINE)


@cache
def document() -> str:
    """The whole of `definitions.md`."""
    return files("spectra").joinpath("definitions.md").read_text(encoding="utf-8")


@cache
def definitions() -> dict[str, str]:
    """Column name -> its definition, on one line."""
    return {entry["name"]: " ".join(entry["text"].split()) for entry in ENTRY.finditer(document())}


def define(column: str) -> str:
    """The definition of one column. Raises SpectraError, with near names, where there is none.

    >>> define("update_norm")
    '||D||_F.'
    """
    known = definitions()
    if column not in known:
        near = difflib.get_close_matches(column, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`spectra define` lists all"
        raise SpectraError(f"no column is called {column!r}; {hint}")
    return known[column]

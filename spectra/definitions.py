"""The definitions of all columns, read from the document that holds them."""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib.resources import files

from spectra.errors import SpectraError

ENTRY = re.compile(r"^- `(?P<name>\w+)`: (?P<text>.*(?:\n  .*)*)", re.MULTILINE)
SECTION = re.compile(r"^## (?P<title>.*)\n", re.MULTILINE)


@cache
def document() -> str:
    """The whole of `definitions.md`."""
    return files("spectra").joinpath("definitions.md").read_text(encoding="utf-8")


@cache
def definitions() -> dict[str, str]:
    """Column name -> its definition, on one line; where tables differ in a name, each with the section it is from."""
    found: dict[str, dict[str, str]] = {}
    _, *sections = SECTION.split(document())  # title, text, title, text, ...
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        for entry in ENTRY.finditer(text):
            found.setdefault(entry["name"], {})[title] = " ".join(entry["text"].split())
    return {
        name: next(iter(texts.values()))
        if len(texts) == 1
        else " ".join(f"{title}: {text}" for title, text in texts.items())
        for name, texts in found.items()
    }


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

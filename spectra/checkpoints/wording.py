"""How names out of a file are written in messages: never raw, since a file may hold terminal escapes as names."""

from __future__ import annotations

import os
from collections.abc import Iterable

LONGEST_NAME = 120


def quoted(name: object) -> str:
    """A name in quotes, control characters escaped, shortened in the middle where it is very long.

    >>> quoted("a\\x1b[31m")
    "'a\\\\x1b[31m'"
    """
    text = repr(str(name))
    # repr leaves lone surrogates escaped already; only the length is left to tame.
    if len(text) > LONGEST_NAME:
        half = LONGEST_NAME // 2
        text = f"{text[:half]}...{text[-half:]}"
    return text


def listed(names: Iterable[object], most: int = 5) -> str:
    """Quoted names separated by commas, the first `most` of them.

    >>> listed(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    every = list(names)
    text = ", ".join(quoted(name) for name in every[:most])
    return text if len(every) <= most else f"{text} and {len(every) - most} more"


def shown(path: str | os.PathLike[str]) -> str:
    """A path as the user wrote it, or escaped where it would garble a terminal."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)

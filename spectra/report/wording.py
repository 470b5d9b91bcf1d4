"""How numbers and untrusted names are written, the same in every table, sentence, picture and page."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from numbers import Integral

ELLIPSIS = "..."


def printable(name: str) -> str:
    r"""`name` with every character that a terminal could obey, or that a reader cannot see, written as an escape.

    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in name
    )


def shorten(name: str, width: int) -> str:
    """`name`, made printable, in at most `width` characters: without `.weight`, then with its middle left out.

    The first word, the block number and the last words stay as long as there is room: they tell tensors apart.

    >>> shorten("bert.encoder.layer.11.attention.self.query.weight", 36)
    'bert...layer.11.attention.self.query'
    >>> shorten("bert.encoder.layer.11.attention.self.query.weight", 24)
    'bert...11...self.query'
    """
    text = printable(name)
    if len(text) <= width:
        return text
    text = re.sub(r"\.weight(?=\[|$)", "", text)
    words = text.split(".")
    block = next((at for at, word in enumerate(words) if word.isdigit()), 0)
    for start in range(1, len(words)):
        number = f"{words[block]}{ELLIPSIS}" if 0 < block < start else ""
        candidate = f"{words[0]}{ELLIPSIS}{number}{'.'.join(words[start:])}" if start > 1 else text
        if len(candidate) <= width:
            return candidate
    if width <= len(ELLIPSIS) + 2:
        return text[: max(width, 1)]
    tail = (width - len(ELLIPSIS)) * 2 // 3
    return text if len(text) <= width else text[: width - len(ELLIPSIS) - tail] + ELLIPSIS + text[-tail:]


def number(value: float | None, digits: int = 3) -> str:
    """`value` in `digits` significant digits, without an exponent where a reader can do without; "-" for NaN.

    A measure that happens to be whole keeps its digits, so that it can stand beside others; a count (an int) has none.

    >>> number(0.0921), number(1234.5), number(2.5e-7), number(float("nan"))
    ('0.0921', '1230', '2.5e-07', '-')
    >>> number(1.0), number(1)
    ('1.00', '1')
    """
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value) or value == 0:
        return f"{value:g}"
    if isinstance(value, Integral):
        return f"{value}"
    rounded = float(f"{value:.{digits}g}")
    if 1e-4 <= abs(rounded) < 1e6:
        return f"{rounded:.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"
    return f"{value:.{digits}g}"


def count(value: float) -> float | int:
    """The median of counts: a count where it is one, not where it lies between two.

    >>> count(12.0), count(12.5)
    (12, 12.5)
    """
    return int(value) if math.isfinite(value) and value == int(value) else value


def percent(share: float | None) -> str:
    """A share as a percentage of two significant digits, three above 10%.

    >>> percent(0.00512), percent(0.984), percent(0.05), percent(1e-6)
    ('0.51%', '98.4%', '5.0%', 'under 0.01%')
    """
    if share is None or math.isnan(share):
        return "-"
    if 0 < share < 1e-4:
        return "under 0.01%"
    return f"{number(100 * share, 3 if abs(share) >= 0.1 else 2)}%"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun.

    >>> counted(1, "matrix", "matrices"), counted(3, "intruder")
    ('1 matrix', '3 intruders')
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def matrices(count: int) -> str:
    """A count of matrices in words."""
    return counted(count, "matrix", "matrices")


def listed(names: list[str], most: int = 3, width: int = 60) -> str:
    """The first `most` names in a sentence, and how many more there are.

    >>> listed(["a", "b", "c", "d"], most=2)
    'a, b and 2 more'
    """
    shown = [shorten(name, width) for name in names[:most]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def pattern(reason: str) -> str:
    """A reason with its numbers and quoted names blanked, so that reasons of one kind can be counted together."""
    return re.sub(r"\d+", "#", re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`", "'#'", reason))


def in_full(reasons: Iterable[Iterable[str]]) -> list[str]:
    """Of how many matrices a full SVD gave the leading directions, a sentence a reason.

    Args: reasons: of every matrix, why it was taken; "" where it was not.

    >>> in_full([["squaring would spoil them"], [""]])
    ["the leading directions of 1 matrix are from a full SVD of W', since squaring would spoil them"]
    """
    counts = Counter(why for of_one in reasons for why in dict.fromkeys(of_one) if why)
    return [
        f"the leading directions of {matrices(count)} are from a full SVD of W', since {why}"
        for why, count in counts.items()
    ]

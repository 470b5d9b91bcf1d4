"""Sentences on a sequence: how each measure went from its first model to its last."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from spectra.report.evidence import Finding, Numbers
from spectra.report.sequence_table import sequence_table
from spectra.report.wording import matrices, number, percent, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

    from spectra.comparison import Comparison


ANGLE = 0.3  # radians, up to which first-order angles are angles


def over_the_sequence(result: Comparison) -> list[Finding]:
    """What happened from model to model, a sentence a measure; none where no two models have it."""
    table = sequence_table(result)
    found = [sentence(table) for sentence in (_size, _intruders, _energy, _rotation, _overlap, _rank, _scores)]
    return [finding for finding in found if finding is not None]


def _size(table: pd.DataFrame) -> Finding | None:
    course = _course(table, "relative_update")
    if course is None:
        return None
    words, numbers = course
    text = f"In units of the base's norm the update {words}, over the same {matrices(int(table['matrices'].iloc[-1]))}"
    known = table.dropna(subset=["relative_update"])
    half = known[known["relative_update"] >= known["relative_update"].iloc[-1] / 2].iloc[0]
    if half["tuned"] not in (known["tuned"].iloc[0], known["tuned"].iloc[-1]):
        numbers["half"] = half["relative_update"]
        text += f"; it passes half of its last size by {printable(half['tuned'])} ({number(half['relative_update'])})"
    return _finding(table, f"{text}.", numbers | {"matrices": int(table["matrices"].iloc[-1])})


def _intruders(table: pd.DataFrame) -> Finding | None:
    course = _course(table, "intruders")
    if course is None:
        return None
    words, numbers = course
    text = f"Intruders {words}"
    if numbers["last"]:
        where = int(table["matrices_with_intruders"].iloc[-1])
        numbers["matrices_with_intruders"] = where
        text += f"; the last ones are in {matrices(where)}"
        spread = int(table["spread_intruders"].fillna(0).iloc[-1])
        if spread:
            numbers["spread_intruders"] = spread
            text += f", and {spread} of them only spread over clusters of base directions"
    return _finding(table, f"{text}.", numbers)


def _energy(table: pd.DataFrame) -> Finding | None:
    course = _course(table, "off_diagonal_share", percent)
    enrichment = _course(table, "diagonal_enrichment")
    if course is None or enrichment is None:
        return None
    first, last = (float(enrichment[1][end]) for end in ("first", "last"))
    text = f"The share of the update's energy that turns directions {course[0]}; singular values hold "
    text += f"{number(first, 2)} times what chance would give them at first and {number(last, 2)} at last."
    return _finding(table, text, course[1] | {"enrichment_first": first, "enrichment_last": last})


def _rotation(table: pd.DataFrame) -> Finding | None:
    course = _course(table, "rotation")
    if course is None:
        return None
    text = f"The median component's first-order angle (radians) {course[0]}"
    text += (
        f"; above {ANGLE} it is no angle any more, and large where singular values crowd."
        if float(course[1]["last"]) > ANGLE
        else "."
    )
    return _finding(table, text, course[1])


def _overlap(table: pd.DataFrame) -> Finding | None:
    course = _course(table, "left_overlap")
    if course is None:
        return None
    null = float(table["overlap_null"].median())
    text = f"The overlap of the leading output directions with the base's {course[0]} (chance: {number(null)})."
    return _finding(table, text, course[1] | {"overlap_null": null})


def _rank(table: pd.DataFrame) -> Finding | None:
    course = _course(table, "effective_rank")
    return None if course is None else _finding(table, f"The effective rank of the update {course[0]}.", course[1])


def _scores(table: pd.DataFrame) -> Finding | None:
    courses = {name: _course(table, name) for name in ("score", "forgetting")}
    parts, numbers = [], Numbers()
    for name, course in courses.items():
        if course is not None:
            parts.append(f"{'The score on the new task' if name == 'score' else 'forgetting'} {course[0]}")
            numbers |= {f"{name}_{key}": value for key, value in course[1].items()}
    if not parts:
        return None
    text = "; ".join(parts)
    return _finding(table, f"{text[:1].upper()}{text[1:]}.", numbers)


def _course(
    table: pd.DataFrame, name: str, write: Callable[[float], str] = number
) -> tuple[str, Numbers] | None:  # fmt: skip
    """How a column went, in words that follow its name, with their numbers; None where fewer than two are known."""
    rows = table[["tuned", name]].dropna()
    if len(rows) < 2:
        return None
    values = [value.item() if hasattr(value, "item") else value for value in rows[name]]
    labels = [printable(label) for label in rows["tuned"]]
    first, last = values[0], values[-1]
    numbers: Numbers = {"first": first, "last": last}
    verbs = ("rise", "fall", "stay", "go") if name == "intruders" else ("rises", "falls", "stays", "goes")
    if len({write(value) for value in values}) == 1:
        return f"{verbs[2]} at {write(first)}", numbers
    pairs = list(pairwise(values))
    up, down = all(a <= b for a, b in pairs), all(a >= b for a, b in pairs)
    verb = verbs[0 if up else 1 if down else 3]
    text = f"{verb} from {write(first)} at {labels[0]} to {write(last)} at {labels[-1]}"
    for word, extreme in (("most", max(values)), ("least", min(values))):
        if write(extreme) not in (write(first), write(last)):
            numbers[word] = extreme
            text += f", with {write(extreme)} at the {word}, at {labels[values.index(extreme)]}"
    return text, numbers


def _finding(table: pd.DataFrame, text: str, numbers: Numbers) -> Finding:
    return Finding(text, numbers, ", ".join(table["tuned"]), [])

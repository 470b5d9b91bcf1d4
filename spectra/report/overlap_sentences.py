"""Sentences on overlaps: whether updates share subspaces, add up or cancel, and what a merge of them would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectra.report.evidence import NAME_WIDTH, Finding, Numbers
from spectra.report.overlap_pairs import BASE, longer, moved, pooled_pairs
from spectra.report.wording import matrices, number, percent, printable, shorten

if TYPE_CHECKING:
    import pandas as pd

SHARED = 2.0  # times its null, from which an overlap is more than chance
EXCESS = 0.05  # above its null, from which that matters
NOTABLE = 0.1  # |cosine| from which updates agree or oppose each other
CERTAIN = 4.0  # standard deviations of a random cosine


def overlap_findings(table: pd.DataFrame, labels: Sequence[str]) -> list[Finding]:
    """What is said of overlaps: what is left out, how each update lies to the base, and each pair to each other.

    Args: table: `matrices` of an `Overlap`.   labels: of its tuned models, in order.
    """
    found = [finding for label in labels for finding in (_nothing(table, label), _apart(table, label)) if finding]
    for _, row in pooled_pairs(table, labels).iterrows():
        found.append(_base(row) if row["first"] == BASE else _pair(row))
    return found


def _nothing(table: pd.DataFrame, label: str) -> Finding | None:
    rows = moved(table, label).rows
    if rows.empty or (rows["second_norm"] > 0).any():
        return None
    return Finding(
        f"Nothing moved in {printable(label)}: all of its entries ({matrices(len(rows))}) are the base's, and there is "
        "no update to hold against others.",
        {"matrices": len(rows)},
        label,
        [],
    )


def _apart(table: pd.DataFrame, label: str) -> Finding | None:
    model = moved(table, label)
    if not model.apart:
        return None
    moves = model.relative[sorted(model.apart)].sort_values(ascending=False)
    names, furthest = [str(name) for name in moves.index], float(moves.iloc[0])
    text = f"{shorten(names[0], NAME_WIDTH)} of {printable(label)} moved by {number(furthest)} times its own norm"
    numbers: Numbers = {"relative_update": furthest}
    if len(names) > 1:
        numbers["left_out"] = len(names)
        text += f", the furthest of {matrices(len(names))} that stand apart"
    text += ", consistent with a retrained or newly initialised layer; "
    text += f"{'it is' if len(names) == 1 else 'they are'} left out of the numbers of all pairs."
    return Finding(text, numbers, label, names)


def _base(row: pd.Series[Any]) -> Finding:
    label = printable(row["second"])
    text, numbers = _overlaps(row)
    cosine, null = row["update_cosine"], row["update_cosine_null"]
    numbers |= {"update_cosine": cosine}
    overlaps = f"its leading directions overlap the base's by {text}" if text else "the base has no directions"
    verdicts = []
    if text:
        verdicts.append("it is closer to them than chance" if _is_shared(row) else "it is hardly closer than chance")
    if _is_notable(cosine, null):
        verdicts.append("it shrinks the base's weights" if cosine < 0 else "it enlarges the base's weights")
    said = f": {', and '.join(verdicts)}" if verdicts else ""
    text = (
        f"The update of {label} against the base: {overlaps}; its cosine with the weights is {number(cosine, 2)}{said}."
    )
    return Finding(text, numbers, row["second"], [])


def _pair(row: pd.Series[Any]) -> Finding:
    a, b = printable(row["first"]), printable(row["second"])
    labels = f"{row['first']}, {row['second']}"
    if row["matrices"] == 0:
        numbers: Numbers = {"first_matrices": row["first_matrices"], "second_matrices": row["second_matrices"]}
        text = f"{a} and {b} moved different matrices ({row['first_matrices']} and {row['second_matrices']} of them): "
        text += "their updates are orthogonal (cosine 0), and added up both stay whole."
        return Finding(text, numbers, labels, [])
    cosine, null = row["update_cosine"], row["update_cosine_null"]
    overlaps, numbers = _overlaps(row)
    length = longer(row)
    numbers |= {
        "matrices": row["matrices"],
        "update_cosine": cosine,
        "update_cosine_null": null,
        "sign_agreement": row["sign_agreement"],
        "longer": length,
    }
    text = f"The updates of {a} and {b} have cosine {number(cosine, 2)} (chance: 0 +- {number(null, 1)}) and move "
    text += f"{percent(row['sign_agreement'])} of the entries the same way (chance: 50%)"
    text += f"; in {matrices(row['matrices'])} that both moved their leading directions overlap by {overlaps}. "
    return Finding(f"{text}{_verdict(row, length)}", numbers, labels, [])


def _verdict(row: pd.Series[Any], length: float) -> str:
    shared = "share subspaces" if _is_shared(row) else "share few leading directions"
    added = f"added up they are {number(length)} times as long as orthogonal updates would be"
    if _is_notable(row["update_cosine"], row["update_cosine_null"]):
        if row["update_cosine"] > 0:
            return f"They {shared} and agree: {added}, and merging goes twice where they agree."
        return f"They {shared} and oppose each other: {added}, and merging cancels part of both."
    if _is_shared(row):
        return (
            f"They share subspaces for different changes: {added}, so that merging keeps both, and each changes what "
            "the other's directions carry."
        )
    return f"They barely touch: {added}, and merging keeps both."


def _overlaps(row: pd.Series[Any]) -> tuple[str, Numbers]:
    """The overlaps of both sides with their nulls in words; nothing where there are no directions."""
    numbers: Numbers = {
        f"{side}_overlap{null}": row[f"{side}_overlap{null}"] for side in ("left", "right") for null in ("", "_null")
    }
    if any(value != value for value in numbers.values()):
        return "", {}
    left, left_null, right, right_null = (number(row[name], 2) for name in numbers)
    return f"{left} (output; chance: {left_null}) and {right} (input; chance: {right_null})", numbers


def _is_shared(row: pd.Series[Any]) -> bool:
    """Whether the leading subspaces overlap by more than chance on either side."""
    sides = ((row[f"{side}_overlap"], row[f"{side}_overlap_null"]) for side in ("left", "right"))
    return any(phi >= SHARED * null and phi - null >= EXCESS for phi, null in sides)


def _is_notable(cosine: float, null: float) -> bool:
    return abs(cosine) >= max(NOTABLE, CERTAIN * null)

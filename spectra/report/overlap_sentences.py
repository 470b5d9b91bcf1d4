"""Sentences on overlaps: whether updates share subspaces, add up or cancel, and what a merge of them would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spectra.report.evidence import NAME_WIDTH, Finding, Numbers
from spectra.report.overlap_pairs import BASE, longer, moved, pooled_pairs
from spectra.report.wording import counted, matrices, number, percent, printable, shorten

if TYPE_CHECKING:
    import pandas as pd

SHARED = 2.0  # times its null, from which an overlap is more than chance
EXCESS = 0.05  # above its null, from which that matters
NOTABLE = 0.1  # |cosine| from which updates agree or oppose each other
CERTAIN = 4.0  # standard deviations of a random cosine
DIFFERENT = "The two tell different things, so that no verdict is given."


def overlap_findings(table: pd.DataFrame, labels: Sequence[str]) -> list[Finding]:
    """What is said of overlaps: what stands apart, how each update lies to the base, and each pair to each other.

    The numbers are those of whole updates, and those without what stands apart beside them; where the two
    are judged differently, a pair gets both verdicts, and an update against the base none.

    Args: table: `matrices` of an `Overlap`.   labels: of its tuned models, in order.
    """
    found = [finding for label in labels for finding in (_nothing(table, label), _apart(table, label)) if finding]
    without = pooled_pairs(table, labels, outliers=False)
    typical = {(row["first"], row["second"]): row for _, row in without.iterrows() if row["left_out"]}
    for _, row in pooled_pairs(table, labels).iterrows():
        rest = typical.get((row["first"], row["second"]))
        found.append(_base(row, rest) if row["first"] == BASE else _pair(row, rest))
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
    typical = float(model.relative.drop(moves.index)[model.norms > 0].median())
    names, furthest, share = [str(name) for name in moves.index], float(moves.iloc[0]), model.apart_share
    text = f"{shorten(names[0], NAME_WIDTH)} of {printable(label)} moved by {number(furthest)} times its own norm"
    numbers: Numbers = {"relative_update": furthest, "median_of_the_rest": typical, "apart_share": share}
    if len(names) > 1:
        numbers["apart"] = len(names)
        text += f", the furthest of {matrices(len(names))} that stand apart"
    text += f" (the median of the others: {number(typical)})"
    if furthest > 1:
        text += ", consistent with a retrained or newly initialised layer"
    text += (
        f"; {'it holds' if len(names) == 1 else 'they hold'} {percent(share)} of ||D||^2. The numbers of pairs are of "
    )
    text += f"whole updates, {'this matrix' if len(names) == 1 else 'these matrices'} included."
    return Finding(text, numbers, label, names)


def _base(row: pd.Series[Any], rest: pd.Series[Any] | None) -> Finding:
    label = printable(row["second"])
    text, numbers = _overlaps(row)
    cosine = row["update_cosine"]
    numbers |= {"update_cosine": cosine}
    overlaps = f"its leading directions overlap the base's by {text}" if text else "the base has no directions"
    sign, is_shared = _relation(row)
    verdicts = []
    if text:
        verdicts.append("it is closer to them than chance" if is_shared else "it is hardly closer than chance")
    if sign:
        verdicts.append("it shrinks the base's weights" if sign < 0 else "it enlarges the base's weights")
    said = f": {', and '.join(verdicts)}" if verdicts else ""
    beside, of_rest = _beside(row, rest)
    if rest is not None and _relation(rest) != (sign, is_shared):
        said, beside = "", f"{beside} {DIFFERENT}"
    text = f"The update of {label} against the base: {overlaps}; "
    text += f"its cosine with the weights is {number(cosine, 2)}{said}.{beside}"
    return Finding(text, numbers | of_rest, row["second"], [])


def _pair(row: pd.Series[Any], rest: pd.Series[Any] | None) -> Finding:
    a, b = printable(row["first"]), printable(row["second"])
    labels = f"{row['first']}, {row['second']}"
    if row["matrices"] == 0:
        numbers: Numbers = {"first_matrices": row["first_matrices"], "second_matrices": row["second_matrices"]}
        text = f"{a} and {b} moved different matrices ({row['first_matrices']} and {row['second_matrices']} of them): "
        text += "their updates are orthogonal (cosine 0), and added up both stay whole."
        return Finding(text, numbers, labels, [])
    cosine, null = row["update_cosine"], row["update_cosine_null"]
    overlaps, numbers = _overlaps(row)
    numbers |= {
        "matrices": row["matrices"],
        "update_cosine": cosine,
        "update_cosine_null": null,
        "sign_agreement": row["sign_agreement"],
        "shared_entries": row["shared_entries"],
    }
    text = f"The updates of {a} and {b} have cosine {number(cosine, 2)} (chance: 0 +- {number(null, 1)})"
    if row["shared_entries"]:
        text += f" and move the same way {percent(row['sign_agreement'])} of the "
        text += f"{counted(row['shared_entries'], 'entry', 'entries')} that both moved (chance: 50%)"
    else:
        text += " and moved no entry both"
        del numbers["sign_agreement"], numbers["shared_entries"]
    text += f"; in {matrices(row['matrices'])} that both moved their leading directions overlap by {overlaps}."
    beside, of_rest = _beside(row, rest)
    if rest is not None and _relation(rest) != _relation(row):
        both = f"Of the whole: {_verdict(row, longer(row))} Without what stands apart: {_verdict(rest, longer(rest))}"
        return Finding(f"{text}{beside} The two tell different things. {both}", numbers | of_rest, labels, [])
    length = longer(row)
    return Finding(f"{text}{beside} {_verdict(row, length)}", numbers | of_rest | {"longer": length}, labels, [])


def _beside(row: pd.Series[Any], rest: pd.Series[Any] | None) -> tuple[str, Numbers]:
    """A sentence with the numbers of a pair without what stands apart; nothing where there is no such number."""
    if rest is None:
        return "", {}
    norms = ("second_norm",) if row["first"] == BASE else ("first_norm", "second_norm")
    left, whole = (sum(each[name] ** 2 for name in norms) for each in (rest, row))
    share = max(0.0, 1 - left / whole)
    cosine = rest["update_cosine"]
    numbers: Numbers = {"left_out": rest["left_out"], "left_out_share": share, "rest_cosine": cosine}
    text = f" Without {matrices(rest['left_out'])} that {'stands' if rest['left_out'] == 1 else 'stand'} apart, with "
    text += f"{percent(share)} of ||D||^2, the cosine is {number(cosine, 2)}"
    overlaps, of_overlaps = _overlaps(rest)
    if overlaps:
        numbers |= {f"rest_{name}": value for name, value in of_overlaps.items()}
        text += f" and the overlaps are {overlaps}"
    return f"{text}.", numbers


def _verdict(row: pd.Series[Any], length: float) -> str:
    sign, is_shared = _relation(row)
    shared = "share subspaces" if is_shared else "share few leading directions"
    added = f"added up they are {number(length)} times as long as orthogonal updates would be"
    if sign:
        if sign > 0:
            return f"They {shared} and agree: {added}, and merging goes twice where they agree."
        return f"They {shared} and oppose each other: {added}, and merging cancels part of both."
    if is_shared:
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


def _relation(row: pd.Series[Any]) -> tuple[int, bool]:
    """What a verdict rests on: the sign of the cosine, 0 where it is none to speak of, and whether the leading
    subspaces overlap by more than chance on either side.
    """
    cosine = row["update_cosine"]
    notable = abs(cosine) >= max(NOTABLE, CERTAIN * row["update_cosine_null"])
    sides = ((row[f"{side}_overlap"], row[f"{side}_overlap_null"]) for side in ("left", "right"))
    shared = any(phi >= SHARED * null and phi - null >= EXCESS for phi, null in sides)
    return (1 if cosine > 0 else -1) if notable else 0, shared

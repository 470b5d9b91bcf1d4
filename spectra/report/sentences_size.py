"""Sentences on how far the weights moved, and where in the model."""

from __future__ import annotations

import math
from itertools import pairwise

from spectra.report import summary
from spectra.report.evidence import NAME_WIDTH, NOTABLE, Evidence, Finding, Numbers
from spectra.report.wording import counted, listed, matrices, number, pattern, printable, shorten

SHOWN_REASONS = 3  # kinds of failure that a sentence quotes


def outliers(evidence: Evidence) -> Finding | None:
    """Matrices that moved so far that they would drown the rest in any sum."""
    rows = evidence.outliers.sort_values("relative_update", ascending=False)
    rows = rows[rows["spectral_norm_tuned"] != 0]  # a weight that was set to zero was not trained anew; see `zero`
    if rows.empty:
        return None
    typical = summary.median(evidence.typical, "relative_update")
    update = float(rows["relative_update"].iloc[0])
    numbers: Numbers = {"relative_update": update, "median_of_the_rest": typical}
    if len(rows) == 1:
        text = f"{shorten(rows['name'].iloc[0], NAME_WIDTH)} moved by {number(update)} times its own norm"
        rest = "it is left out of the sums below"
    else:
        numbers["outliers"] = len(rows)
        text = (
            f"{matrices(len(rows))} stand apart ({listed(list(rows['name']), width=NAME_WIDTH)}), the furthest having "
        )
        text += f"moved by {number(update)} times its own norm"
        rest = "they are left out of the sums below"
    text += f" (the median of the others: {number(typical)})"
    if not (rows["update_form"] == "low rank").any():  # an adapter adds to a layer and makes none anew
        text += ", consistent with a retrained or newly initialised layer"
    text += "; "
    return Finding(text + rest + ".", numbers, evidence.tuned, list(rows["name"]))


def size(evidence: Evidence) -> Finding | None:
    """How big the update is, and between which matrices it ranges."""
    rows = evidence.typical
    update = summary.pooled_update(rows)
    if math.isnan(update):
        return None
    numbers: Numbers = {"matrices": len(rows), "relative_update": update}
    text = f"The update is {number(update)} of the base in norm over {matrices(len(rows))}"
    names: list[str] = []
    if len(rows) > 1:
        least, most = summary.least(rows, "relative_update"), summary.most(rows, "relative_update")
        median = summary.median(rows, "relative_update")
        numbers |= {
            "median": median,
            "least": float(least["relative_update"]),
            "most": float(most["relative_update"]),
        }
        names = [most["name"], least["name"]]
        low, high = (shorten(name, NAME_WIDTH) for name in (least["name"], most["name"]))
        text += f": median {number(median)}, from {number(least['relative_update'])} in {low} "
        text += f"to {number(most['relative_update'])} in {high}"
    if update > 1:
        text += "; that is more than the base itself"
        if not (rows["update_form"] == "low rank").any():
            text += ", consistent with weights that were trained anew rather than tuned"
    return Finding(text + ".", numbers, evidence.tuned, names)


def zero(evidence: Evidence) -> Finding | None:
    """Matrices that are all zero before or after, of which directions and relative sizes say nothing."""
    rows = evidence.layers[evidence.layers["status"] == "compared"]
    sides = {"base": rows[rows["base_norm"] == 0], "tuned": rows[rows["spectral_norm_tuned"] == 0]}
    parts: list[str] = []
    names: list[str] = []
    numbers: Numbers = {}
    for side, found in sides.items():
        if found.empty:
            continue
        numbers[f"{side}_all_zero"] = len(found)
        names += list(found["name"])
        parts.append(
            f"the {side} weight is all zero in {matrices(len(found))} ({listed(list(found['name']), width=NAME_WIDTH)})"
        )
    if not parts:
        return None
    text = f"{' and '.join(parts)}: they have no directions to be kept or replaced"
    if len(sides["base"]):
        text += ", and what grew from zero has no relative size and is in no sum"
    elif sides["tuned"].index.isin(evidence.outliers.index).any():
        text += ", and what stands apart is left out of the sums below"
    return Finding(f"{text[:1].upper()}{text[1:]}.", numbers, evidence.tuned, names)


def depth(evidence: Evidence) -> Finding | None:
    """Whether early, middle or late blocks moved most."""
    rows = evidence.typical[evidence.typical["layer"].notna()]
    depths = sorted(rows["layer"].unique())
    if len(depths) < 3:
        return None
    cuts = [0, len(depths) // 3, len(depths) - len(depths) // 3, len(depths)]
    thirds = [depths[start:stop] for start, stop in pairwise(cuts)]
    updates = [summary.pooled_update(rows[rows["layer"].isin(third)]) for third in thirds]
    if any(math.isnan(update) for update in updates):
        return None
    where = [f"layer {third[0]}" if len(third) == 1 else f"layers {third[0]}-{third[-1]}" for third in thirds]
    parts = [f"{number(update)} in {place}" for update, place in zip(updates, where, strict=True)]
    even = max(updates) <= NOTABLE * min(updates)
    verdict = "even" if even else f"strongest {('early', 'in the middle', 'late')[updates.index(max(updates))]}"
    text = f"Over depth it is {verdict}: {parts[0]}, {parts[1]} and {parts[2]}."
    return Finding(text, dict(zip(("early", "middle", "late"), updates, strict=True)), evidence.tuned, [])


def roles(evidence: Evidence) -> Finding | None:
    """Which kind of matrix moved most, and which least."""
    updates = {str(role): summary.pooled_update(rows) for role, rows in evidence.typical.groupby("role")}
    updates = {role: update for role, update in updates.items() if not math.isnan(update)}
    if len(updates) < 2:
        return None
    most, least = max(updates, key=lambda role: updates[role]), min(updates, key=lambda role: updates[role])
    if updates[most] <= NOTABLE * updates[least]:
        return None
    text = (
        f"By role it is largest in {most} ({number(updates[most])}) and smallest in {least} ({number(updates[least])})."
    )
    numbers: Numbers = {"largest": updates[most], "smallest": updates[least]}
    return Finding(text, numbers | {"largest_role": most, "smallest_role": least}, evidence.tuned, [])


def rounding(evidence: Evidence) -> Finding | None:
    """Matrices whose update cannot be told from the noise of storing it."""
    rows = evidence.compared
    rows = rows[rows["below_rounding_floor"].fillna(False).astype(bool)]
    if rows.empty:
        return None
    floor, update = summary.median(rows, "rounding_floor"), summary.median(rows, "relative_update")
    text = (
        f"Mind the rounding: in {len(rows)} of {matrices(len(evidence.compared))} the update (median {number(update)}) "
        f"is under 3 times the noise of storing both models (median {number(floor)}), so their numbers may be noise: "
        f"{listed(list(rows['name']), width=NAME_WIDTH)}."
    )
    numbers: Numbers = {"below_rounding_floor": len(rows), "relative_update": update, "rounding_floor": floor}
    return Finding(text, numbers, evidence.tuned, list(rows["name"]))


def unchanged(evidence: Evidence) -> Finding | None:
    """Matrices that are bit-identical: frozen, as far as the files can tell."""
    rows = evidence.layers[evidence.layers["status"] == "unchanged"]
    if rows.empty:
        return None
    numbers: Numbers = {"unchanged": len(rows), "matrices": len(evidence.layers)}
    text = (
        f"{len(rows)} of {matrices(len(evidence.layers))} {'is' if len(rows) == 1 else 'are'} bit-identical to the base"
    )
    if len(rows) == len(evidence.layers):
        return Finding(f"Nothing moved: {text}.", numbers, evidence.tuned, list(rows["name"]))
    text += f", consistent with frozen layers: {listed(list(rows['name']), width=NAME_WIDTH)}."
    return Finding(text, numbers, evidence.tuned, list(rows["name"]))


def failed(evidence: Evidence) -> Finding | None:
    """Matrices that could not be measured."""
    rows = evidence.layers[evidence.layers["status"] == "failed"]
    if rows.empty:
        return None
    kinds: dict[str, tuple[str, list[str]]] = {}
    for name, note in zip(rows["name"], rows["note"], strict=True):
        reason = printable(str(note)).rstrip(".") or "no reason was recorded"
        kinds.setdefault(pattern(reason), (reason, []))[1].append(name)
    commonest = sorted(kinds.values(), key=lambda kind: -len(kind[1]))
    parts = [f"{listed(names, width=NAME_WIDTH)} ({reason})" for reason, names in commonest[:SHOWN_REASONS]]
    text = f"{len(rows)} of {matrices(len(evidence.layers))} could not be measured: {'; '.join(parts)}"
    if len(kinds) > SHOWN_REASONS:
        text += f"; and {counted(len(kinds) - SHOWN_REASONS, 'other reason')}"
    text += "."
    numbers: Numbers = {"failed": len(rows), "matrices": len(evidence.layers)}
    return Finding(text, numbers, evidence.tuned, list(rows["name"]))


def nothing(evidence: Evidence) -> Finding | None:
    """A tuned model of which no matrix could be paired."""
    if len(evidence.layers):
        return None
    return Finding("Nothing was compared: no matrix of the two models could be paired.", {}, evidence.tuned, [])

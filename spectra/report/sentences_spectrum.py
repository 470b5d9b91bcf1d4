"""Sentences on what moved: singular values or directions, which of them, how many, and what became of the first."""

from __future__ import annotations

import math

from spectra.report import summary
from spectra.report.evidence import NAME_WIDTH, NOTABLE, Evidence, Finding, Numbers
from spectra.report.wording import count, counted, listed, matrices, number, percent, shorten

ALIGNED = 2.0  # times its null, above which the diagonal is more than chance
HELD = 0.25  # of what the diagonal says to first order, below which singular values did not really change
MOVED = 1e-6  # of s_0: a smaller change of a singular value is none
MOSTLY = 0.6  # of the components, above which their common sign is worth a sentence
AGREEMENT = 0.8  # of the matrices at one small numerical rank, above which an update looks like a merged adapter
SMALL = (128, 65536)  # short side and entries up to which matrices are solved in stacks, a few of them in full
LITERATURE = "Shuttleworth et al. (arXiv 2410.21228)"


def singular_values_or_directions(evidence: Evidence) -> Finding | None:
    """How the energy of the update divides between singular values, directions, and what is outside the basis.

    C_ii is the change of a singular value to first order only: a pure rotation puts energy there at second order. So
    the exact change of the singular values stands beside it and decides where the two disagree.
    """
    columns = ("diagonal_share", "off_diagonal_share", "outside_share")
    shares = {column: summary.pooled_share(evidence.typical, column) for column in columns}
    enrichment = summary.pooled_enrichment(evidence.typical)
    if any(math.isnan(value) for value in (*shares.values(), enrichment)):
        return None
    shift = summary.pooled_shift(evidence.typical)
    first_order = math.sqrt(shares["diagonal_share"]) * summary.pooled_update(evidence.typical)
    if shares["diagonal_share"] > 0.5:
        verdict = "mostly a rescaling of the base's own components"
    elif enrichment > 1 / ALIGNED and shift < HELD * first_order:
        verdict = "directions turned and singular values were kept (the diagonal is then a second order of the turn)"
    elif enrichment >= ALIGNED:
        verdict = "directions turned, yet singular values moved more than chance would have it"
        verdict += ", as far as the first order tells" if math.isnan(shift) else ""
    elif enrichment > 1 / ALIGNED:
        verdict = "close to chance, so consistent with directions that turned without regard to the singular values"
    else:
        verdict = "less than chance, consistent with directions that turned while singular values were held"
    diagonal, turned, outside = (percent(share) for share in shares.values())
    numbers: Numbers = {**shares, "diagonal_enrichment": enrichment}
    text = (
        f"To first order, changes of the singular values (the diagonal C_ii) hold {diagonal} of the update's energy, "
        f"{number(enrichment)} times what a random update puts there; {turned} turns directions inside the base's "
        f"singular basis and {outside} lies outside it"
    )
    if not math.isnan(shift):
        numbers["spectral_shift"] = shift
        text += f"; exactly, the singular values moved by {number(shift)} of their norm"
    return Finding(f"{text}: {verdict}.", numbers, evidence.tuned, [])


def sign(evidence: Evidence) -> Finding | None:
    """Whether singular values mostly grew or shrank, where their change is more than chance.

    Told by the exact singular values; C_ii alone is negative for any rotation, at second order.
    """
    largest = evidence.components.groupby("name")["singular_value"].transform("max")
    known = evidence.components["tuned_singular_value"].notna()  # a fast comparison has the leading ones only
    rows, largest = evidence.components[known], largest[known]
    if rows.empty or not summary.pooled_enrichment(evidence.typical) >= ALIGNED:
        return None
    change = (rows["tuned_singular_value"] - rows["singular_value"]) / largest.where(largest > 0)
    grew, shrank = float((change > MOVED).mean()), float((change < -MOVED).mean())
    verb, share = ("shrank", shrank) if shrank > grew else ("grew", grew)
    if share < MOSTLY:
        return None
    which = "component" if known.all() else "leading component"
    numbers: Numbers = {f"{verb}_share": share, "components": len(rows)}
    text = f"Singular values mostly {verb}: {percent(share)} of {counted(len(rows), which)}"
    negative = float((rows["diagonal"] < 0).mean())
    if verb == "shrank" and negative >= MOSTLY:
        numbers["negative_diagonal_share"] = negative
        text += f", and {percent(negative)} have a negative C_ii (weight decay would do this)"
    return Finding(text + ".", numbers, evidence.tuned, [])


def part_of_the_spectrum(evidence: Evidence) -> Finding | None:
    """Which end of the base's spectrum carries the update, against an even spread."""
    if evidence.slices.empty:
        return None
    of_matrix = evidence.typical.set_index("name")
    norm = evidence.slices["name"].map(of_matrix["update_norm"])
    k = evidence.slices["name"].map(of_matrix[["rows", "columns"]].min(axis=1))
    start, stop = evidence.slices["start"], evidence.slices["stop"]
    several = stop - start < k  # a slice that is all of the spectrum says nothing
    shares, evens = [], []
    for end in (several & (start == 0), several & (stop == k)):
        shares.append(summary.weighted_mean(evidence.slices["plasticity"][end], norm[end]))
        evens.append(summary.weighted_mean(((stop - start) / k)[end], norm[end]))
    if any(math.isnan(value) for value in (*shares, *evens)):
        return None
    leading, trailing = (share / even for share, even in zip(shares, evens, strict=True))
    if leading > NOTABLE >= trailing:
        verdict = "the update leans on the base's leading directions"
    elif trailing > NOTABLE >= leading:
        verdict = "the update leans on the base's trailing directions"
    elif max(leading, trailing) < 1 / NOTABLE:
        verdict = "the update sits in the middle of the spectrum"
    elif min(leading, trailing) > NOTABLE:
        verdict = "the update sits at both ends of the spectrum"
    else:
        verdict = "no part of the spectrum stands out"
    text = (
        f"The leading {percent(evens[0])} of the components carry {percent(shares[0])} of the update, "
        f"the trailing {percent(evens[1])} carry {percent(shares[1])}: {verdict}."
    )
    numbers: Numbers = {
        "leading_share": shares[0],
        "leading_null": evens[0],
        "trailing_share": shares[1],
        "trailing_null": evens[1],
    }
    return Finding(text, numbers, evidence.tuned, [])


def rank(evidence: Evidence) -> Finding | None:
    """In how many directions the update lies, and whether that looks like an adapter."""
    columns = ("stable_rank", "effective_rank", "numerical_rank", "energy_rank_90")
    rows = evidence.typical.dropna(subset=list(columns))
    if rows.empty:
        return None
    stable, effective = (summary.median(rows, column) for column in columns[:2])
    numerical, directions = (count(summary.median(rows, column)) for column in columns[2:])
    side = count(float(rows[["rows", "columns"]].min(axis=1).median()))
    text = (
        f"In the median matrix the update has stable rank {number(stable)}, effective rank {number(effective)} and "
        f"numerical rank {number(numerical)} of {number(side)}; 90% of its energy lies in {number(directions)}"
    )
    numbers: Numbers = {
        "stable_rank": stable,
        "effective_rank": effective,
        "numerical_rank": numerical,
        "short_side": side,
        "energy_rank_90": directions,
    }
    dense = rows[rows["update_form"] == "dense"]
    small = dense["numerical_rank"][dense["numerical_rank"] <= dense[["rows", "columns"]].min(axis=1) / 4]
    if dense.empty:
        text += ", computed from the factors of an adapter"
    elif len(small):
        common = int(small.mode().iloc[0])
        agreeing = int((small == common).sum())
        if agreeing >= max(2, AGREEMENT * len(dense)):
            numbers |= {"adapter_rank": common, "agreeing": agreeing, "matrices": len(dense)}
            text += f". It looks like a merged LoRA of rank {common}: "
            text += f"{agreeing} of {matrices(len(dense))} have exactly that numerical rank"
    return Finding(text + ".", numbers, evidence.tuned, [])


def intruders(evidence: Evidence) -> Finding | None:
    """Leading tuned directions that resemble none of the base's: a count, so outliers need not be left out of it."""
    rows = evidence.compared.dropna(subset=["intruders", "lowest_best_cosine"])
    if rows.empty:
        return None
    hit = rows[rows["intruders"] > 0].sort_values("intruders", ascending=False)
    lowest = summary.least(rows, "lowest_best_cosine")
    found = int(hit["intruders"].sum())
    numbers: Numbers = {
        "intruders": found,
        "matrices_with_intruders": len(hit),
        "matrices": len(rows),
        "lowest_best_cosine": float(lowest["lowest_best_cosine"]),
        "cosine_null": float(lowest["cosine_null"]),
    }
    text = (
        f"There {'is' if found == 1 else 'are'} {counted(found, 'intruder dimension')} (top-{evidence.top} left "
        f"directions whose |cos| with every base direction is under {evidence.epsilon:g}) in {len(hit)} of "
        f"{matrices(len(rows))}"
    )
    if len(hit):
        numbers["most"] = int(hit["intruders"].iloc[0])
        text += f", {numbers['most']} of them in {shorten(hit['name'].iloc[0], NAME_WIDTH)}"
    spread = int(rows["spread_intruders"].sum()) if "spread_intruders" in rows else 0  # an older result has none
    if spread:
        numbers["spread_intruders"] = spread
        no_news = "are no new directions" if spread > 1 else "is no new direction"
        text += f"; {spread} of them only spread over a cluster of base directions, and {no_news}"
    text += (
        f"; the lowest best cosine with any base direction is {number(lowest['lowest_best_cosine'])}, in "
        f"{shorten(lowest['name'], NAME_WIDTH)}, where a random direction has about {number(lowest['cosine_null'])}."
    )
    if len(hit):
        text += f" {LITERATURE} found such directions to go with forgetting in the models that they studied: "
        text += "a reason to test the base's own task, no proof."
    return Finding(text, numbers, evidence.tuned, list(hit["name"]))


def full_decompositions(evidence: Evidence) -> Finding | None:
    """Of how many matrices the leading directions cost a direct SVD of W', where they usually do not."""
    rows = evidence.compared
    could = (rows["update_form"] == "dense") & (rows["tuned_dtype"] != "float64")
    small = (rows[["rows", "columns"]].min(axis=1) <= SMALL[0]) & (rows["rows"] * rows["columns"] <= SMALL[1])
    algorithm = rows["tuned_algorithm"]
    of_factors = algorithm.str.contains("of all of W'", regex=False)
    names = list(rows["name"][(could & ~small & algorithm.str.startswith("ges")) | of_factors])
    if not names:
        return None
    text = (
        f"The leading directions of {matrices(len(names))} ({listed(names, width=NAME_WIDTH)}) are from a full SVD of "
    )
    text += "the tuned weight, for their own solver did not converge."
    return Finding(text, {"full_decompositions": len(names)}, evidence.tuned, names)


def leading_directions(evidence: Evidence) -> Finding | None:
    """How much of the base's leading subspaces the tuned weights keep."""
    rows = evidence.typical.dropna(subset=["left_overlap"])
    rows = rows[rows["overlap_null"] < 0.5]  # where the leading subspace is most of the space, it cannot but be kept
    if rows.empty:
        return None
    lowest = summary.least(rows, "left_overlap")
    overlap, null = summary.median(rows, "left_overlap"), summary.median(rows, "overlap_null")
    verdict = "kept" if overlap > 0.9 else "partly kept" if overlap > 0.5 else "mostly replaced"
    text = (
        f"The base's leading output directions are {verdict}: the top-{evidence.top} subspaces overlap by "
        f"{number(overlap)} in the median matrix (1 = the same, {number(null)} = chance) and by "
        f"{number(lowest['left_overlap'])} at the least, in {shorten(lowest['name'], NAME_WIDTH)}."
    )
    numbers: Numbers = {"left_overlap": overlap, "overlap_null": null, "least": float(lowest["left_overlap"])}
    return Finding(text, numbers, evidence.tuned, [lowest["name"]])

"""What fine-tuning did to the features, in sentences, each with the numbers that led to it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from spectra.report import summary
from spectra.report.evidence import NAME_WIDTH, NOTABLE, Finding, Numbers
from spectra.report.shift_summary import (
    DATA_FREE,
    END_TO_END,
    by_layer,
    functional_summary,
    measured,
    mode_of,
    slice_shares,
)
from spectra.report.wording import counted, matrices, number, percent, shorten

if TYPE_CHECKING:
    import pandas as pd

    from spectra.shift import CovarianceShift

FAR = 3.0  # a slice whose share of the shift is so many times its share of the variance is worth naming
HELD = 0.999  # a share of the variance under which it is said what the directions leave out


def describe(result: CovarianceShift) -> list[Finding]:
    """Findings in reading order: size, own against inherited, depth, directions, slices, likeness, the answers.

    Sentences without evidence are not made.
    """
    rows = measured(result)
    if rows.empty:
        return [Finding("Nothing was measured: no matrix of the two models could be paired and reached.", {}, "", [])]
    sentences = (_parts, _depth, _directions, _slices, _alike, _held, _divergence, _output, _loss)
    shifted = rows[rows["relative_shift"] > 0]  # of the others, medians would say nothing
    found = [_size(rows, shifted), *(sentence(result, shifted) for sentence in sentences)]
    return [finding for finding in found if finding is not None]


def _size(every: pd.DataFrame, rows: pd.DataFrame) -> Finding:
    if rows.empty:
        text = f"Nothing shifted: the covariance of the features is the same in all {matrices(len(every))}."
        return Finding(text, {"matrices": len(every)}, "", [])
    least, most = rows.iloc[-1], rows.iloc[0]
    median = summary.median(rows, "relative_shift")
    numbers: Numbers = {"matrices": len(every), "shifted": len(rows), "median": median}
    of = matrices(len(rows)) if len(rows) == len(every) else f"the {len(rows)} of {matrices(len(every))} where it did"
    text = f"The covariance of the features shifted by {number(median)} of its norm (median of {of})"
    if len(rows) > 1:
        numbers |= {"least": float(least["relative_shift"]), "most": float(most["relative_shift"])}
        low, high = (shorten(str(row["name"]), NAME_WIDTH) for row in (least, most))
        text += f", from {number(numbers['least'])} in {low} to {number(numbers['most'])} in {high}"  # type: ignore[arg-type]
    return Finding(f"{text}.", numbers, "", [str(most["name"]), str(least["name"])])


def _parts(result: CovarianceShift, rows: pd.DataFrame) -> Finding | None:
    """Moved by a layer's own weights, or inherited from the layers before it."""
    if mode_of(result) == DATA_FREE:
        text = "No data were given: inputs are taken as white (Sigma_X = I), and nothing is inherited."
        return Finding(text, {}, "", [])
    if mode_of(result) != END_TO_END:
        text = "Both weights saw the base's inputs, so all of the shift is each layer's own and nothing is inherited."
        return Finding(text, {}, "", [])
    if rows.empty:
        return None
    moved = rows[rows["relative_own"] > 0]  # an adapter leaves most weights alone
    own, inherited = summary.median(moved, "relative_own"), summary.median(rows, "relative_inherited")
    above = rows[rows["relative_inherited"] > rows["relative_own"]]
    of = f" (in the {len(moved)} matrices whose weights moved)" if 0 < len(moved) < len(rows) else ""
    own_part = f"A layer's own weights brought {number(own)} of that norm{of}" if len(moved) else "No weights moved"
    text = (
        f"{own_part} and its inputs {number(inherited)} (medians): "
        f"the inherited part is the larger one in {len(above)} of {matrices(len(rows))}."
    )
    numbers: Numbers = {"own": own, "inherited": inherited, "inherited_larger": len(above), "matrices": len(rows)}
    return Finding(text, numbers, "", list(map(str, above["name"])))


def _depth(result: CovarianceShift, rows: pd.DataFrame) -> Finding | None:
    """Whether early, middle or late blocks shifted most, by their own weights."""
    own = by_layer(rows[rows["relative_own"] > 0], "relative_own")
    if len(own) < 3:
        return None
    cuts = [0, len(own) // 3, len(own) - len(own) // 3, len(own)]
    thirds = [own.iloc[start:stop] for start, stop in pairwise(cuts)]
    shifts = [float(third.median()) for third in thirds]
    names = [
        f"layer {third.index[0]}" if len(third) == 1 else f"layers {third.index[0]}-{third.index[-1]}"
        for third in thirds
    ]
    even = max(shifts) <= NOTABLE * min(shifts)
    where = "even" if even else f"strongest {('early', 'in the middle', 'late')[int(np.argmax(shifts))]}"
    parts = [f"{number(shift)} in {name}" for shift, name in zip(shifts, names, strict=True)]
    text = f"Over depth the own shift is {where}: {parts[0]}, {parts[1]} and {parts[2]} (medians)"
    numbers: Numbers = dict(zip(("early", "middle", "late"), shifts, strict=True))
    if mode_of(result) == END_TO_END:
        inherited = by_layer(rows, "relative_inherited")
        numbers |= {"inherited_first": float(inherited.iloc[0]), "inherited_last": float(inherited.iloc[-1])}
        text += (
            f"; the inherited one goes from {number(float(inherited.iloc[0]))} in layer {inherited.index[0]} to "
            f"{number(float(inherited.iloc[-1]))} in layer {inherited.index[-1]}"
        )
    return Finding(f"{text}.", numbers, "", [])


def _directions(result: CovarianceShift, rows: pd.DataFrame) -> Finding | None:
    """Gained or lost variance, against directions that became correlated."""
    if rows.empty:
        return None
    ratio = float(np.median(rows["variance_tuned"] / rows["variance_base"]))
    off = summary.median(rows, "shift_off_diagonal_share")
    if math.isnan(ratio) or math.isnan(off):
        return None
    change = "kept" if abs(ratio - 1) < 5e-4 else "gained" if ratio > 1 else "lost"
    said = (
        f"{change} their variance (x {ratio:.4f})" if change == "kept" else f"{change} variance (x {number(ratio, 4)})"
    )
    basis = (
        "the base weight's left singular directions" if rows["basis"].iloc[0] == "weight" else "principal directions"
    )
    text = (
        f"The features {said}, and {percent(off)} of the shift's energy lies off the diagonal, between {basis} that "
        "became correlated (medians)."
    )
    return Finding(text, {"variance_ratio": ratio, "off_diagonal_share": off}, "", [])


def _slices(result: CovarianceShift, rows: pd.DataFrame) -> Finding | None:
    """Which slice of directions holds the shift, and which more of it than of the variance."""
    shares = slice_shares(result)
    if len(shares) < 2 or shares["shift_share"].isna().all():
        return None
    at = int(shares["shift_share"].argmax())
    most = int(shares.index[at])
    held, variance = (float(shares[column].iloc[at]) for column in ("shift_share", "variance_share"))
    numbers: Numbers = {"slice": most, "shift_share": held, "variance_share": variance}
    text = (
        f"Of {len(shares)} slices of directions, slice {most} holds most of the shift: {percent(held)}, at "
        f"{percent(variance)} of the variance (medians)"
    )
    beyond = shares[(shares["shift_share"] > FAR * shares["variance_share"]) & (shares["variance_share"] > 0)]
    beyond = beyond[beyond.index != most]
    if len(beyond):
        times_each = beyond["shift_share"] / beyond["variance_share"]
        top, times = int(beyond.index[int(times_each.argmax())]), float(times_each.max())
        numbers |= {"sensitive_slice": top, "times": times}
        text += f"; for its variance, slice {top} shifted most ({number(times, 2)} times its share)"
    return Finding(f"{text}.", numbers, "", [])


def _alike(result: CovarianceShift, rows: pd.DataFrame) -> Finding | None:
    known = rows[rows["cka"].notna()]
    if known.empty:
        return None
    least, median = summary.least(known, "cka"), summary.median(known, "cka")
    lowest = float(least["cka"])
    text = (
        f"The features before and after have a linear CKA of {median:.4f} (median), the lowest {lowest:.4f} in "
        f"{shorten(str(least['name']), NAME_WIDTH)}."
    )
    return Finding(text, {"cka": median, "lowest": lowest}, "", [str(least["name"])])


def _held(result: CovarianceShift, rows: pd.DataFrame) -> Finding | None:
    """Layers of which only the leading directions were taken."""
    cut = rows[rows["held_share"] < HELD]
    if cut.empty:
        return None
    least = summary.least(cut, "held_share")
    share = float(least["held_share"])
    text = (
        f"In {matrices(len(cut))} the directions that were taken do not hold all of the variance: "
        f"{percent(share)} at least ({shorten(str(least['name']), NAME_WIDTH)})."
    )
    return Finding(text, {"matrices": len(cut), "held_share": share}, "", list(map(str, cut["name"])))


def _divergence(result: CovarianceShift, rows: pd.DataFrame) -> Finding | None:
    numbers = _numbers(result, "kl")
    if not numbers:
        return None
    text = (
        f"The answers diverge from the base's by KL {_mean(numbers)} nats a sample (mean of "
        f"{counted(int(numbers['samples']), 'sample')}; median {number(float(numbers['median']))}, 95th percentile "
        f"{number(float(numbers['p95']))}): on data of the new task this, and not the norm of the update, is what "
        "forgetting has been found to follow (arXiv 2509.04259)."
    )
    return Finding(text, numbers, "", [])


def _output(result: CovarianceShift, rows: pd.DataFrame) -> Finding | None:
    numbers, cosine = _numbers(result, "output_change"), _numbers(result, "output_cosine")
    if not numbers:
        return None
    text = f"The model's output moved by {_mean(numbers)} of its norm a sample (mean of {numbers['samples']})"
    if cosine:
        numbers["cosine"] = cosine["mean"]
        text += f", at a cosine of {float(cosine['mean']):.4f} with what it was"
    return Finding(f"{text}.", numbers, "", [])


def _loss(result: CovarianceShift, rows: pd.DataFrame) -> Finding | None:
    numbers = _numbers(result, "loss_change")
    if not numbers:
        return None
    base, tuned = (float(_numbers(result, f"{side}_loss")["mean"]) for side in ("base", "tuned"))
    change = result.functional["loss_change"].dropna()
    rose = int((change > 0).sum())
    text = (
        f"The loss went from {number(base)} to {number(tuned)}, by {_mean(numbers)} a sample; it rose on {rose} of "
        f"{counted(len(change), 'sample')}."
    )
    return Finding(text, numbers | {"base_loss": base, "tuned_loss": tuned, "rose": rose}, "", [])


def _numbers(result: CovarianceShift, measure: str) -> Numbers:
    summarised = functional_summary(result.functional)
    if measure not in summarised.index:
        return {}
    values = {str(column): float(summarised[column][measure]) for column in summarised.columns}
    return {**values, "samples": int(values["samples"])}


def _mean(numbers: Numbers) -> str:
    error = float(numbers["standard_error"])
    return number(float(numbers["mean"])) + ("" if math.isnan(error) else f" +- {number(error, 2)}")

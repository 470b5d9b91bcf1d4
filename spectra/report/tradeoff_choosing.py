"""Which runs of a sweep a picture shows, and in which words it says how their learning rates came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from spectra.errors import SpectraError

if TYPE_CHECKING:
    import pandas as pd

Rates = Literal["fixed", "matched", "best"]


@dataclass(frozen=True)
class Chosen:
    """The runs that a picture shows, each with its `place` (position, or start where slices were named by it).

    words: how their learning rates came about, for the title.   absent: method of the sweep -> why it has no run here.
    """

    runs: pd.DataFrame
    words: str
    absent: Mapping[str, str] = field(default_factory=dict)


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """The finished runs, with their `place`. Raises `SpectraError` where there is none.

    Where several grids went into one table, slices are those that are named as its first one (by position or by start),
    and matched runs those with the reference of its first: others cannot stand on the same axis.
    """
    done = runs[runs["status"] == "finished"]
    if done.empty:
        raise SpectraError("no run of the sweep is finished, so there is nothing to draw")
    matched = done["matched_position"]
    done = done[matched.isna() | (matched == matched.dropna().head(1).sum())]
    slices = done[done["method"] == "slice"]
    name = "position" if slices.empty or slices["position"].notna().iloc[0] else "start"
    done = done[(done["method"] != "slice") | done[name].notna()]
    return done.assign(place=done[name].astype("float64"))


def every_rate(table: pd.DataFrame) -> Chosen:
    """Every finished run; matched slices have rates that the grid does not name, and the words say so."""
    runs = finished(table)
    slices = runs[runs["method"] == "slice"]
    words = "all learning rates"
    if slices["matched_position"].notna().any():
        reference = slices["matched_position"].dropna().iloc[0]
        words += f", steps matched to position {reference:g}"
        words += "" if slices["matched_position"].notna().all() else " in some runs"
    return Chosen(runs, words)


def chosen_runs(table: pd.DataFrame, rates: Rates | None, rate: float | None) -> Chosen:
    """The runs at one rate, at one step size, or each at its best rate; arguments as of `SweepPlots.tradeoff`."""
    runs = finished(table)
    is_slice, is_matched = runs["method"] == "slice", runs["matched_position"].notna()
    if not is_slice.any():
        raise SpectraError("no finished run of the sweep is of a slice; draw its pareto() instead")
    if rates is None:
        rates = "matched" if (is_slice & is_matched).any() else "fixed"
    if rates not in ("fixed", "matched", "best"):
        raise SpectraError(f"{rates!r} is no way to choose learning rates; give fixed, matched or best")
    if rates == "best" and rate is not None:
        raise SpectraError("the best learning rates are asked for, and one is given; leave out rate")
    if rates == "best":
        runs, words = _best(runs[~is_matched] if (is_slice & ~is_matched).any() else runs)
        return Chosen(runs, words, _absent(table, runs, None))
    wanted = is_matched if rates == "matched" else ~is_matched
    of_slices = sorted(runs.loc[is_slice & wanted, "learning_rate"].unique())
    if not of_slices:
        raise SpectraError(f"the sweep has no slices whose learning rates are {rates}")
    rate = of_slices[len(of_slices) // 2] if rate is None else rate
    if rate not in of_slices:
        known = ", ".join(f"{one:g}" for one in of_slices)
        raise SpectraError(f"no slices were run at the learning rate {rate:g}; those of the sweep are {known}")
    # A method that has no size to match stands beside matched slices at the plain rate.
    other = ~runs["method"].isin(runs.loc[is_matched, "method"]) if rates == "matched" else wanted
    runs = runs[(runs["learning_rate"] == rate) & (wanted | other)]
    words = f"one learning rate, {rate:g}"
    if rates == "matched":
        words = f"step sizes of position {runs['matched_position'].dropna().iloc[0]:g} at {rate:g}"
    return Chosen(runs, words, _absent(table, runs, rate))


def _absent(table: pd.DataFrame, runs: pd.DataFrame, rate: float | None) -> dict[str, str]:
    """Why methods of the table have no run among those chosen, at one rate or (None) at the best ones."""
    why = {}
    for method in sorted(set(table["method"]) - set(runs["method"])):
        tried = (table["method"] == method) & (rate is None or table["learning_rate"] == rate)
        why[method] = ("failed" if tried.any() else "not run") + ("" if rate is None else " at this rate")
    return why


def _best(runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Of every slice and method the learning rate of the highest mean score on the validation part, or on the test.

    A rate at which a seed is missing (it diverged) is taken only where all rates lack one.
    """
    column = "validation_score" if runs["validation_score"].notna().all() else "score"
    found = (
        runs.groupby(["method", "place", "learning_rate"], dropna=False)[column].agg(["count", "mean"]).reset_index()
    )
    order = found.sort_values(["count", "mean"], ascending=False, kind="stable")
    best = order.drop_duplicates(["method", "place"])[["method", "place", "learning_rate"]]
    words = f"best learning rates, by {'validation' if column == 'validation_score' else 'the test itself'}"
    if runs["matched_position"].notna().any():
        words += ", steps matched"
    return runs.merge(best, on=["method", "place", "learning_rate"]), words

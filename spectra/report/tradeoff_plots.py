"""The pictures of a sweep: what slices learn and what they forget, against position and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spectra.errors import SpectraError
from spectra.report.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LINES,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    Array,
    label,
    legend_below,
    letters,
    plain,
)
from spectra.report.wording import counted

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Rates = Literal["fixed", "matched", "best"]

SCORES = {"accuracy": "accuracy", "log_likelihood": "log-likelihood (nats a token)"}
REFERENCES: dict[str, dict[str, Any]] = {
    "lora": {"color": GREEN, "linestyle": "--", "marker": "s"},
    "full": {"color": VERMILION, "linestyle": "-.", "marker": "^"},
    "random": {"color": ORANGE, "linestyle": ":", "marker": "D"},
    "head": {"color": GREY, "linestyle": (0, (6, 2)), "marker": "x"},
}


@dataclass(frozen=True)
class Chosen:
    """The runs that a picture shows, and how their learning rates came about, in words for its title."""

    runs: pd.DataFrame
    words: str


class SweepPlots:
    """The pictures of the table `runs` of a sweep. Methods return matplotlib Axes; `ax=None` makes a figure."""

    def __init__(self, runs: pd.DataFrame) -> None:
        self.runs = runs

    def tradeoff(
        self, rates: Rates | None = None, *, rate: float | None = None, ax: Sequence[Axes] | None = None
    ) -> tuple[Axes, Axes]:
        """The new task's score, and what is forgotten, against the position of the slice.

        Dots are means over the seeds, bars their 95 % intervals (Student's t); other methods are horizontal lines, with
        their intervals at the right.

        Args:
            rates: "fixed": all methods at the one learning rate `rate`; "matched": slices at rates that give their
                first steps one size; "best": each slice and method at its own best rate. None: matched where the sweep
                is, fixed otherwise.
            rate: of fixed and matched; by default the middle one of those that the slices were run at.
            ax: two axes.
        Returns: the axes of the score and those of forgetting.
        Raises: SpectraError where the sweep holds no such runs.
        """
        chosen = self._chosen(rates, rate)
        left, right = _two(ax)
        metric = SCORES.get(str(chosen.runs["metric"].iloc[0]), "score")
        for axes, column, y in (
            (left, "score", f"new task: {metric}"),
            (right, "forgetting", f"forgetting: lost {metric}"),
        ):
            if chosen.runs[column].isna().all():
                raise SpectraError(
                    f"the sweep has no {column}; give [retain], the base's own task, to measure what is forgotten"
                )
            self._panel(axes, chosen, column, y)
        return left, right

    def pareto(self, rates: Rates | None = None, *, rate: float | None = None, ax: Axes | None = None) -> Axes:
        """The new task's score against what is forgotten: means over the seeds, slices coloured by position.

        The line joins the means that no other mean beats in both. Args as of `tradeoff`; rates None: all learning
        rates, a point each.
        """
        chosen = self._all() if rates is None and rate is None else self._chosen(rates, rate)
        ax = _one(ax)
        table = _means(chosen.runs, ["method", "place", "learning_rate", "matched_position"], ["score", "forgetting"])
        table = table.dropna(subset=["score", "forgetting"])
        if table.empty:
            raise SpectraError(
                "no run of the sweep has both a score and forgetting; give [retain], the base's own task"
            )
        size = letters(ax)
        slices = table[table["method"] == "slice"]
        if len(slices):
            points = ax.scatter(
                slices["forgetting"],
                slices["score"],
                c=slices["place"],
                cmap="viridis",
                s=size * 3,
                zorder=3,
                label="slices",
            )
            bar = ax.figure.colorbar(points, ax=ax, pad=0.02)
            bar.set_label(_place_label(chosen.runs), fontsize=size - 1)
            bar.ax.tick_params(labelsize=size - 1)
        for method, style in _styles(table):
            rows = table[table["method"] == method]
            ax.plot(
                rows["forgetting"], rows["score"], linestyle="none", marker=style["marker"], color=style["color"],
                markersize=size * 0.6, label=plain(method), zorder=4,
            )  # fmt: skip
        front = _front(table["forgetting"].to_numpy(), table["score"].to_numpy())
        best = table.iloc[front].sort_values("forgetting")
        ax.plot(best["forgetting"], best["score"], color=BLACK, linewidth=0.8, zorder=2, label="not beaten in both")
        metric = SCORES.get(str(chosen.runs["metric"].iloc[0]), "score")
        subject = f"means over {counted(chosen.runs['seed'].nunique(), 'seed')}{_failures(self.runs)}"
        label(ax, chosen.words, subject, f"forgetting: lost {metric} (left is better)", f"new task: {metric}")
        legend_below(ax, 3)
        return ax

    def _panel(self, ax: Axes, chosen: Chosen, column: str, y: str) -> None:
        size = letters(ax)
        slices = _means(chosen.runs[chosen.runs["method"] == "slice"], ["place"], [column])
        place = slices["place"].to_numpy()
        right, apart = float(place.max()), 0.05 * (float(np.ptp(place)) or 1.0)
        bars: dict[str, Any] = {"markersize": size * 0.5, "elinewidth": 1}
        ax.errorbar(
            place, slices[column], yerr=_reach(slices, column), color=BLUE, marker="o", linewidth=1.6, zorder=3,
            label="slices", **bars,
        )  # fmt: skip
        for method, style in _styles(chosen.runs):
            row = _means(chosen.runs[chosen.runs["method"] == method], ["method"], [column])
            if np.isfinite(row[column].iloc[0]):
                right += apart  # the intervals stand beside each other, right of the slices
                ax.axhline(row[column].iloc[0], color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
                bars |= {"color": style["color"], "marker": style["marker"], "linestyle": style["linestyle"]}
                ax.errorbar([right], row[column], yerr=_reach(row, column), label=plain(method), **bars)
        _fit(ax)
        ax.set_xticks([tick for tick in ax.get_xticks() if place.min() <= tick <= place.max()])
        subject = f"95% intervals, {counted(chosen.runs['seed'].nunique(), 'seed')}{_failures(self.runs)}"
        label(ax, chosen.words, subject, _place_label(chosen.runs), y)
        legend_below(ax, 3)

    def _finished(self) -> pd.DataFrame:
        """The finished runs; `place`: position, or start where slices were named by it."""
        runs = self.runs[self.runs["status"] == "finished"]
        if runs.empty:
            raise SpectraError("no run of the sweep is finished, so there is nothing to draw")
        by_start = runs["position"].isna().all()
        return runs.assign(place=runs["start"].astype("float64") if by_start else runs["position"])

    def _all(self) -> Chosen:
        """Every finished run; matched slices have rates that the grid does not name, and the words say so."""
        runs = self._finished()
        slices = runs[runs["method"] == "slice"]
        words = "all learning rates"
        if slices["matched_position"].notna().any():
            reference = slices["matched_position"].dropna().iloc[0]
            words += f", steps matched to position {reference:g}"
            words += "" if slices["matched_position"].notna().all() else " in some runs"
        return Chosen(runs, words)

    def _chosen(self, rates: Rates | None, rate: float | None) -> Chosen:
        runs = self._finished()
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
            return _best(runs[~is_matched] if (is_slice & ~is_matched).any() else runs)
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
        if rates == "fixed":
            return Chosen(runs, f"one learning rate, {rate:g}")
        reference = runs["matched_position"].dropna().iloc[0]
        return Chosen(runs, f"step sizes of position {reference:g} at {rate:g}")


def _best(runs: pd.DataFrame) -> Chosen:
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
    return Chosen(runs.merge(best, on=["method", "place", "learning_rate"]), words)


def _means(runs: pd.DataFrame, by: list[str], columns: list[str]) -> pd.DataFrame:
    """Mean over seeds of some columns, and the ends of its 95 % interval (NaN for one seed)."""
    from scipy.special import stdtrit

    groups = runs.groupby(by, dropna=False)
    result = groups.size().rename("seeds").reset_index()
    for column in columns:
        stats = groups[column].agg(["mean", "std", "count"])
        count = stats["count"].to_numpy(dtype=np.float64)
        half = (
            stdtrit(np.maximum(count - 1, 1), 0.975)
            * stats["std"].to_numpy(dtype=np.float64)
            / np.sqrt(np.maximum(count, 1))
        )
        result[column] = stats["mean"].to_numpy(dtype=np.float64)
        result[f"{column}_low"], result[f"{column}_high"] = result[column] - half, result[column] + half
    return result


def _reach(means: pd.DataFrame, column: str) -> Array:
    """How far the intervals reach below and above their means; 0 where there is none."""
    ends = [means[column] - means[f"{column}_low"], means[f"{column}_high"] - means[column]]
    return np.nan_to_num(np.array(ends, dtype=np.float64))


def _front(cost: Array, gain: Array) -> list[int]:
    """The points that no other beats in both: none costs no more and gains no less, and better in one."""
    return [
        at
        for at in range(len(cost))
        if not ((cost <= cost[at]) & (gain >= gain[at]) & ((cost < cost[at]) | (gain > gain[at]))).any()
    ]


def _styles(runs: pd.DataFrame) -> list[tuple[str, dict[str, Any]]]:
    """The methods beside slices, the usual ones in their order, each with its style."""
    there = [str(name) for name in dict.fromkeys(runs["method"]) if name != "slice"]
    usual = [name for name in REFERENCES if name in there]
    spare = [{**style, "color": color} for style, color in zip(LINES[1:], (PINK, SKY, BLACK, BLUE), strict=False)]
    rest = [name for name in there if name not in REFERENCES]
    return [(name, REFERENCES[name]) for name in usual] + [
        (name, spare[at % len(spare)]) for at, name in enumerate(rest)
    ]


def _place_label(runs: pd.DataFrame) -> str:
    if runs["position"].notna().any():
        return "position of the slice (0: largest $s_i$)"
    return "first component of the slice"


def _failures(runs: pd.DataFrame) -> str:
    failed = int((runs["status"] == "failed").sum())
    return f", {failed} failed" if failed else ""


def _fit(ax: Axes) -> None:
    """Limits that show all means well, on all axes that share them; an interval of two seeds may run out of them."""
    means = np.concatenate(
        [line.get_ydata() for each in ax.get_shared_y_axes().get_siblings(ax) for line in each.lines]
    )
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    margin = 0.35 * (high - low) or 0.05
    ax.set_ylim(low - margin, high + margin)


def _one(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(4.8, 3.8), layout="constrained").subplots()


def _two(ax: Sequence[Axes] | None) -> tuple[Axes, Axes]:
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(7.2, 3.6), layout="constrained").subplots(1, 2)
    if len(ax) != 2:
        raise SpectraError(f"the trade-off is drawn on two axes, and {len(ax)} were given")
    return ax[0], ax[1]

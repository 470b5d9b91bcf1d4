"""The pictures of a sweep: what slices learn and what they forget, against position and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import SpectraError
from spectra.report.choosing import known
from spectra.report.drawing import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
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
from spectra.report.plots import QUANTITIES
from spectra.report.tradeoff_choosing import Chosen, Rates, chosen_runs, every_rate
from spectra.report.wording import counted

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

SCORES = {"accuracy": "accuracy", "log_likelihood": "log-likelihood (nats a token)"}
BEYOND = "beyond"  # the name (gid) of what marks an interval that goes on beyond the axes
WITHOUT = {
    "score": "run it again",
    "forgetting": "give [retain], the base's own task, to measure what is forgotten",
    "relative_update": "run it with compare = true to measure how far the weights moved",
}
REFERENCES: dict[str, dict[str, Any]] = {
    "lora": {"color": GREEN, "linestyle": "--", "marker": "s"},
    "full": {"color": VERMILION, "linestyle": "-.", "marker": "^"},
    "random": {"color": ORANGE, "linestyle": ":", "marker": "D"},
    "head": {"color": GREY, "linestyle": (0, (6, 2)), "marker": "x"},
    "pissa": {"color": PINK, "linestyle": ":", "marker": "<"},
    "milora": {"color": SKY, "linestyle": "--", "marker": ">"},
    "lora_ga": {"color": BLACK, "linestyle": "-.", "marker": "*"},
}
OTHERS: tuple[dict[str, Any], ...] = tuple(
    {"color": color, "linestyle": (0, (1, 3)), "marker": marker}
    for marker, color in zip("vPphd8", (PINK, SKY, BLACK, GREEN, VERMILION, ORANGE), strict=True)
)


class SweepPlots:
    """The pictures of the table `runs` of a sweep. Methods return matplotlib Axes; `ax=None` makes a figure."""

    def __init__(self, runs: pd.DataFrame) -> None:
        self.runs = runs

    def tradeoff(
        self,
        rates: Rates | None = None,
        *,
        rate: float | None = None,
        quantities: Sequence[str] = ("score", "forgetting"),
        ax: Sequence[Axes] | None = None,
    ) -> tuple[Axes, ...]:
        """The new task's score, and what is forgotten, against the position of the slice.

        Dots are means over the seeds, bars their 95 % intervals (Student's t); other methods are horizontal lines, with
        their intervals at the right. A triangle on the edge marks an interval that goes on beyond it. The legend names
        the methods that have no runs here, and says where slices at plain rates are left out and nobody asked for it.

        Args:
            rates: "fixed": all methods at the one learning rate `rate`; "matched": slices at rates that give their
                first steps one size; "best": each slice and method at its own best rate. None: matched where the sweep
                is, fixed otherwise.
            rate: of fixed and matched; by default the middle one of those that the slices were run at.
            quantities: what is drawn: score, forgetting, or relative_update, which says how far the weights moved in
                the end (matched steps are of one size at first only).
            ax: axes, one a quantity.
        Returns: the axes, one a quantity.
        Raises: SpectraError where the sweep holds no such runs, or nothing of a quantity.
        """
        chosen = chosen_runs(self.runs, rates, rate)
        if rates is None and _has_others(self.runs, chosen):
            chosen = replace(chosen, absent={**chosen.absent, "plain slices": "not shown"})
        metric = _metric(chosen)
        labels = {
            "score": f"new task: {metric}",
            "forgetting": f"forgetting: lost {metric}",
            "relative_update": QUANTITIES["relative_update"],
        }
        for column in quantities:
            known(column, list(labels), "a quantity of the trade-off")
            if chosen.runs[column].isna().all():
                raise SpectraError(f"the sweep has no {column}; {WITHOUT[column]}")
        panels = _side_by_side(ax, len(quantities))
        for axes, column in zip(panels, quantities, strict=True):
            self._panel(axes, chosen, column, labels[column])
        return panels

    def pareto(self, rates: Rates | None = None, *, rate: float | None = None, ax: Axes | None = None) -> Axes:
        """The new task's score against what is forgotten: means over the seeds, slices coloured by position.

        The line joins the means that no other mean beats in both. Args as of `tradeoff`; rates None: all learning
        rates, a point each.
        """
        chosen = every_rate(self.runs) if rates is None and rate is None else chosen_runs(self.runs, rates, rate)
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
        for method, style in self._styles(table):
            rows = table[table["method"] == method]
            ax.plot(
                rows["forgetting"], rows["score"], linestyle="none", marker=style["marker"], color=style["color"],
                markersize=size * 0.6, label=plain(method), zorder=4,
            )  # fmt: skip
        front = _front(table["forgetting"].to_numpy(), table["score"].to_numpy())
        best = table.iloc[front].sort_values("forgetting")
        ax.plot(best["forgetting"], best["score"], color=BLACK, linewidth=0.8, zorder=2, label="not beaten in both")
        metric = _metric(chosen)
        subject = f"means over {counted(chosen.runs['seed'].nunique(), 'seed')}{_failures(self.runs)}"
        label(ax, chosen.words, subject, f"forgetting: lost {metric} (left is better)", f"new task: {metric}")
        legend_below(ax, 3)
        return ax

    def _styles(self, runs: pd.DataFrame) -> list[tuple[str, dict[str, Any]]]:
        """The methods of these runs beside slices, each with its style: one in all pictures of a sweep."""
        others = sorted({*self.runs["method"]} - {*REFERENCES, "slice"})
        styles = REFERENCES | {name: OTHERS[at % len(OTHERS)] for at, name in enumerate(others)}
        there = set(runs["method"])
        return [(name, style) for name, style in styles.items() if name in there]

    def _panel(self, ax: Axes, chosen: Chosen, column: str, y: str) -> None:
        size = letters(ax)
        slices = _means(chosen.runs[chosen.runs["method"] == "slice"], ["place"], [column])
        place = slices["place"].to_numpy()
        right, apart = float(place.max()), 0.05 * (float(np.ptp(place)) or 1.0)
        bars: dict[str, Any] = {"markersize": size * 0.5, "elinewidth": 1}
        curve = ax.errorbar(
            place, slices[column], yerr=_reach(slices, column), color=BLUE, marker="o", linewidth=1.6, zorder=3,
            label="slices", **bars,
        )  # fmt: skip
        handles: list[Any] = [curve]
        absent = dict(chosen.absent)
        for method, style in self._styles(chosen.runs):
            row = _means(chosen.runs[chosen.runs["method"] == method], ["method"], [column])
            mean = float(row[column].iloc[0])
            if column == "relative_update" and mean == 0:
                absent[method] = "moves no weight"  # and a logarithmic axis has no place for it
            elif np.isfinite(mean):
                right += apart  # the intervals stand beside each other, right of the slices
                ax.axhline(mean, color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
                bar = ax.errorbar([right], row[column], yerr=_reach(row, column), label=plain(method), **bars | style)
                handles.append(bar)
        for method, why in absent.items():
            handles += ax.plot([], [], linestyle="none", label=f"{plain(method)}: {why}")
        _fit(ax, may_be_log=column == "relative_update")
        ax.set_xticks([tick for tick in ax.get_xticks() if place.min() <= tick <= place.max()])
        subject = f"95% intervals, {counted(chosen.runs['seed'].nunique(), 'seed')}{_failures(self.runs)}"
        label(ax, chosen.words, subject, _place_label(chosen.runs), y)
        legend_below(ax, 3, handles=handles)


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


def _place_label(runs: pd.DataFrame) -> str:
    if runs["position"].notna().any():
        return "position of the slice (0: largest $s_i$)"
    return "first component of the slice"


def _has_others(runs: pd.DataFrame, chosen: Chosen) -> bool:
    """Whether slices at plain rates are finished, too, where those that were chosen are matched."""
    slices = runs[(runs["method"] == "slice") & (runs["status"] == "finished")]
    return bool(chosen.runs["matched_position"].notna().any() and slices["matched_position"].isna().any())


def _metric(chosen: Chosen) -> str:
    return SCORES.get(str(chosen.runs["metric"].iloc[0]), "score")


def _failures(runs: pd.DataFrame) -> str:
    failed = int((runs["status"] == "failed").sum())
    return f", {failed} failed" if failed else ""


def _fit(ax: Axes, *, may_be_log: bool) -> None:
    """Scale and limits of all axes that share the vertical one of these.

    Means show well, and so do intervals that reach no further beyond them than the means lie apart; those that do (of
    two seeds, say) end at the edge, in a triangle. What spans a decade gets a logarithmic axis where it may.
    """
    shared = ax.get_shared_y_axes().get_siblings(ax)
    drawn = [(each, found) for each in shared for found in each.containers if getattr(found, "has_yerr", False)]
    means = np.concatenate([np.asarray(container[0].get_ydata(), dtype=np.float64) for _, container in drawn])
    bars = [np.array(container[2][0].get_segments()) for _, container in drawn]  # (dots, 2 ends, x and y)
    is_log = may_be_log and bool(np.nanmin(means) > 0 and np.nanmax(means) > 10 * np.nanmin(means))
    if is_log:
        ax.set_yscale("log")
    low, high = _limits(means, np.concatenate(bars)[:, :, 1], is_log)
    ax.set_ylim(low, high)
    for mark in [line for each in shared for line in each.lines if line.get_gid() == BEYOND]:
        mark.remove()  # of a panel that was fitted before this one
    for (each, container), segments in zip(drawn, bars, strict=True):
        style = {"color": container[0].get_color(), "markersize": letters(each) * 0.5, "linestyle": "none"}
        for marker, at, ends in (
            ("v", 0, segments[segments[:, 0, 1] < low]),
            ("^", 1, segments[segments[:, 1, 1] > high]),
        ):
            if len(ends):
                where = {"transform": each.get_xaxis_transform(), "clip_on": False, "gid": BEYOND}
                each.plot(ends[:, 0, 0], np.full(len(ends), at), marker=marker, **style, **where)


def _limits(means: Array, ends: Array, is_log: bool) -> tuple[float, float]:
    """The limits of an axis for means and the ends (dots, 2) of their intervals."""
    if is_log:
        tiny = float(np.nanmin(means)) * 1e-9  # an interval may reach below zero
        low, high = _limits(np.log10(means), np.log10(np.maximum(ends, tiny)), is_log=False)
        return 10.0**low, 10.0**high
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    room = high - low or np.inf
    bottom, top = max(low - room, float(np.nanmin(ends))), min(high + room, float(np.nanmax(ends)))
    margin = 0.08 * (top - bottom) or 0.05
    return bottom - margin, top + margin


def _one(ax: Axes | None) -> Axes:
    return _side_by_side(None if ax is None else [ax], 1, (4.8, 3.8))[0]


def _side_by_side(ax: Sequence[Axes] | None, count: int, size: tuple[float, float] | None = None) -> tuple[Axes, ...]:
    """The axes that were given, or those of a new figure of a size in inches."""
    if ax is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size or (3.6 * count, 3.6), layout="constrained")
        ax = list(figure.subplots(1, count, squeeze=False).flat)
    if len(ax) != count:
        raise SpectraError(f"the trade-off is drawn on {counted(count, 'axes', 'axes')}, and {len(ax)} were given")
    return tuple(ax)

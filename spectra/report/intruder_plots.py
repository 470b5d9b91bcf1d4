"""The pictures of intruder dimensions. Each method draws one on the Axes that it is given, or on a new figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from spectra.report.choosing import full_name, known
from spectra.report.drawing import BLACK, BLUE, GREY, LINES, VERMILION, label, legend_below, letters, plain
from spectra.report.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra.intrusion import Intrusion

Side = Literal["left", "right"]


class IntruderPlots:
    """The pictures of `result`. Methods return matplotlib Axes; `ax=None` makes a figure."""

    def __init__(self, result: Intrusion) -> None:
        self.result = result

    def epsilon(self, *, side: Side | None = None, k: int | None = None, ax: Axes | None = None) -> Axes:
        """How many intruders there are against the threshold epsilon, a line per tuned model.

        The grey line is where a random direction's best cosine lies, on average over the matrices: what is counted left
        of it resembles the base less than chance would have it.
        """
        ax = _axes(ax)
        side = self._side(side)
        thresholds = np.linspace(0, 1, 101)
        counts = self.result.counts(thresholds.tolist(), None if k is None else [k])
        self._lines(ax, counts[counts["side"] == side], "epsilon")
        null = float(self.result.triplets["cosine_null"].mean())
        if np.isfinite(null):
            ax.axvline(null, color=GREY, linestyle=":", linewidth=1.2, label="a random direction's best cosine")
        ax.axvline(self.result.epsilon, color=BLACK, linestyle="-", linewidth=0.7, label="threshold in use")
        ax.set_xlim(0, 1)
        message = "intruder dimensions against the threshold"
        words = f"{side} singular vectors, top {k or self.result.reach}"
        label(ax, message, words, r"threshold $\varepsilon$ on the best cosine", "intruders in all matrices")
        legend_below(ax, 2)
        return ax

    def k(
        self, *, side: Side | None = None, epsilon: float | None = None, ax: Axes | None = None
    ) -> Axes:  # fmt: skip
        """How many intruders there are among the top k directions, against k; a line per tuned model."""
        ax = _axes(ax)
        side = self._side(side)
        epsilon = self.result.epsilon if epsilon is None else epsilon
        counts = self.result.counts([epsilon], range(1, self.result.reach + 1))
        self._lines(ax, counts[counts["side"] == side], "k", marked=True)
        _whole_numbers(ax)
        message = "intruder dimensions among the leading directions"
        label(ax, message, f"{side} singular vectors, epsilon = {epsilon:g}", "top $k$ of each matrix", "intruders")
        legend_below(ax, 2)
        return ax

    def matrix(
        self, name: str, *, tuned: str | None = None, side: Side | None = None, ax: Axes | None = None
    ) -> Axes:  # fmt: skip
        """The leading directions of one matrix: each one's best cosine, and its projection on that cluster."""
        ax = _axes(ax)
        side = self._side(side)
        table = self.result.triplets
        labels = list(dict.fromkeys(table["tuned"]))
        tuned = labels[0] if tuned is None and labels else str(tuned)
        known(tuned, labels, "a tuned model")
        of_model = table[(table["tuned"] == tuned) & (table["side"] == side)]
        name = full_name(name, list(dict.fromkeys(of_model["name"])), "a matrix")
        rows = of_model[of_model["name"] == name]
        at = rows["index"].to_numpy()
        ax.vlines(at, rows["best_cosine"], rows["cluster_cosine"], color=GREY, linewidth=1)
        ax.plot(at, rows["best_cosine"], linestyle="none", marker="o", color=BLUE, label="best cosine with one")
        ax.plot(at, rows["cluster_cosine"], linestyle="none", marker="_", color=BLACK, label="with its cluster")
        ax.axhline(self.result.epsilon, color=VERMILION, linestyle="--", linewidth=1.2, label="threshold")
        ax.axhline(float(rows["cosine_null"].iloc[0]), color=GREY, linestyle=":", linewidth=1.2, label="random")
        ax.set_ylim(0, 1.03)
        _whole_numbers(ax)
        found = int((rows["best_cosine"] < self.result.epsilon).sum())
        message = f"{counted(found, 'intruder')} among {len(rows)} leading directions"
        y = r"$\max_i |\langle u_i, y_j \rangle|$" if side == "left" else r"$\max_i |\langle v_i, z_j \rangle|$"
        label(ax, message, name, "direction $j$ of the tuned weight", y)
        legend_below(ax, 2)
        return ax

    def _side(self, side: Side | None) -> Side:
        chosen = self.result.sides[0] if side is None else side
        known(chosen, self.result.sides, "a side that was looked at")
        return chosen

    def _lines(self, ax: Axes, counts: object, x: str, marked: bool = False) -> None:
        import pandas as pd

        assert isinstance(counts, pd.DataFrame)
        for index, (tuned, rows) in enumerate(counts.groupby("tuned", sort=False)):
            style = dict(LINES[index % len(LINES)])
            if not marked:
                style.pop("marker")
            ax.plot(rows[x], rows["intruders"], **style, linewidth=1.6, markersize=4, label=plain(str(tuned)))
        ax.set_ylim(bottom=0)
        ax.tick_params(labelsize=letters(ax) - 1)


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(4.8, 3.6), layout="constrained").subplots()

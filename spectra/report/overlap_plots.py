"""The pictures of overlaps. Each method draws one on the Axes that it is given, or on a new figure."""

from __future__ import annotations

from math import pi
from typing import TYPE_CHECKING, Literal

import numpy as np

from spectra.errors import SpectraError
from spectra.report.choosing import full_name
from spectra.report.drawing import Array, label, letters, plain
from spectra.report.overlap_pairs import BASE
from spectra.report.wording import number, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from spectra.overlapping import Overlap

WORDS = {
    "left_overlap": r"overlap $\varphi$ of output directions",
    "right_overlap": r"overlap $\varphi$ of input directions",
    "update_cosine": "cosine of the updates",
    "sign_agreement": "share of entries of one sign",
    "left_smallest_angle": "smallest angle between output directions (radians)",
    "left_largest_angle": "largest angle between output directions (radians)",
    "right_smallest_angle": "smallest angle between input directions (radians)",
    "right_largest_angle": "largest angle between input directions (radians)",
}

NOTHING_SHARED = "no matrix was moved by two"


class OverlapPlots:
    """The pictures of `result`. Methods return matplotlib Axes; `ax=None` makes a figure."""

    def __init__(self, result: Overlap) -> None:
        self.result = result

    def heatmap(
        self,
        column: str = "left_overlap",
        *,
        outliers: bool = True,
        ax: Axes | None = None,
    ) -> Axes:
        """The matrix of pairs: how alike the updates of the tuned models are, in every cell its number.

        Cosines are blue below 0, red above, and white at 0; the title says how far from 0 chance takes them.

        Args: column: an overlap, `update_cosine`, `sign_agreement`, or a principal angle, as in `pairs(outliers)`.
        """
        if column not in WORDS:
            raise SpectraError(f"{column!r} cannot be drawn as pairs; give one of {', '.join(WORDS)}")
        labels = self.result.labels
        if len(labels) < 2:
            raise SpectraError("one tuned model makes no pairs; give several")
        ax = _axes(ax)
        values = self.result.table(column, outliers).to_numpy()
        is_signed = column == "update_cosine"
        low, high = -1.0 if is_signed else 0.0, pi / 2 if column.endswith("angle") else 1.0
        _image(ax, values, low, high, WORDS[column], "RdBu_r" if is_signed else "cividis")
        size = letters(ax)
        names = [plain(shorten(name, 16)) for name in labels]
        ax.set_xticks(range(len(labels)), names, rotation=30, ha="right")
        ax.set_yticks(range(len(labels)), names)
        for (row, at), value in np.ndenumerate(values):
            dark = abs(value) > 0.6 if is_signed else (value - low) / (high - low) < 0.55
            ax.text(at, row, number(value, 2), ha="center", va="center", fontsize=size,
                    color="white" if dark else "black")  # fmt: skip
        pairs = self.result.pairs(outliers)
        shared = pairs[(pairs["first"] != BASE) & (pairs["matrices"] > 0)]
        random = number(float(shared[f"{column}_null"].mean()), 1 if is_signed else 2)
        subject = f"random updates: {'0 +- ' if is_signed else ''}{random}" if len(shared) else NOTHING_SHARED
        subject += "" if outliers else ", without what stands apart"
        label(ax, "how alike the updates are", subject, "", "")
        return ax

    def grid(
        self,
        name: str,
        first: str,
        second: str,
        *,
        side: Literal["left", "right"] = "left",
        ax: Axes | None = None,
    ) -> Axes:
        """phi(i, j) of one matrix: how much of the smaller of two subspaces lies in the other, for all leading i, j."""
        grids = self.result.grids
        chosen = grids[(grids["first"] == first) & (grids["second"] == second) & (grids["side"] == side)]
        if chosen.empty:
            pairs = ", ".join(f"{row.first!r} and {row.second!r}" for row in self.result.pairs().itertuples())
            raise SpectraError(f"{first!r} and {second!r} are no pair that was compared; there are {pairs or 'none'}")
        name = full_name(name, list(dict.fromkeys(chosen["name"])), "a matrix")
        rows = chosen[chosen["name"] == name]
        values = rows.pivot(index="i", columns="j", values="overlap")
        ax = _axes(ax)
        _image(ax, values.to_numpy(), 0.0, 1.0, r"overlap $\varphi$")
        ax.set_xticks(range(len(values.columns)), [str(j) for j in values.columns])
        ax.set_yticks(range(len(values.index)), [str(i) for i in values.index])
        message = f"{plain(first)} against {plain(second)}, {side} directions"
        label(ax, message, name, f"$j$ of {plain(second)}", f"$i$ of {plain(first)}")
        return ax


def _image(ax: Axes, values: Array, low: float, high: float, words: str, colours: str = "cividis") -> None:
    image = ax.imshow(values, cmap=colours, vmin=low, vmax=high)
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, shrink=0.85)
    bar.set_label(words, fontsize=letters(ax))
    bar.ax.tick_params(labelsize=letters(ax) - 1)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(4.8, 3.8), layout="constrained").subplots()

"""The pictures of a covariance shift. Each method draws one on the Axes that it is given, or on a new figure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spectra.errors import SpectraError
from spectra.report import shift_drawing as drawing
from spectra.report.choosing import full_name, known
from spectra.report.drawing import Array, label
from spectra.report.shift_summary import END_TO_END, by_layer, functional_summary, measured, mode_of
from spectra.report.wording import counted, number, percent

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from spectra.shift import CovarianceShift

FOLDER = "shift_pictures"
CLOSE_UPS = 2  # of the most shifted matrices
PARTS = {"total": r"\Delta", "own": r"\Delta^{own}", "inherited": r"\Delta^{inherited}"}
DIRECTIONS = {"weight": "left singular direction of the base weight", "feature": "principal direction of the features"}
MEASURES = {
    "kl": "KL(base || tuned) per sample, nats",
    "output_change": r"change of the output $\|h' - h\| / \|h\|$ per sample",
    "loss_change": "change of loss per sample",
}


class ShiftPlots:
    """The pictures of `result`. Methods return matplotlib Axes.

    `ax=None` makes a figure. A matrix is called by its name in `layers`, or by an end of it that no other has. Anything
    that is not there raises `SpectraError` with the closest that are.
    """

    def __init__(self, result: CovarianceShift) -> None:
        self.result = result

    def profile(self, name: str, *, ax: Axes | None = None) -> Axes:
        """The diagonal of Delta over trace(Sigma_Y) against the index of the direction, own and inherited part.

        Above zero, the direction's features vary more after fine-tuning; below, less. Points are single directions (the
        sum of both parts), lines running means.
        """
        name, rows = self._components(name)
        total, own, inherited = (
            rows[f"normalised_{part}"].to_numpy(dtype=np.float64)
            for part in ("diagonal", "own_diagonal", "inherited_diagonal")
        )
        ax = _axes(ax)
        drawing.shift_profile(ax, total, own, inherited if mode_of(self.result) == END_TO_END else None)
        gained, lost = float(total[total > 0].sum()), float(np.abs(total[total < 0]).sum())
        message = f"variance gained {percent(gained)}, lost {percent(lost)} of all"
        label(ax, message, name, self._axis(name), r"$\Delta_{ii} / \mathrm{tr}\,\Sigma_Y$")
        return ax

    def heatmap(
        self, name: str, part: Literal["total", "own", "inherited"] = "total", *, ax: Axes | None = None
    ) -> Axes:
        """|Delta_ij| off the diagonal, over trace(Sigma_Y), logarithmic: which directions became correlated.

        Lines mark the slices. Large matrices are drawn in blocks, each the root mean square of its entries.
        """
        name, _ = self._components(name)
        known(part, list(PARTS), "a part of the shift")
        delta = self.result.matrix(name, part).cpu().numpy().astype(np.float64)
        table = self.result.slices
        borders = sorted(set(table["stop"][table["name"] == name].astype(int)))[:-1]
        ax = _axes(ax, height=5.2)
        text = rf"$|{PARTS[part]}_{{ij}}| / \mathrm{{tr}}\,\Sigma_Y$"
        drawing.shift_map(ax, delta / self._of(name, "variance_base"), borders, text)
        energy = float((delta**2).sum())
        off = 1 - float((np.diagonal(delta) ** 2).sum()) / energy if energy > 0 else float("nan")
        axis = self._axis(name)
        label(ax, f"{percent(off)} of the shift lies off the diagonal", name, axis, r"direction $j$")
        return ax

    def depth(self, *, ax: Axes | None = None) -> Axes:
        """Own and inherited shift, ||.||_F over ||Sigma_Y||_F, against depth: medians and quartiles of each block.

        Own shifts are those of the matrices that moved: an adapter leaves most of them alone. Where no matrix lies in
        a numbered block, matrices are drawn in file order.
        """
        layers = self.result.layers[np.isfinite(self.result.layers["relative_shift"])]
        if layers.empty:
            if len(self.result.layers):
                raise SpectraError(
                    "the features of no matrix vary over the positions seen, so no shift has a size to draw; "
                    "give more positions, or use centred=False"
                )
            raise SpectraError("no matrix of this shift was measured, so there is nothing to draw: see `unmatched`")
        where = "layer"
        if layers["layer"].isna().all():
            layers, where = layers.assign(layer=np.arange(len(layers))), "matrix, in file order"
        layers = layers[layers["layer"].notna()]
        both = mode_of(self.result) == END_TO_END
        moved = layers[layers["relative_own"] > 0]
        drawn = [("own, median" + (" of the matrices that moved" if len(moved) < len(layers) else ""), "own", moved)]
        drawn += [("inherited, median" + (" of all" if len(moved) < len(layers) else ""), "inherited", layers)] * both
        lines = [(words, *_spread(rows, f"relative_{part}")) for words, part, rows in drawn if len(rows)]
        ax = _axes(ax)
        drawing.depth_bands(ax, lines)
        own = by_layer(moved, "relative_own").reindex(sorted(layers["layer"].unique()), fill_value=0.0)
        message = f"own shift largest in {where.split(',')[0]} {own.idxmax()} ({number(float(own.max()))})"
        if both:
            above = int((by_layer(layers, "relative_inherited") > own).sum())
            message = f"inherited exceeds own in {above} of {counted(len(own), where.split(',')[0])}"
            message = message.replace("matrixs", "matrices")
        subject = "each model on its own inputs" if both else "this layer alone, on the base's inputs"
        label(ax, message, subject, where, r"part of the shift, over $\|\Sigma_Y\|_F$")
        return ax

    def functional(self, measure: str | None = None, *, ax: Axes | None = None) -> Axes:
        """Histogram over the samples of what fine-tuning did to the answers: KL, or where there is none, the output.

        Args:
            measure: a column of `functional`; by default the first of `kl`, `output_change`, `loss_change` that has
                values.
        """
        summary = functional_summary(self.result.functional)
        if summary.empty:
            raise SpectraError("this shift holds no functional check: compute it from models and batches")
        measure = measure or next((name for name in MEASURES if name in summary.index), str(summary.index[0]))
        known(measure, [str(name) for name in summary.index], "a measure of this functional check")
        values = self.result.functional[measure].to_numpy(dtype=np.float64)
        values = values[np.isfinite(values)]
        ax = _axes(ax)
        mean, error, middle = (float(summary[column][measure]) for column in ("mean", "standard_error", "median"))
        drawing.histogram(ax, values, mean, middle)
        spread = "" if np.isnan(error) else f" \u00b1 {number(error, 2)}"
        message = f"{'KL' if measure == 'kl' else measure.replace('_', ' ')} {number(mean)}{spread}"
        label(ax, f"{message} on average", counted(len(values), "sample"), MEASURES.get(measure, measure), "samples")
        return ax

    def _axis(self, name: str) -> str:
        return f"{DIRECTIONS.get(str(self._of(name, 'basis')), 'direction')} $i$"

    def _of(self, name: str, column: str) -> Any:
        layers = self.result.layers
        return layers[column][layers["name"] == name].iloc[0]

    def _components(self, name: str) -> tuple[str, pd.DataFrame]:
        """The full name of a matrix and its rows of `components` in order."""
        name = full_name(name, self.result.names, "a matrix of this shift")
        table = self.result.components
        rows = table[table["name"] == name].sort_values("component")
        if rows.empty:
            raise SpectraError(f"the shift of {name!r} was not measured: it has no directions to draw")
        return name, rows


def _spread(layers: pd.DataFrame, column: str) -> tuple[Array, Array, Array, Array]:
    """Blocks, and the quartiles of a column over the matrices of each."""
    groups = layers.groupby(layers["layer"].astype("int64"))[column]
    where = np.array(list(groups.groups), dtype=np.float64)
    low, middle, high = (groups.quantile(at).to_numpy(dtype=np.float64) for at in (0.25, 0.5, 0.75))
    return where, low, middle, high


def close_ups(result: CovarianceShift) -> list[str]:
    """The matrices whose features shifted most, of which the standard set of pictures has close-ups."""
    return [str(name) for name in measured(result)["name"][:CLOSE_UPS]]


def save_shift_pictures(result: CovarianceShift, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the standard set of pictures (PNG) into `folder`, each atomically, the same bytes every time.

    Depth, the functional check where there is one, and profile and map of the most shifted matrices (the map only where
    the matrix was kept). Returns: the files written.   Raises: OSError where the folder cannot be written.
    """
    from spectra.atomic import replacing
    from spectra.report.shift_pictures import shift_set

    paths = []
    for picture in shift_set(result):
        paths.append(Path(folder) / picture.file)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        with replacing(paths[-1]) as path:
            path.write_bytes(picture.png())
    return paths


def _axes(ax: Axes | None, height: float | None = None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot

    options: dict[str, Any] = {} if height is None else {"figsize": (6.4, height)}
    return pyplot.figure(layout="constrained", **options).add_subplot()

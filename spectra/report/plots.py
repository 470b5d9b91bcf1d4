"""The pictures of a comparison. Each method draws one on the Axes that it is given, or on a new figure."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import SpectraError
from spectra.report import drawing, summary
from spectra.report.choosing import full_name, known
from spectra.report.wording import number, percent, printable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from spectra.comparison import Comparison

QUANTITIES = {
    "plasticity": r"plasticity $\times\,k$ (1 = even share)",
    "stability": "stability (1 = unmoved)",
    "left_stability": "left stability (1 = unmoved)",
    "right_stability": "right stability (1 = unmoved)",
    "relative_diagonal": r"$C_{ii} / s_i$",
    "diagonal": r"$C_{ii}$",
    "rotation": "first-order rotation (radians)",
    "relative_update": r"relative update $\|D\|_F / \|W\|_F$",
    "diagonal_enrichment": "diagonal enrichment (1 = random)",
    "left_overlap": r"overlap $\phi$ of the leading left subspaces",
    "right_overlap": r"overlap $\phi$ of the leading right subspaces",
    "stable_rank": r"stable rank $\|D\|_F^2 / \|D\|_2^2$",
    "effective_rank": "effective rank of $D$",
    "energy_rank_90": r"$K_{90}$: directions with 90% of $\|D\|_F^2$",
    "spectral_shift": r"spectral shift $\|s' - s\|_2 / \|s\|_2$",
    "intruders": "intruder dimensions",
    "cosine": "cosine of $W$ and $W'$",
}


class Plots:
    """The pictures of `result`. Methods return matplotlib Axes.

    `ax=None` makes a figure; `tuned=None` takes the first tuned model. A name, quantity or model that is not there
    raises `SpectraError` with the closest that are. A matrix is called by its name in `layers`, or by an end of it that
    no other has ("layer.0.attention.self.query"); an end that several have raises `SpectraError` with some of them.
    """

    def __init__(self, result: Comparison) -> None:
        self.result = result

    def profile(
        self,
        name: str,
        slices: Sequence[tuple[int, int]] | None = None,
        *,
        tuned: str | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Stability and plasticity of every component of one matrix, with the even share 1/k.

        Args:
            name: the matrix, as in `layers`, or an end of its name that only it has, with or without ".weight".
            slices: ranges [start, stop) of components to mark; the comparison's own slices where None.
        Returns: the axes of the stability (left); plasticity is on their twin (right).
        """
        name, tuned, rows = self._components(name, tuned)
        if slices is None:
            table = self.result.slices
            table = table[(table["tuned"] == tuned) & (table["name"] == name)]
            slices = list(zip(table["start"].astype(int), table["stop"].astype(int), strict=True))
        stability, plasticity = (rows[column].to_numpy(dtype=np.float64) for column in ("stability", "plasticity"))
        ax = _axes(ax)
        drawing.profile(ax, stability, plasticity, slices)
        eighth = max(1, round(len(rows) / 8))
        message = (
            f"leading {percent(eighth / len(rows))} carry {percent(float(plasticity[:eighth].sum()))} of the update"
        )
        drawing.label(ax, message, f"{tuned}: {name}", "component $i$, leading first", "stability")
        return ax

    def heatmap(
        self, quantity: str = "plasticity", bins: int = 32, *, tuned: str | None = None, ax: Axes | None = None
    ) -> Axes:
        """A quantity of the components averaged in `bins` along the spectrum, a row per matrix from input to output.

        Plasticity is multiplied by k, so that matrices of all sizes share one null: 1.
        """
        tuned = self._tuned(tuned)
        layers = summary.by_depth(summary.compared(self._layers(tuned)))
        table = self.result.components
        known(quantity, _numeric(table, "component"), "a quantity of components")
        grid = self._binned(layers, tuned, quantity, bins)
        ax = _axes(ax, height=min(9.0, 3.2 + 0.03 * len(layers)))
        drawing.heatmap(
            ax,
            grid,
            summary.depth_group(layers),
            QUANTITIES.get(quantity, quantity),
            "ratio" if quantity == "plasticity" else "linear",
        )
        eighth = max(1, bins // 8)
        first, last = (number(_middle(grid[:, end]), 2) for end in (slice(eighth), slice(-eighth, None)))
        message = f"{quantity.replace('_', ' ')}: {first} at the leading end, {last} at the trailing"
        if quantity == "plasticity":
            message = f"leading end carries {first} x its even share, trailing end {last}"
        drawing.label(ax, message, tuned, "position in the spectrum $i/k$, leading first", "layer")
        return ax

    def spectrum(self, name: str, *, tuned: str | None = None, ax: Axes | None = None) -> Axes:
        """Singular values of the base, the tuned matrix and the update, logarithmic."""
        name, tuned, rows = self._components(name, tuned)
        layers = self._layers(tuned)
        directions = layers["energy_rank_90"][layers["name"] == name].dropna()
        ax = _axes(ax)
        columns = ("singular_value", "tuned_singular_value", "update_singular_value")
        drawing.spectrum(ax, *(rows[column].to_numpy(dtype=np.float64) for column in columns))
        message = "Singular values of base, tuned weight and update"
        if len(directions):  # a fast comparison does not know it
            message = f"90% of the update in {int(directions.iloc[0])} of {len(rows)} directions"
        drawing.label(ax, message, f"{tuned}: {name}", "index $i$", r"singular value $s_i$")
        return ax

    def energy(self, by: str = "layer", *, tuned: str | None = None, ax: Axes | None = None) -> Axes:
        """How the energy of the update divides, per layer or role: singular values, directions, outside the basis.

        The tick on each bar is where random updates of the same norms would put the diagonal; beside the bar stands how
        many times that it holds.
        """
        tuned = self._tuned(tuned)
        if by not in ("layer", "role"):
            raise SpectraError(f"energy by {by!r} cannot be drawn: choose by='layer' or by='role'")
        layers = summary.by_depth(summary.compared(self._layers(tuned)))
        keys = np.array(summary.depth_group(layers) if by == "layer" else list(layers["role"]), dtype=object)
        names = list(dict.fromkeys(keys)) if by == "layer" else summary.role_order(layers)
        groups = [layers[keys == name] for name in names]
        shares = [
            np.array([summary.pooled_share(group, column) for group in groups])
            for column in ("diagonal_share", "off_diagonal_share", "outside_share")
        ]
        enrichment = np.array([summary.pooled_enrichment(group) for group in groups])
        ax = _axes(ax, height=min(9.0, 2.0 + 0.24 * len(groups)))
        drawing.stacked_shares(ax, names, shares, shares[0] / enrichment, enrichment)
        typical = layers[~summary.is_outlier(layers)]
        message = (
            f"changes of singular values, to first order: {percent(summary.pooled_share(typical, 'diagonal_share'))}, "
            f"{number(summary.pooled_enrichment(typical), 2)}\u00a0x\u00a0random"  # one piece
        )
        drawing.label(ax, message, tuned, r"share of the update's energy $\|D\|_F^2$", by)
        return ax

    def depth(self, quantity: str = "relative_update", *, tuned: str | None = None, ax: Axes | None = None) -> Axes:
        """A measure of the matrices against depth, a line per role (medians where a layer has several of a role).

        Where no matrix lies in a numbered block, matrices are drawn in file order.
        """
        tuned = self._tuned(tuned)
        known(quantity, _numeric(self.result.layers, "layer"), "a measure of matrices")
        layers = summary.compared(self._layers(tuned))
        rows = layers[layers["layer"].notna() & layers[quantity].notna()]
        where = "layer"
        if rows.empty:
            rows = layers[layers[quantity].notna()].assign(layer=lambda table: np.arange(len(table)))
            where = "matrix, in file order"
        if rows.empty:
            raise SpectraError(f"{quantity} is NaN for every matrix of {printable(tuned)}: there is nothing to draw")
        lines = []
        for role in summary.role_order(rows):
            medians = rows[rows["role"] == role].groupby("layer")[quantity].median()
            lines.append((role, medians.index.to_numpy(dtype=np.float64), medians.to_numpy(dtype=np.float64)))
        null = {"diagonal_enrichment": 1.0}.get(quantity)
        ax = _axes(ax)
        drawing.depth_lines(ax, lines, null)
        top = summary.most(rows, quantity)
        message = f"{quantity.replace('_', ' ')} largest in {top['role']}, {where.split(',')[0]} {top['layer']} "
        message += f"({number(rows[quantity].max())})"
        drawing.label(ax, message, tuned, where, QUANTITIES.get(quantity, quantity))
        return ax

    def slices(self, name: str, *, tuned: str | None = None, ax: Axes | None = None) -> Axes:
        """Block and cross share of the update's energy of every slice of one matrix, with what is random."""
        name, tuned, rows = self._components(name, tuned)
        table = self.result.slices
        table = table[(table["tuned"] == tuned) & (table["name"] == name)].sort_values("slice")
        if table.empty:
            raise SpectraError(f"the comparison holds no slices of {printable(name)}: run the comparison with slices")
        layers = self._layers(tuned)
        area = float((layers["rows"] * layers["columns"])[layers["name"] == name].iloc[0])
        width = (table["stop"] - table["start"]).to_numpy(dtype=np.float64)
        block, cross = (table[column].to_numpy(dtype=np.float64) for column in ("block_share", "cross_share"))
        names = [f"{start}-{stop - 1}" for start, stop in zip(table["start"], table["stop"], strict=True)]
        ax = _axes(ax)
        drawing.slice_bars(ax, names, block, cross, width**2 / area, 2 * width * (len(rows) - width) / area)
        best = int(np.argmax(np.nan_to_num(block + cross)))
        message = f"components {names[best]} touch {percent(float(block[best] + cross[best]))} of the update"
        drawing.label(ax, message, f"{tuned}: {name}", "slice of components", r"share of $\|D\|_F^2$")
        return ax

    def sequence(self, quantity: str = "intruders", *, ax: Axes | None = None) -> Axes:
        """A measure of the tuned models in the order given: a column of `Comparison.sequence()`, or several at once.

        Args: quantity: such as "intruders", "relative_update", "rotation" or "effective_rank"; "energy" (the split into
            singular values, directions and what is outside), "overlap" (both sides), "scores" (score and forgetting).
        """
        from spectra.report.sequence_plots import draw_sequence

        return draw_sequence(self.result, quantity, _axes(ax))

    def _tuned(self, tuned: str | None) -> str:
        labels = summary.tuned_labels(self.result)
        if tuned is None and labels:
            return labels[0]
        known(tuned or "", labels, "a tuned model of this comparison")
        return tuned or ""

    def _layers(self, tuned: str) -> pd.DataFrame:
        layers = summary.rows_of(self.result, tuned)
        if summary.compared(layers).empty:
            raise SpectraError(
                f"no matrix of {printable(tuned)} was compared, so there is nothing to draw: "
                "see `layers` (status, note) and `unmatched`"
            )
        return layers

    def _components(self, name: str, tuned: str | None) -> tuple[str, str, pd.DataFrame]:
        """The full name of a matrix, its tuned model, its rows of `components` in order."""
        tuned = self._tuned(tuned)
        layers = summary.rows_of(self.result, tuned)
        name = full_name(name, list(layers["name"]), f"a matrix of {printable(tuned)}")
        table = self.result.components
        rows = table[(table["tuned"] == tuned) & (table["name"] == name)].sort_values("component")
        if rows.empty:
            status, note = layers[layers["name"] == name][["status", "note"]].astype(str).iloc[0]
            why = f" ({printable(note)})" if note else ""
            raise SpectraError(
                f"{printable(name)} of {printable(tuned)} is {status}{why}: it has no components to draw"
            )
        return name, tuned, rows

    def _binned(self, layers: pd.DataFrame, tuned: str, quantity: str, bins: int) -> drawing.Array:
        """Means of a quantity over equal stretches of the spectrum of every matrix: (matrices, bins)."""
        table = self.result.components
        table = table[table["tuned"] == tuned].sort_values("component", kind="stable")
        values = {str(name): rows.to_numpy(dtype=np.float64) for name, rows in table.groupby("name")[quantity]}
        grid = np.full((len(layers), bins), np.nan)
        for at, name in enumerate(layers["name"]):
            row = values.get(name, np.empty(0))
            if not len(row):
                continue
            grid[at] = drawing.bin_means(row, bins) * (len(row) if quantity == "plasticity" else 1)
        return grid


def save_pictures(result: Comparison, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the standard set of pictures (PNG) into `folder`, each atomically, the same bytes every time.

    Returns: the files written; none where no matrix was compared.   Raises: OSError where the folder cannot be written.
    """
    from spectra.atomic import replacing
    from spectra.report.pictures import standard_set

    paths = []
    for picture in standard_set(result):
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


def _numeric(table: pd.DataFrame, index: str) -> list[str]:
    return [column for column in table.select_dtypes("number").columns if column != index]


def _middle(values: drawing.Array) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan

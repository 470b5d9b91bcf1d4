"""The pictures of a sequence: a measure of every model in order, against the step, or the place in the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import SpectraError
from spectra.report import summary
from spectra.report.choosing import known
from spectra.report.drawing import GREY, LINES, SHARES, label, legend_below, letters, plain
from spectra.report.sequence_table import COLUMNS, MEDIANS, sequence_table, shared_matrices
from spectra.report.wording import number, shorten

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spectra.comparison import Comparison

SEVERAL: dict[str, tuple[str, ...]] = {
    "energy": ("diagonal_share", "off_diagonal_share", "outside_share"),
    "overlap": ("left_overlap", "right_overlap"),
    "scores": ("score", "forgetting"),
}
WORDS = {
    "energy": r"share of the update's energy $\|D\|_F^2$",
    "overlap": r"overlap $\phi$ of the leading subspaces",
    "scores": "score, and score lost",
    "relative_update": r"relative update $\|D\|_F / \|W\|_F$",
    "diagonal_share": "singular values",
    "off_diagonal_share": "directions",
    "outside_share": "outside",
    "diagonal_enrichment": "diagonal enrichment (1 = random)",
    "spectral_shift": r"spectral shift $\|s' - s\|_2 / \|s\|_2$",
    "stability": "stability (1 = unmoved), median",
    "rotation": "first-order rotation (radians), median",
    "left_overlap": "output directions",
    "right_overlap": "input directions",
    "left_angle": "largest angle of the leading output directions",
    "stable_rank": r"stable rank of $D$, median",
    "effective_rank": r"effective rank of $D$, median",
    "energy_rank_90": r"$K_{90}$, median",
    "intruders": "intruders in all matrices",
    "matrices_with_intruders": "matrices with intruders",
    "lowest_best_cosine": "lowest best cosine",
    "score": "score on the new task",
    "forgetting": "forgetting",
}
PANELS = ("intruders", "rotation", "energy", "scores", "relative_update", "overlap", "effective_rank", "spectral_shift")


def draw_sequence(result: Comparison, quantity: str, ax: Axes) -> Axes:
    """A measure of the models in order: a column of `sequence()`, or "energy", "overlap" or "scores" for several.

    Medians over matrices have a band that holds the middle half of them. The horizontal axis is the step where the
    labels end in one.

    Raises: SpectraError for a quantity that there is not, and one that no model has.
    """
    choices = [*SEVERAL, *(column for column in COLUMNS if column in WORDS)]
    known(quantity, list(dict.fromkeys(choices)), "a measure of a sequence")
    table = sequence_table(result)
    names = [name for name in SEVERAL.get(quantity, (quantity,)) if table[name].notna().any()]
    if not names:
        hint = "give them with `in_sequence(scores)` or --scores" if quantity in ("scores", *SEVERAL["scores"]) else ""
        raise SpectraError(f"no model of the sequence has a value of {quantity}" + (f"; {hint}" if hint else ""))
    x = _places(table)
    if quantity == "energy":
        _stacked(ax, table, x, names)
    else:
        for name, style in zip(names, LINES, strict=False):
            if name in MEDIANS:
                low, high = _middle_half(result, table, name)
                ax.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
            values = table[name].to_numpy(dtype=np.float64, na_value=np.nan)
            ax.plot(x, values, **style, linewidth=1.6, markersize=4, label=WORDS[name])
        _vertical(ax, quantity, table)
    ends = f"{table['tuned'].iloc[0]} to {table['tuned'].iloc[-1]}"
    label(ax, _message(table, quantity, names), ends, _axis(table), WORDS[quantity])
    _ticks(ax, table, x)
    if len(names) > 1 or quantity in SEVERAL:
        gap = 3.6 if _steps(table) is not None else 6.0
        legend_below(ax, 2 if quantity == "overlap" else 3, gap=gap)
    return ax


def draw_overview(result: Comparison, figure: Figure) -> None:
    """The panels of a sequence, those that have values: intruders, rotation, energy, scores, then sizes and ranks."""
    table = sequence_table(result)
    panels = [name for name in PANELS if table[list(SEVERAL.get(name, (name,)))].notna().any(axis=None)]
    axes = figure.subplots(2, -(-len(panels) // 2), squeeze=False).ravel()
    for ax, name in zip(axes, panels, strict=False):
        draw_sequence(result, name, ax)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()


def _places(table: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.float64]]:
    steps = _steps(table)
    return table["order"].to_numpy(dtype=np.float64) if steps is None else steps


def _steps(table: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """The steps, where they can be an axis: known, and ascending."""
    if table["step"].isna().any() or not table["step"].is_monotonic_increasing or table["step"].duplicated().any():
        return None
    return table["step"].to_numpy(dtype=np.float64)


def _axis(table: pd.DataFrame) -> str:
    return "tuned model, in order" if _steps(table) is None else "step"


def _ticks(ax: Axes, table: pd.DataFrame, x: np.ndarray[Any, Any]) -> None:
    if _steps(table) is not None:
        return
    every = -(-len(table) // 12)
    names = [plain(shorten(name, 14)) for name in table["tuned"]]
    ax.set_xticks(x[::every], names[::every], rotation=30, ha="right", fontsize=letters(ax) - 1)


def _stacked(ax: Axes, table: pd.DataFrame, x: np.ndarray[Any, Any], names: list[str]) -> None:
    shares = np.nan_to_num(table[names].to_numpy(dtype=np.float64).T)
    styles = [style for style, name in zip(SHARES, SEVERAL["energy"], strict=True) if name in names]
    areas = ax.stackplot(x, shares, colors=[style["color"] for style in styles], edgecolor="white", linewidth=0.5)
    for area, style in zip(areas, styles, strict=True):
        area.set_label(style["label"])
        area.set_hatch(style.get("hatch", ""))
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(0, 1)


def _vertical(ax: Axes, quantity: str, table: pd.DataFrame) -> None:
    from matplotlib.ticker import MaxNLocator

    if quantity == "overlap":
        null = float(table["overlap_null"].median())
        ax.axhline(null, color=GREY, linestyle=":", linewidth=1.2, label=f"chance ({number(null, 2)})")
        ax.set_ylim(0, 1.03)
    elif quantity in ("intruders", "matrices_with_intruders"):
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(bottom=0, top=None if table[quantity].max() > 0 else 1)
    elif quantity in (
        "relative_update",
        "rotation",
        "spectral_shift",
        "effective_rank",
        "stable_rank",
        "energy_rank_90",
    ):
        ax.set_ylim(bottom=0)


def _middle_half(result: Comparison, table: pd.DataFrame, name: str) -> tuple[Any, Any]:
    """The quartiles over the matrices that the medians are of."""
    typical = shared_matrices(result).typical
    quartiles = []
    for tuned in table["tuned"]:
        rows = summary.compared(summary.rows_of(result, tuned))
        values = rows.loc[rows["name"].isin(typical), name].dropna().to_numpy(dtype=np.float64)
        quartiles.append(np.percentile(values, [25, 75]) if len(values) else (np.nan, np.nan))
    low, high = np.array(quartiles).T
    return low, high


def _message(table: pd.DataFrame, quantity: str, names: list[str]) -> str:
    said = {"energy": "off_diagonal_share", "overlap": "left_overlap"}.get(quantity, names[-1])
    words = {"off_diagonal_share": "energy of turned directions", "left_overlap": "overlap of output directions"}
    values = table[said].dropna()
    first, last = (values.iloc[at].item() for at in (0, -1))
    return f"{words.get(said, said.replace('_', ' '))}: {number(first)} to {number(last)}"

"""What the trade-off figures of images and text have in common: their panels, and how their files are written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spectra.report.tradeoff_plots import REFERENCES, SweepPlots


def panels(table: pd.DataFrame, rate: float) -> Figure:
    """Score (above) and forgetting (below) against position: at one rate, at one step size, at each one's best rate."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharey="row", sharex=True)
    plots = SweepPlots(table)
    plots.tradeoff("fixed", rate=rate, ax=axes[:, 0])
    plots.tradeoff("matched", rate=rate, ax=axes[:, 1])
    plots.tradeoff("best", ax=axes[:, 2])
    titles = (f"One learning rate, {rate:g}", "Step sizes matched", "Best rate of each slice")
    for column, title in enumerate(titles):
        axes[0, column].set_title(title, fontsize=9, loc="left")
        axes[1, column].set_title("", loc="left")
    named = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    for ax in axes.flat:
        tidy(ax)
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    for ax in axes[0]:
        ax.set_xlabel("")
    figure.align_ylabels(axes[:, 0])
    order = [name for name in ("slices", *REFERENCES) if name in named]
    handles = [named[name] for name in order]
    figure.legend(handles, order, loc="outside lower center", ncols=len(order), frameon=False, fontsize=8)
    return figure


def pareto(table: pd.DataFrame) -> Figure:
    """Score against forgetting of every slice and method at every learning rate, means over seeds."""
    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    SweepPlots(table[table["matched_position"].isna()]).pareto(ax=figure.subplots())
    return figure


def tidy(ax: Axes) -> None:
    """One legend serves all panels."""
    if ax.get_legend() is not None:
        ax.get_legend().remove()
    ax.tick_params(labelsize=8)
    for text in (ax.xaxis.label, ax.yaxis.label):
        text.set_fontsize(8)


def write(figures: dict[str, Figure], folder: Path) -> None:
    """Each figure as PDF and as PNG, the same bytes for the same numbers."""
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})

"""What the trade-off figures of images and text have in common: the runs, the panels, and the command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from _writing import write
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from spectra.report.tradeoff_plots import REFERENCES, SweepPlots
from spectra.training import Grid, sweep

HERE = Path(__file__).resolve().parent
QUANTITIES = ("score", "forgetting", "relative_update")
DRAWN = ("slices", *REFERENCES)


class Sizes(Protocol):
    """What decides how many runs there are, and how long they take."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def positions(self) -> tuple[float, ...]: ...
    @property
    def rates(self) -> tuple[float, ...]: ...
    @property
    def rates_of_full(self) -> tuple[float, ...]: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...


def swept(
    work: Path,
    base: nn.Module,
    targets: Sequence[str],
    sizes: Sizes,
    rate: float,
    *,
    evaluation_batch_size: int,
    **tasks: Any,
) -> pd.DataFrame:
    """Sweep slices of rank 8 and the other methods at plain rates and at matched step sizes; a row a run.

    Args:
        work: a folder, where a sweep that was stopped goes on.
        rate: of the runs at matched step size, whose reference is the slice in the middle.
        tasks: task, retain, validation and workers of `spectra.training.sweep`.
    """
    settings = {
        "method": {"rank": 8, "targets": targets},
        "optimiser": {"steps": sizes.steps, "batch_size": sizes.batch_size, "schedule": "cosine", "warmup": 0.1},
        "evaluation_batch_size": evaluation_batch_size,
        "device": "cpu",
    }
    plain = Grid(
        positions=sizes.positions,
        methods=("lora", "random", "full", "head"),
        learning_rates=sizes.rates,
        rates_of={"full": sizes.rates_of_full},
        seeds=sizes.seeds,
    )
    matched = Grid(
        positions=sizes.positions,
        methods=("random",),
        learning_rates=(rate,),
        seeds=sizes.seeds,
        match_step_size=0.5,
    )
    started = time.perf_counter()

    def tell(done: int, total: int, name: str) -> None:
        print(f"{done}/{total} after {time.perf_counter() - started:.0f} s: {name}", flush=True)

    grids = {"plain": plain, "matched": matched}
    tables = [
        sweep(settings, grid, out=work / name, base=base, progress=tell, **tasks).runs for name, grid in grids.items()
    ]
    return pd.concat(tables, ignore_index=True)


def panels(table: pd.DataFrame, rate: float) -> Figure:
    """Score, forgetting, and how far the weights moved, against position: at one rate, at one size of the first steps,
    and at each slice's best rate. The last row shows what became of the steps that were matched.
    """
    figure = Figure(figsize=(7.2, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(QUANTITIES), 3, sharey="row", sharex=True)
    plots = SweepPlots(table)
    plots.tradeoff("fixed", rate=rate, quantities=QUANTITIES, ax=axes[:, 0])
    plots.tradeoff("matched", rate=rate, quantities=QUANTITIES, ax=axes[:, 1])
    plots.tradeoff("best", quantities=QUANTITIES, ax=axes[:, 2])
    titles = (f"One learning rate, {rate:g}", "First steps matched", "Best rate of each slice")
    named = {name: handle for ax in axes.flat for name, handle in legend_of(ax).items()}
    for column, title in zip(axes.T, titles, strict=True):
        said = set(DRAWN)
        for ax in column:  # what a legend says of some panels alone, such as a method that was not run, is title here
            notes = [title] * (ax is column[0]) + [name for name in legend_of(ax) if name not in said]
            said.update(notes)
            ax.set_title("\n".join(notes), fontsize=8, loc="left")
    for ax in axes.flat:
        tidy(ax)
    for ax in axes[:, 1:].flat:
        ax.set_ylabel("")
    for ax in axes[:-1].flat:
        ax.set_xlabel("")
    figure.align_ylabels(axes[:, 0])
    order = [name for name in DRAWN if name in named]
    handles = [named[name] for name in order]
    figure.legend(handles, order, loc="outside lower center", ncols=len(order), frameon=False, fontsize=8)
    return figure


def legend_of(ax: Axes) -> dict[str, Any]:
    """Label -> handle."""
    handles, labels = ax.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


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


def draw(name: str, about: str, data: Mapping[str, str], rate: float, run: Callable[..., pd.DataFrame]) -> None:
    """The command line: read the table of `name`, or make it by `run`, then write the pictures in both formats.

    Args:
        about: what the script does.   data: options that name folders of data, each with its help.
        run: called with those folders, the folder of the runs, whether it is to be quick, and the number of workers.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help=f"make {name}.csv first")
    for option, words in data.items():
        parser.add_argument(f"--{option}", type=Path, help=words)
    parser.add_argument("--work", type=Path, default=Path(f"{name.replace('_', '-')}-runs"), help="folder for the runs")
    parser.add_argument("--out", type=Path, help="folder of the table and the pictures; by default that of this script")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, for a look, below --work")
    parser.add_argument("--workers", type=int, help="processes; by default one a core")
    chosen = parser.parse_args()
    work = chosen.work / ("quick" if chosen.quick else "full")
    out = chosen.out or (work if chosen.quick else HERE)  # a quick look never replaces the numbers beside the script
    table = out / f"{name}.csv"
    if chosen.run:
        folders = [getattr(chosen, option) for option in data]
        if not all(folders):
            options = " and ".join(f"--{option}" for option in data)
            parser.error(f"--run needs {options}: folders of the packages that are named above")
        runs = run(*folders, work, chosen.quick, chosen.workers)
        out.mkdir(parents=True, exist_ok=True)
        runs.to_csv(table, index=False, float_format="%.6g")
    elif not table.exists():
        parser.error(f"{table} is not there; make it with --run")
    runs = pd.read_csv(table)
    write({name: panels(runs, rate), f"{name}_pareto": pareto(runs)}, out)

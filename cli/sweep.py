"""`spectra sweep`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .options import AsJson, Quiet
from .progress import progress_bar
from .train import assigned

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from rich.table import Table

    from spectra.training import Grid, Sweep


LEGEND = (
    "means over seeds; before, after: the score of the new task; lost: of the score of the base's own; update, sv x: "
    "as in `spectra compare`"
)
# What --set would leave as it is, since a sweep decides it, and what does say it.
INSTEAD = {
    "out": "--out",
    "seed": "--seeds",
    "method.name": "--methods",
    "method.position": "--positions",
    "method.start": "starts in the table sweep of the file",
    "optimiser.learning_rate": "--learning-rates",
}
MATCHED = "* the rate of the slice that the sizes of the first steps are matched to"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(sweep)


def sweep(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file: the settings of `spectra train`, and a table called sweep.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the sweep.")] = None,
    positions: Annotated[str | None, typer.Option(help="Slices, such as 0,0.25,0.5,1 (0 = largest values).")] = None,
    methods: Annotated[str | None, typer.Option(help="Other methods, such as lora,full,random,head.")] = None,
    learning_rates: Annotated[str | None, typer.Option(help="Of each of them, such as 1e-3,3e-3.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Of each of these, such as 0,1,2.")] = None,
    match_step_size: Annotated[
        float | None, typer.Option(help="Give the steps of all slices the size of those of the slice at this position.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of `spectra train`, such as optimiser.steps=200. May be repeated."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Runs at a time; by default one a core, or one a CUDA device. 0: in this process.", min=0),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Only show the sweep in --out again and redraw its pictures.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train every run of a grid of slices and methods, learning rates and seeds, and show what each learns and forgets.

    Settings come from CONFIG, then from flags. --out gets a folder a run, sweep_runs.parquet, which grows as runs end,
    and the pictures tradeoff.png and pareto.png. A sweep that was stopped goes on by the same command, and another grid
    of the same settings into the same folder adds to its table. Exit status 1: some of the runs failed.

    Examples:

      spectra sweep sweep.toml --out swept

      spectra sweep run.toml --positions 0,0.25,0.5,0.75,1 --methods lora,full --learning-rates 1e-3,3e-3 --out swept

      spectra sweep --plot --out swept
    """
    from spectra.errors import SpectraError
    from spectra.report.wording import counted
    from spectra.training import SweepInterrupted, TrainSettings, load_sweep, read_sweep_file
    from spectra.training import sweep as run_sweep

    if out is None:
        raise SpectraError("the sweep has no folder; give --out")
    if plot:
        result = load_sweep(out)
    else:
        chosen, grid = read_sweep_file(config) if config else (TrainSettings(), None)
        changes = dict(assigned(settings or ()))
        chosen = chosen.changed(changes, "the command line")
        flags = {
            "positions": _listed(positions, "positions", float),
            "methods": None if methods is None else methods.split(","),
            "learning_rates": _listed(learning_rates, "learning-rates", float),
            "seeds": _listed(seeds, "seeds", int),
            "match_step_size": match_step_size,
        }
        wanted = _grid(grid, flags)
        _check_idle(changes, wanted)
        with progress_bar(quiet or as_json, "sweeping") as progress:
            try:
                result = run_sweep(chosen, wanted, out=out, workers=workers, progress=progress)
            except SweepInterrupted as interruption:
                typer.echo(f"spectra: {interruption}", err=True)
                raise typer.Exit(130) from interruption
    drawn, why = _draw(result, out)
    if as_json:
        json.dump(json.loads(result.runs.to_json(orient="records")), sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif not quiet:
        console = Console()
        console.print(_table(result.runs))
        for line in _failures(result.runs):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        matched = [MATCHED] if result.runs["matched_position"].notna().any() else []
        words = f", the pictures {' and '.join(drawn)}" if drawn else ""
        for line in (f"the table is in {out}{words}", *([why] if why else []), LEGEND, *matched):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    failed = int((result.runs["status"] == "failed").sum())
    if failed and not plot:
        typer.echo(
            f"spectra: {failed} of {counted(len(result.runs), 'run')} failed; the same command tries them again",
            err=True,
        )
        raise typer.Exit(1)


def _listed(given: str | None, name: str, kind: Callable[[str], Any]) -> list[Any] | None:
    from spectra.errors import SpectraError

    if given is None:
        return None
    try:
        return [kind(part) for part in given.split(",")]
    except ValueError as error:
        raise SpectraError(f"--{name} {given!r} is no list of numbers; write them with commas, as 0,1") from error


def _grid(grid: Grid | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The grid of the file with the flags in its place."""
    given = {key: value for key, value in flags.items() if value is not None}
    mapping = grid.to_mapping() if grid is not None else {}
    if "positions" in given:
        mapping["starts"] = []
    return {**mapping, **given}


def _check_idle(changes: Mapping[str, Any], grid: Mapping[str, Any]) -> None:
    """Refuse --set of what the sweep decides; the learning rate is the settings' own where the grid has none."""
    from spectra.errors import SpectraError

    for key, instead in INSTEAD.items():
        if key in changes and (key != "optimiser.learning_rate" or grid.get("learning_rates")):
            raise SpectraError(f"--set {key} would change no run, since a sweep decides that itself; give {instead}")


def _table(runs: pd.DataFrame) -> Table:
    """A line per slice or method and learning rate: means over seeds."""
    import pandas as pd
    from rich.table import Table

    from spectra.report.wording import number

    finished = runs[runs["status"] == "finished"]
    table = Table(box=None, padding=(0, 1, 0, 0))
    columns = ("method", "position", "rate", "seeds", "before", "after", "lost", "update", "sv x")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    by = ["method", "position", "start", "learning_rate", "matched_position"]
    for _, rows in finished.groupby(by, dropna=False, sort=False):
        first = rows.iloc[0]
        where = "" if pd.isna(first["start"]) else f"from {first['start']}"
        where = where if pd.isna(first["position"]) else f"{first['position']:g}"
        means = (
            rows[name].mean()
            for name in ("score_before", "score", "forgetting", "relative_update", "diagonal_enrichment")
        )
        shown = (number(float(mean)) for mean in means)
        rate = f"{first['learning_rate']:g}" + ("" if pd.isna(first["matched_position"]) else "*")
        table.add_row(first["method"], where, rate, str(len(rows)), *shown)
    return table


def _failures(runs: pd.DataFrame) -> list[str]:
    failed = runs[runs["status"] == "failed"]
    return [f"{row['run']} failed: {row['reason']}" for row in failed.to_dict("records")]


def _draw(result: Sweep, folder: Path) -> tuple[list[str], str]:
    """Draw what the table has enough for. Returns: the names of the files, and why one is missing."""
    from spectra.atomic import replacing
    from spectra.errors import SpectraError

    def tradeoff() -> Axes:
        return result.plot.tradeoff()[0]

    drawn, why = [], ""
    for name, picture in {"tradeoff": tradeoff, "pareto": result.plot.pareto}.items():
        try:
            ax = picture()
        except SpectraError as error:
            why = f"{name}.png was not drawn: {error}"
            continue
        figure = ax.get_figure(root=True)
        assert figure is not None
        with replacing(folder / f"{name}.png") as path:
            figure.savefig(path, dpi=150, metadata={"Software": None})
        drawn.append(f"{name}.png")
    return drawn, why

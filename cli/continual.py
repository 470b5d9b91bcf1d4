"""`spectra continual`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .options import AsJson, Quiet
from .progress import progress_bar
from .train import assigned

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from spectra.training import Continual


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(continual)


def continual(
    config: Annotated[
        Path | None,
        typer.Argument(help="A TOML file: the settings of `spectra train`, and a table [tasks.NAME] for every task."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the sequence.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of `spectra train` that all tasks share. May be repeated."),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Only show the sequence in --out again and redraw its pictures.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Learn tasks one after another, each on the merged model that the last one left, and score them all each time.

    --out gets a folder a task, with its run and the body after it, the tables continual_evaluations.parquet and
    continual_drift.parquet, and the pictures scores.png and drift.png. A sequence that was stopped goes on by the same
    command, and may have got more tasks at its end.

    Examples:

      spectra continual tasks.toml --out learnt

      spectra continual tasks.toml --set method.position=1.0 --out learnt-last

      spectra continual --plot --out learnt
    """
    from spectra.errors import SpectraError
    from spectra.training import TrainingInterrupted, load_continual, read_continual_file
    from spectra.training import continual as learn

    if out is None:
        raise SpectraError("the sequence has no folder; give --out")
    if plot:
        result = load_continual(out)
    elif config is None:
        raise SpectraError("no tasks were given; name a TOML file with a table [tasks.NAME] for every task")
    else:
        chosen, tasks = read_continual_file(config)
        changes = dict(assigned(settings or ()))
        if "out" in changes:
            raise SpectraError("--set out would change nothing, since every task has a folder in --out; leave it out")
        chosen = chosen.changed(changes, "the command line")
        with progress_bar(quiet or as_json, "learning") as progress:
            try:
                result = learn(chosen, tasks, out=out, progress=progress)
            except TrainingInterrupted as interruption:
                place = f"after step {interruption.step} of the run in {interruption.folder}"
                typer.echo(f"spectra: interrupted {place}; the same command goes on from there", err=True)
                raise typer.Exit(130) from interruption
    if result.drift.empty:
        raise SpectraError(f"no task of the sequence in {out} is finished yet; go on with it, without --plot")
    _draw(result, out)
    summary = result.summary.merge(result.drift, on=["stage", "learnt"])
    if as_json:
        json.dump(
            {"summary": _records(summary), "evaluations": _records(result.evaluations)}, sys.stdout, indent=2
        )  # fmt: skip
        sys.stdout.write("\n")
    elif not quiet:
        console = Console()
        console.print(_table(summary))
        for line in (
            f"the tables are in {out}, the pictures scores.png and drift.png",
            "forgotten: of the best score that an earlier task had; lost: of what the base itself could do",
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _records(table: pd.DataFrame) -> list[dict[str, object]]:
    records: list[dict[str, object]] = json.loads(table.to_json(orient="records"))
    return records


def _table(summary: pd.DataFrame) -> Table:
    """A line per stage: what is known after it, and how far its weights are from the base's."""
    from rich.table import Table

    from spectra.report.wording import number

    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = {
        "average": "average_score", "transfer": "backward_transfer", "forgotten": "average_forgetting",
        "lost": "retained_forgetting", "update": "relative_update", "intruders": "intruders",
    }  # fmt: skip
    for place, column in enumerate(("stage", "learnt", *columns)):
        table.add_column(column, justify="left" if place == 1 else "right")
    for row in summary.to_dict("records"):
        values = (number(row[name]) for name in columns.values())
        table.add_row(str(row["stage"]), str(row["learnt"]), *values)
    return table


def _draw(result: Continual, folder: Path) -> None:
    from spectra.atomic import replacing

    for name, ax in {"scores": result.plot.scores(), "drift": result.plot.drift()}.items():
        figure = ax.get_figure(root=True)
        assert figure is not None
        with replacing(folder / f"{name}.png") as path:
            figure.savefig(path, dpi=150, metadata={"Software": None})

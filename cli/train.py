"""`spectra train`."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .options import AsJson, Quiet
from .progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from spectra.training import Run


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(train)


def train(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file of settings. Paths in it are relative to the current folder.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: a model folder, a cached hub id, or package.module:function.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="text-classification, image-classification, causal-lm or custom.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Training examples: a table, or a folder of images.")] = None,
    test: Annotated[
        str | None, typer.Option(help="Examples for the score; without, a fifth of --data is kept apart.")
    ] = None,
    retain: Annotated[
        str | None, typer.Option(help="Examples of the base's own task, to measure what is forgotten.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="slice, pissa, milora, random, lora, lora_ga, full, head, or peft:<init>."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    position: Annotated[
        float | None, typer.Option(help="Where the slice lies: 0 = largest singular values, 1 = smallest.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data, in the place of --steps; rounded up to whole steps.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a batch.")] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between scores; without, before and after training only.")
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(help="Steps between saved states, for --resume; without, after every tenth of the run."),
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="Steps between scored copies of what is trained, in folders step-N.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="What everything random is drawn from.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    shard: Annotated[
        bool | None,
        typer.Option("--shard", help="Several processes keep a share of each weight (FSDP); see torchrun, accelerate."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the run.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting, such as optimiser.schedule=cosine. May be repeated."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last saved state, at another --learning-rate if need be; a finished run is shown.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is in the folder.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a model on a slice of its singular components (or otherwise), and measure what it forgets.

    Settings come from CONFIG, then from flags, then from --set. The folder of the run gets the adapter (or the whole
    model), metrics.jsonl, summary.json, settings.json and, in comparison/, base and result as `spectra compare` holds
    them against each other.

    Examples:

      spectra train run.toml

      spectra train run.toml --position 0.25 --set optimiser.schedule=cosine --out runs/quarter

      spectra train --model base/ --data train.csv --method slice --position 0.5 --epochs 1 --out run
    """
    from spectra.training import TrainingInterrupted, TrainSettings
    from spectra.training import train as run_training
    from spectra.training.accelerating import is_first_process

    is_factory = model is not None and ":" in model and not Path(model).exists()
    flags = {
        "model.factory" if is_factory else "model.source": model,
        "task.kind": task,
        "data.train": data,
        "data.test": test,
        "retain.test": retain,
        "method.name": method,
        "method.rank": rank,
        "method.position": position,
        "optimiser.learning_rate": learning_rate,
        "optimiser.steps": steps,
        "optimiser.epochs": epochs,
        "optimiser.batch_size": batch_size,
        "evaluate_every": evaluate_every,
        "save_every": save_every,
        "keep_every": keep_every,
        "seed": seed,
        "device": device,
        "shard": shard,
        "out": str(out) if out else None,
    }
    changes = {key: value for key, value in flags.items() if value is not None} | dict(assigned(settings or ()))
    chosen = (TrainSettings.from_file(config) if config else TrainSettings()).changed(changes, "the command line")
    quiet = quiet or not is_first_process()
    with progress_bar(quiet or as_json, "training") as progress:
        try:
            run = run_training(chosen, resume=resume, force=force, progress=progress)
        except TrainingInterrupted as interruption:
            typer.echo(f"spectra: {interruption}", err=True)
            raise typer.Exit(130) from interruption
    if as_json and is_first_process():
        json.dump({"folder": str(run.folder), **run.summary}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif not quiet:
        console = Console()
        console.print(_table(run))
        for line in _places(run):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def assigned(given: list[str] | tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Keys and values of --set: a value is TOML, or else a string."""
    from spectra.errors import SpectraError

    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise SpectraError(f"--set {text!r} sets nothing; write key=value, such as method.rank=16")
        try:
            yield key.strip(), tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            yield key.strip(), value.strip()


def _table(run: Run) -> Table:
    """The new task and every retained one: before, after, and the change."""
    from rich.table import Table

    summary = run.summary
    words = {"accuracy": "accuracy", "log_likelihood": "log-likelihood, nats a token"}
    title = f"{summary['method']}: {summary['steps']} steps, {summary['trainable_parameters']:,} parameters trained"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("task")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    table.add_column("score")
    rows: dict[str, Mapping[str, Any]] = {
        "new": {"before": summary["score_before"], "after": summary["score"], "metric": summary["metric"]},
        **{f"retained ({name})" if name != "retain" else "retained": row for name, row in summary["retained"].items()},
    }
    for name, row in rows.items():
        before, after = row["before"], row["after"]
        change = None if before is None or after is None else after - before
        table.add_row(name, _decimal(before), _decimal(after), _decimal(change, "+"), words[row["metric"]])
    return table


def _decimal(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _places(run: Run) -> Iterator[str]:
    """What was decided on the way, where things lie, and how the update looks in a line."""
    yield from (f"note: {note}" for note in run.summary.get("notes", ()))  # of an older version: none
    yield f"{run.summary['seconds']:.1f} s on {run.summary['device']}, {run.summary['peak_memory_mib']:.0f} MiB at most"
    yield f"the {run.summary['result']} is in {run.result}, the numbers in {run.folder}"
    if (run.folder / "comparison").exists():
        yield f"how the weights moved: spectra report {run.folder / 'comparison'}"

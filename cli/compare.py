"""`spectra compare`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectra.errors import SpectraError

from .options import AsJson, Exclude, Include, Quiet, Transposed, Workers
from .output import check_writable, finish
from .progress import progress_bar

if TYPE_CHECKING:
    from spectra.report.sequence_table import Scores


MOST_GIB = 2**30  # more than any disk: what --cache-limit inf stands for


class Precision(enum.StrEnum):
    """Precision of the products."""

    auto = "auto"
    float32 = "float32"
    float64 = "float64"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(compare)


def compare(
    base: Annotated[
        str, typer.Argument(help="The base: a checkpoint file, a model folder, or a hub id that is in the local cache.")
    ],
    tuned: Annotated[
        list[str],
        typer.Argument(
            help="One or more tuned checkpoints, or PEFT adapter folders. All are held against one SVD of the base."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Write tables (Parquet), comparison.json, pictures and report.html into this folder."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    transposed: Transposed = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, or several as cuda:0,cuda:1.")] = "auto",
    dtype: Annotated[
        Precision, typer.Option(help="Precision of the products; auto is float32, float64 where the weights are.")
    ] = Precision.auto,
    slices: Annotated[int, typer.Option(help="Cut each matrix's components into so many slices.", min=1)] = 8,
    triplets: Annotated[
        int, typer.Option(help="Leading singular triplets of the tuned matrix held against the base.", min=1)
    ] = 10,
    epsilon: Annotated[
        float, typer.Option(help="A leading direction with no base cosine above this is an intruder.", min=0, max=1)
    ] = 0.5,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Iterate leading triplets of large matrices only: no ranks of dense updates then, no spectral shift.",
        ),
    ] = False,
    workers: Workers = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Keep the base's spectra in this folder: later runs with this base skip its SVD."),
    ] = None,
    cache_limit: Annotated[
        float, typer.Option(help="GiB in that folder; beyond it, the least recently used spectra go.", min=0)
    ] = 20,
    sequence: Annotated[
        bool,
        typer.Option("--sequence", help="The tuned checkpoints are in order (steps of a run, tasks): show the course."),
    ] = False,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="With --sequence: a CSV file with the columns label and score (of the new task), forgetting, or both. "
            "By default those that `spectra train` left beside the checkpoints.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(help="How many of the most changed matrices the table shows.", min=1)] = 15,
    pictures: Annotated[bool, typer.Option(help="Whether --out gets pictures and report.html.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Hold tuned checkpoints against their base, matrix by matrix, in the base's own singular basis.

    Shows which components kept their place and which carried the change, how far singular values moved and
    directions turned, the rank of the update, and whether new "intruder" directions appeared. What could not be
    compared is listed with the reason.

    Examples:

      spectra compare base.safetensors tuned.safetensors

      spectra compare base/ full/ lora-adapter/ --out result/

      spectra compare base.pt tuned.pt --include '*.mlp.*' --json

      spectra compare base/ run/checkpoint-* --sequence --out course/
    """
    if scores is not None and not sequence:
        raise SpectraError("--scores is of models in order; give --sequence with it")
    if cache is not None and not cache.strip():
        raise SpectraError("--cache is empty; give a folder, or leave it out")
    if out is not None:
        check_writable(out)
    sources, known, said = _in_order(tuned, scores) if sequence else (tuned, None, "")
    import torch

    from spectra.comparing import ComparisonInterrupted
    from spectra.comparing import compare as compare_checkpoints

    interrupted = False
    with progress_bar(quiet or as_json) as progress:
        try:
            result = compare_checkpoints(
                base,
                sources,
                include=include or (),
                exclude=exclude or (),
                transposed=transposed or None,
                device=device,
                dtype=None if dtype is Precision.auto else getattr(torch, dtype.value),
                slices=slices,
                top=triplets,
                epsilon=epsilon,
                fast=fast,
                workers=workers,
                cache=cache,
                cache_limit=int(min(cache_limit, MOST_GIB) * 2**30),
                progress=progress,
            )
        except ComparisonInterrupted as interruption:
            result, interrupted = interruption.comparison, True
    if sequence:
        from spectra.report.sequence_table import in_sequence

        result = in_sequence(result, known, [said])
    finish(result, out=out, pictures=pictures and not interrupted, as_json=as_json, quiet=quiet, top=top)
    if interrupted:
        typer.echo(f"spectra: interrupted; {_finished(len(result.layers), out)}", err=True)
        raise typer.Exit(130)


def _in_order(tuned: list[str], scores: Path | None) -> tuple[dict[str, str], Scores | None, str]:
    """The tuned models by label in the order of the sequence, their scores, and what is to be said of the order."""
    from spectra.labels import labelled
    from spectra.report.sequence_scores import scores_from
    from spectra.report.sequence_table import natural_order

    if len(tuned) < 2:
        raise SpectraError("--sequence is of several tuned checkpoints in order; give at least two")
    labels = list(labelled(tuned))
    order, said = natural_order(tuned, labels)
    known = None if scores is None else scores_from(scores, labels)
    return {labels[at]: tuned[at] for at in order}, known, said


def _finished(rows: int, out: Path | None) -> str:
    where = f"are in {out}" if out else "were shown above (give --out to keep them)"
    return f"the {rows} matrices that were finished {where}"

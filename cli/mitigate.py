"""`spectra mitigate`."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from .edit import finish_edit
from .intruders import Side
from .options import AsJson, Base, Cache, Exclude, ForceEdit, Include, OutEdit, Quiet, Transposed, TunedOne, Workers
from .progress import progress_bar


class Which(enum.StrEnum):
    """How many intruders of each matrix."""

    top = "top"
    all = "all"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(mitigate)


def mitigate(
    base: Base,
    tuned: TunedOne,
    out: OutEdit,
    factor: Annotated[
        float, typer.Option("--lambda", help="What intruders' singular values are multiplied by: 1 none, 0 removed.")
    ] = 0.7,
    which: Annotated[Which, typer.Option(help="The first intruder of each matrix, as published, or all.")] = Which.top,
    k: Annotated[int, typer.Option("--k", "-k", help="Leading directions that are looked at.", min=1)] = 10,
    epsilon: Annotated[
        float, typer.Option(help="A direction with no base cosine above this is an intruder.", min=0, max=1)
    ] = 0.5,
    side: Annotated[
        Side, typer.Option(help="Output directions (left), input directions (right), or both.")
    ] = Side.left,
    keep_spread: Annotated[
        bool, typer.Option("--keep-spread", help="Leave alone what only spread over a cluster of base directions.")
    ] = False,
    control: Annotated[
        bool,
        typer.Option("--control", help="Scale as many base directions instead, those of the nearest singular values."),
    ] = False,
    equal_change: Annotated[
        bool,
        typer.Option(
            "--equal-change",
            help="Of --control: choose its lambda for each matrix so that it changes as much as scaling intruders.",
        ),
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    transposed: Transposed = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    workers: Workers = None,
    cache: Cache = None,
    force: ForceEdit = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Scale the intruder dimensions of a tuned model, exactly, and write it in its own format.

    W'(lambda) = W' + (lambda - 1) sum s'_j y_j z_j^T over the intruders of each matrix. An adapter stays an adapter, of
    exact rank r + (number of intruders). Everything else is copied to the bit. The table counts intruders before and
    after: taking some out can bring others up. The control is weaker where intruders are stronger than every base
    direction: how much each of the two moves is said, and --equal-change makes it the same. Ends with status 1 where a
    matrix could not be edited.

    Examples:

      spectra mitigate base/ tuned/ --lambda 0.7 --which top --out mitigated/

      spectra mitigate base/ lora-adapter/ --lambda 0 --which all --out without-intruders/
    """
    from spectra.editing import mitigate as mitigate_checkpoint

    with progress_bar(quiet or as_json, "mitigating") as progress:
        result = mitigate_checkpoint(
            base, tuned, out, factor=factor, which=which.value, k=k, epsilon=epsilon, side=side.value,
            keep_spread=keep_spread, control=control, equal_change=equal_change, include=include or (),
            exclude=exclude or (), transposed=transposed or None, device=device, workers=workers, cache=cache,
            force=force, progress=progress,
        )  # fmt: skip
    finish_edit(result, as_json=as_json, quiet=quiet, is_control=control)

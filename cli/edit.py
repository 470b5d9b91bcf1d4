"""`spectra edit`."""

from __future__ import annotations

import enum
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from spectra.errors import SpectraError

from .options import AsJson, Base, Cache, Exclude, ForceEdit, Include, OutEdit, Quiet, Transposed, TunedOne, Workers
from .progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from spectra.editing import Edit, Edited

CHOICES = "--rank, --energy, --scale or --rewind"


class Keep(enum.StrEnum):
    """Which components of an update."""

    top = "top"
    bottom = "bottom"
    random = "random"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(edit)


def edit(
    base: Base,
    tuned: TunedOne,
    out: OutEdit,
    rank: Annotated[int | None, typer.Option(help="Cut each update to so many of its components.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Cut each update to the components that hold this share of its energy.")
    ] = None,
    keep: Annotated[
        Keep, typer.Option(help="Which components stay: the top ones, or as many others as a control.")
    ] = Keep.top,
    seed: Annotated[int | None, typer.Option(help="For --keep random; 0 by default.", min=0)] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Multiply each update, biases and norms too: 0 is the base, 1 the tuned one. What the base lacks "
            "stays tuned."
        ),
    ] = None,
    rewind: Annotated[bool, typer.Option("--rewind", help="Take weights back to the base.")] = False,
    components: Annotated[
        str | None, typer.Option(help="Rewind only what the update does to base components START:STOP.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            help="Rewind only these attention heads, with their biases, such as 0,3,5-7. A key and value go back only "
            "with all heads that share them."
        ),
    ] = None,
    head_size: Annotated[int | None, typer.Option(help="Size of a head, where no config.json says it.", min=1)] = None,
    layers: Annotated[str | None, typer.Option(help="Edit only these layers, such as 0,5-7.")] = None,
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
    """Edit the updates of a tuned model: truncate, scale, or rewind parts of it to the base.

    One edit a run. What is not edited is copied to the bit; an adapter stays an adapter. A matrix that cannot be
    edited is kept as it was, and the run ends with status 1.

    Examples:

      spectra edit base/ tuned/ --rank 16 --out truncated/

      spectra edit base/ tuned/ --energy 0.9 --keep random --seed 1 --out control/

      spectra edit base/ tuned/ --rewind --layers 0-3 --out rewound/

      spectra edit base/ tuned/ --rewind --components 0:64 --include '*.mlp.*' --out rewound/
    """
    what = _asked_for(rank, energy, keep, seed, scale, rewind, components, heads, head_size)
    numbers = None if layers is None else _numbers(layers, "--layers")
    from spectra.editing import edit as edit_checkpoint

    with progress_bar(quiet or as_json, "editing") as progress:
        result = edit_checkpoint(
            base, tuned, what, out, layers=numbers, include=include or (), exclude=exclude or (),
            transposed=transposed or None, device=device, workers=workers, cache=cache, force=force, progress=progress,
        )  # fmt: skip
    finish_edit(result, as_json=as_json, quiet=quiet)


def _asked_for(
    rank: int | None,
    energy: float | None,
    keep: Keep,
    seed: int | None,
    scale: float | None,
    rewind: bool,
    components: str | None,
    heads: str | None,
    head_size: int | None,
) -> Edit:
    """The one edit that the options mean."""
    from spectra.editing import Rewinding, Scaling, Truncation

    given = (rank is not None, energy is not None, scale is not None, rewind)
    if sum(given) != 1:
        raise SpectraError(f"one edit a run: give exactly one of {CHOICES}")
    if (components is not None or heads is not None) and not rewind:
        raise SpectraError("--components and --heads say what --rewind takes back; give it, too")
    if keep is not Keep.top and (scale is not None or rewind):
        raise SpectraError("--keep says which components --rank or --energy leaves; give one of them")
    if seed is not None and keep is not Keep.random:
        raise SpectraError("--seed draws the components of --keep random; give it, too, or leave the seed out")
    if head_size is not None and heads is None:
        raise SpectraError("--head-size says how large the heads of --heads are; give them, or leave the size out")
    if scale is not None:
        return Scaling(scale)
    if not rewind:
        return Truncation(rank, energy, keep.value, seed or 0)
    slice_ = None if components is None else _slice(components)
    return Rewinding(slice_, None if heads is None else _numbers(heads, "--heads"), head_size)


def _slice(text: str) -> tuple[int, int]:
    start, colon, stop = text.partition(":")
    if not (colon and start.strip().isdecimal() and stop.strip().isdecimal()):
        raise SpectraError(f"--components is {text!r}; give START:STOP, such as 0:64")
    return int(start), int(stop)


def _numbers(text: str, option: str) -> list[int]:
    """0,3,5-7 -> 0, 3, 5, 6, 7."""
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise SpectraError(f"{option} is {text!r}; give numbers and ranges, such as 0,5-7")
        if int(last or first) < int(first):
            which = "which" if piece == text else f"and {piece.strip()!r}"
            raise SpectraError(f"{option} is {text!r}, {which} runs backwards; give {last}-{first}")
        found += range(int(first), int(last or first) + 1)
    return found


def finish_edit(result: Edited, *, as_json: bool, quiet: bool, is_control: bool = False) -> None:
    """Print what an edit did, as a table or as JSON; status 1 where matrices failed, when all else is said.

    Args: is_control: of a mitigation, whether base directions were scaled in the place of intruders.
    """
    failed = result.matrices[result.matrices["status"] == "failed"]
    if as_json:
        rows = json.loads(result.matrices.to_json(orient="records", double_precision=15))
        content = {"folder": str(result.folder), "notes": list(result.notes), "matrices": rows}
        json.dump(content, sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif not quiet:
        console = Console(width=None if sys.stdout.isatty() else 200)  # in a pipe, names stay on one line
        if result.changed or len(failed):
            console.print(_table(result, is_control))
        for note in result.notes:
            console.print(note, markup=False, highlight=False)
        console.print(f"written to {result.folder}", markup=False, highlight=False)
    if len(failed):
        from spectra.report.wording import matrices, printable

        sys.stdout.flush()
        first = printable(str(failed["note"].iloc[0]))
        typer.echo(f"spectra: {matrices(len(failed))} could not be edited, and stayed as before: {first}", err=True)
        raise typer.Exit(1)


def _table(result: Edited, is_control: bool) -> Table:
    """A line per matrix that was edited or failed, and one for all."""
    from rich.table import Table
    from rich.text import Text

    from spectra.report.wording import matrices, number, printable

    rows = result.matrices
    counts = rows.intruders_before.notna().any()
    ranks = rows.rank_before.notna().any()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_footer=True, footer_style="bold")
    unchanged = len(rows) - result.changed
    table.add_column("matrix", f"{matrices(result.changed)} edited, {unchanged} as they were")
    for name, column in (("||D||", "update_norm"), ("change", "change_norm")):
        total = float((rows[rows.status == "edited"][column] ** 2).sum() ** 0.5)
        table.add_column(name, number(total), justify="right", no_wrap=True)
    if ranks:
        table.add_column("rank", justify="right", no_wrap=True)
    if counts:
        heads = {"before": "intruders before", "scaled": "base directions scaled" if is_control else "scaled"}
        for name in ("before", "scaled", "after", "appeared"):
            total = int(rows[f"intruders_{name}"].fillna(0).sum())
            table.add_column(heads.get(name, f"intruders {name}" if is_control else name), str(total), justify="right")
    if is_control:
        table.add_column("lambda", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows[rows.status != "unchanged"].to_dict("records"):
        cells = [printable(row["name"]), number(row["update_norm"]), number(row["change_norm"])]
        if ranks:
            cells.append(f"{_count(row['rank_before'])} -> {_count(row['rank_after'])}")
        if counts:
            cells += [_count(row[f"intruders_{name}"]) for name in ("before", "scaled", "after", "appeared")]
        if is_control:
            cells.append(number(row["control_lambda"]))
        said = f"failed: {row['note']}" if row["status"] == "failed" else row["note"]
        table.add_row(*(Text(cell) for cell in (*cells, printable(said))))
    return table


def _count(value: object) -> str:
    import pandas as pd

    return "-" if pd.isna(value) else str(value)  # type: ignore[call-overload]

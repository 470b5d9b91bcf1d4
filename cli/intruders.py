"""`spectra intruders`."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from spectra.errors import SpectraError

from .options import AsJson, Base, Cache, Exclude, Include, Quiet, Transposed, Workers
from .output import PICTURES, check_writable
from .progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from spectra.intrusion import Intrusion


class Side(enum.StrEnum):
    """Whose singular vectors."""

    left = "left"
    right = "right"
    both = "both"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(intruders)


def intruders(
    base: Base,
    tuned: Annotated[list[str], typer.Argument(help="One or more tuned checkpoints, or PEFT adapter folders.")],
    k: Annotated[int, typer.Option("--k", "-k", help="Leading directions of each tuned matrix.", min=1)] = 10,
    epsilon: Annotated[
        float, typer.Option(help="A direction with no base cosine above this is an intruder.", min=0, max=1)
    ] = 0.5,
    side: Annotated[
        Side, typer.Option(help="Output directions (left), input directions (right), or both.")
    ] = Side.left,
    include: Include = None,
    exclude: Exclude = None,
    transposed: Transposed = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, or several as cuda:0,cuda:1.")] = "auto",
    fast: Annotated[bool, typer.Option("--fast", help="Iterate the leading directions only.")] = False,
    workers: Workers = None,
    cache: Cache = None,
    out: Annotated[
        Path | None, typer.Option(help="Write tables, intruders.json and pictures into this folder.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many intruders the table shows.", min=1)] = 20,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find intruder dimensions: leading directions of the tuned weights that resemble none of the base's.

    As published (arXiv 2410.21228) for k = 10, epsilon = 0.5 and left vectors. An intruder marked "spread" is no new
    direction: it lies in the span of base directions of nearly equal singular values. Ends with status 1 where a matrix
    could not be searched.

    Examples:

      spectra intruders base/ tuned/

      spectra intruders base/ full/ lora-adapter/ --side both --out intruders/
    """
    if out is not None:
        check_writable(out)
    from spectra.intruding import find_intruders

    with progress_bar(quiet or as_json, "searching") as progress:
        result = find_intruders(
            base, tuned, k=k, epsilon=epsilon, side=side.value, include=include or (), exclude=exclude or (),
            transposed=transposed or None, device=device, fast=fast, workers=workers, cache=cache, progress=progress,
        )  # fmt: skip
    failed = result.matrices[result.matrices["status"] == "failed"]
    if len(failed) and len(failed) == len(result.matrices):
        raise SpectraError(f"no matrix could be searched, and nothing was written; {failed['note'].iloc[0]}")
    if out is not None:
        result.save(out)
        draw(result, out / PICTURES)
    if as_json:
        json.dump(as_plain(result), sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif not quiet:
        show(result, top)
    if len(failed):
        from spectra.report.wording import matrices, printable

        sys.stdout.flush()
        first = printable(str(failed["note"].iloc[0]))
        typer.echo(f"spectra: {matrices(len(failed))} could not be searched: {first}", err=True)
        raise typer.Exit(1)


def show(result: Intrusion, top: int) -> None:
    """Print the intruders least like the base, and their counts."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_table(result, top))
    for line in _said(result):
        console.print(line, markup=False, highlight=False)


def draw(result: Intrusion, folder: Path) -> None:
    """Write the pictures into `folder`: in each, a panel for every side that was looked at."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("epsilon", "k"):
        figure = Figure(figsize=(4.8 * len(result.sides), 3.6), layout="constrained")
        panels = figure.subplots(1, len(result.sides), squeeze=False, sharey=True).ravel()
        for side, ax in zip(result.sides, panels, strict=True):
            getattr(result.plot, name)(side=side, ax=ax)
        figure.savefig(folder / f"intruders_{name}.png", dpi=150)


def as_plain(result: Intrusion) -> dict[str, Any]:
    """The tables and notes as JSON knows them."""
    tables = {"counts": result.counts(), "intruders": result.intruders, "matrices": result.matrices}
    rows = {name: json.loads(table.to_json(orient="records", double_precision=15)) for name, table in tables.items()}
    return {**rows, "notes": result.provenance["notes"]}


def _table(result: Intrusion, top: int) -> Table:
    """The intruders least like the base, the strongest claims first."""
    from rich.table import Table
    from rich.text import Text

    from spectra.report.wording import number, printable

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("matrix")
    table.add_column("model")
    for name in ("side", "j", "s'_j", "best cosine", "random", "partner", "cluster"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in result.intruders.sort_values("best_cosine", kind="stable").head(top).to_dict("records"):
        table.add_row(
            Text(printable(row["name"])),
            Text(printable(row["tuned"])),
            row["side"],
            str(row["index"]),
            number(row["tuned_singular_value"]),
            number(row["best_cosine"]),
            number(row["cosine_null"]),
            str(row["partner"]),
            f"{number(row['cluster_cosine'])} of {row['cluster_members']}",
            "spread" if row["spread"] else "",
        )
    return table


def _said(result: Intrusion) -> Iterator[str]:
    from spectra.report.wording import counted, matrices, number, printable

    found = result.intruders
    for row in result.counts().to_dict("records"):
        own = found[(found["tuned"] == row["tuned"]) & (found["side"] == row["side"])]
        of_model = result.matrices[result.matrices["tuned"] == row["tuned"]]
        read = of_model[of_model["status"] != "failed"]
        looked_at = read[read[f"{row['side']}_intruders"].notna()]
        zero = len(read) - len(looked_at)
        of_side, most = f"{row['side']} directions", result.reach
        top = f"the top {row['k']} {of_side}" if most == row["k"] else f"all {of_side} (at most {most} of a matrix)"
        spread = int(own["spread"].sum())
        yield (
            f"{printable(row['tuned'])}: {counted(row['intruders'], 'intruder')} among {top}, in "
            f"{row['matrices_with_intruders']} of {matrices(len(looked_at))} (epsilon = {number(row['epsilon'], 2)})"
            + (f"; {spread} of them only spread over a cluster of base directions" if spread else "")
            + (f"; {matrices(zero)} beside, all zero before or after, without directions" if zero else "")
        )
    for row in result.matrices[result.matrices["status"] == "failed"].to_dict("records"):
        yield f"failed: {printable(row['name'])}: {row['note']}"
    yield from result.provenance["notes"]

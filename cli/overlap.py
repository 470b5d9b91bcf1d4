"""`spectra overlap`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .options import AsJson, Base, Exclude, Include, Quiet, Transposed, Workers
from .output import PICTURES, check_writable
from .progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from spectra.overlapping import Overlap


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(overlap)


def overlap(
    base: Base,
    tuned: Annotated[list[str], typer.Argument(help="One or more tuned checkpoints, or PEFT adapter folders.")],
    i: Annotated[int, typer.Option("--i", "-i", help="Leading directions of the first of each pair.", min=1)] = 10,
    j: Annotated[int | None, typer.Option("--j", "-j", help="Those of the second; by default as many.", min=1)] = None,
    include: Include = None,
    exclude: Exclude = None,
    transposed: Transposed = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, or several as cuda:0,cuda:1.")] = "auto",
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option(help="Write tables, overlap.json and pictures into this folder.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Hold the updates of tuned models against each other and the base: will these merge well?

    For each pair: the overlap phi of the leading output and input directions of the updates (1 = the same subspace),
    their smallest and largest principal angles, the cosine of the updates, and the share of the entries that both moved
    which they move the same way; each with what random updates would show. Updates near those do not touch, and a merge
    keeps both; where they share directions a merge adds up (positive cosine) or cancels (negative). The numbers are of
    whole updates. Where some matrices moved much further than the rest, as a retrained layer does, those without them
    are shown beside, with their own verdict where that is another one; --exclude takes matrices out altogether.

    Examples:

      spectra overlap base/ task-a/ task-b/ task-c/

      spectra overlap base/ full/ lora-adapter/ --out overlap/ -i 16
    """
    if out is not None:
        check_writable(out)
    from spectra.overlapping import overlap as measure_overlap

    with progress_bar(quiet or as_json, "comparing") as progress:
        result = measure_overlap(
            base, tuned, i=i, j=j, include=include or (), exclude=exclude or (), transposed=transposed or None,
            device=device, workers=workers, progress=progress,
        )  # fmt: skip
    if out is not None:
        result.save(out)
        draw(result, out / PICTURES)
    if as_json:
        json.dump(as_plain(result), sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif not quiet:
        show(result)


def show(result: Overlap) -> None:
    """Print two lines per pair, two more without what stands apart, what failed, what that says, and the notes."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    if len(result.pairs()):
        console.print(_table(result))
        console.print(_angles(result))
    for row in result.matrices[result.matrices["status"] == "failed"].to_dict("records"):
        console.print(f"failed: {row['name']}: {row['note']}", markup=False, highlight=False)
    for finding in result.diagnosis():
        console.print(str(finding), markup=False, highlight=False)
    for note in result.provenance["notes"]:
        console.print(note, markup=False, highlight=False)


def as_plain(result: Overlap) -> dict[str, Any]:
    """The tables and notes as JSON knows them."""
    without = result.pairs(outliers=False)
    tables = {
        "pairs": result.pairs(),
        "pairs_without_outliers": without[without["left_out"] > 0],
        "matrices": result.matrices,
    }
    rows = {name: json.loads(table.to_json(orient="records", double_precision=15)) for name, table in tables.items()}
    findings = [
        {"tuned": each.tuned, "text": each.text, "numbers": each.numbers, "matrices": each.matrices}
        for each in result.diagnosis()
    ]
    return {**rows, "findings": findings, "notes": result.provenance["notes"]}


def draw(result: Overlap, folder: Path) -> None:
    """Write the pictures into `folder`; none where there are no pairs of tuned models."""
    if len(result.labels) < 2 or (result.pairs()["first"] == "base").all():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for column in ("left_overlap", "right_overlap", "update_cosine", "sign_agreement"):
        result.plot.heatmap(column).figure.savefig(folder / f"{column}.png", dpi=150)  # type: ignore[union-attr]


def _table(result: Overlap) -> Table:
    """A line per pair, and one without what stands apart; in brackets what random updates would show."""
    from spectra.report.wording import number

    return _lines(
        result,
        {
            "left overlap": lambda row: _beside_null(row, "left_overlap"),
            "right overlap": lambda row: _beside_null(row, "right_overlap"),
            "cosine": lambda row: f"{number(row['update_cosine'], 2)} (+-{number(row['update_cosine_null'], 1)})",
            "same sign": lambda row: f"{number(row['sign_agreement'])} (0.5)" if row["sign_agreement"] >= 0 else "-",
        },
    )


def _angles(result: Overlap) -> Table:
    """A line per pair: smallest to largest principal angle in radians, 0 = a common direction, 1.57 = a right angle."""
    return _lines(
        result,
        {
            "matrices": lambda row: str(row["matrices"]),
            "left angles": lambda row: _from_to(row, "left"),
            "right angles": lambda row: _from_to(row, "right"),
        },
    )


def _from_to(row: Any, side: str) -> str:
    names = [f"{side}_{end}_angle{null}" for null in ("", "_null") for end in ("smallest", "largest")]
    return "{:.2f}-{:.2f} ({:.2f}-{:.2f})".format(*(row[name] for name in names)) if row[names[0]] >= 0 else "-"


def _beside_null(row: Any, name: str) -> str:
    from spectra.report.wording import number

    return f"{number(row[name], 2)} ({number(row[f'{name}_null'], 2)})" if row[name] >= 0 else "-"


def _lines(result: Overlap, columns: Mapping[str, Callable[[Any], str]]) -> Table:
    """A table of the pairs: who, then each column as it is written."""
    from rich.table import Table
    from rich.text import Text

    from spectra.report.wording import printable

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("first", "second"):
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    without = {(row["first"], row["second"]): row for _, row in result.pairs(outliers=False).iterrows()}
    for _, row in result.pairs().iterrows():
        names = (Text(printable(row[at])) for at in ("first", "second"))
        table.add_row(*names, *(write(row) for write in columns.values()))
        rest = without.get((row["first"], row["second"]))
        if rest is not None and rest["left_out"]:
            words = f"  without {rest['left_out']} that {'stands' if rest['left_out'] == 1 else 'stand'} apart"
            table.add_row(words, "", *(write(rest) for write in columns.values()))
    return table

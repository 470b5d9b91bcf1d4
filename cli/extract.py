"""`spectra extract`."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .options import AsJson, Base, Exclude, Include, Quiet, Transposed, Workers
from .progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


class FactorType(enum.StrEnum):
    """Dtype of the written factors."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Side(enum.StrEnum):
    """Whose names."""

    base = "base"
    tuned = "tuned"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(extract)


def extract(
    base: Base,
    tuned: Annotated[str, typer.Argument(help="The tuned model, merged into its base.")],
    out: Annotated[Path, typer.Option(help="The adapter's folder, for peft's PeftModel.from_pretrained.")],
    rank: Annotated[int | None, typer.Option(help="Truncate every update to at most this rank.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Truncate every update to the least rank with this share of its energy.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    transposed: Transposed = None,
    names: Annotated[
        Side, typer.Option(help="Whose module names the adapter bears, where base and tuned differ by a prefix.")
    ] = Side.base,
    dtype: Annotated[FactorType, typer.Option(help="Dtype of the written factors.")] = FactorType.float32,
    workers: Workers = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is in the folder.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write what fine-tuning did as a LoRA adapter of the base, in PEFT's format.

    Updates of exactly low rank, as a merged LoRA leaves them, are recognised from the rounding of their storage and
    written at their own rank. Others are left out, unless --rank or --energy asks to truncate them. The residual is
    what the adapter as written does not reproduce. Ends with status 1 where nothing could be written.

    Examples:

      spectra extract base/ merged/ --out adapter/

      spectra extract base/ tuned/ --out adapter/ --energy 0.9 --include '*.mlp.*' --dtype bfloat16
    """
    import torch

    from spectra.lora import extract as extract_adapter

    with progress_bar(quiet or as_json, "extracting") as progress:
        report = extract_adapter(
            base,
            tuned,
            out,
            rank=rank,
            energy=energy,
            dtype=getattr(torch, dtype.value),
            include=include or (),
            exclude=exclude or (),
            transposed=transposed or None,
            names=names.value,
            force=force,
            workers=workers,
            progress=progress,
        )
    if as_json:
        # Through pandas, which writes what JSON has no numbers for (NaN, NA) as null.
        rows = json.loads(report.to_json(orient="records", double_precision=15))
        json.dump({"folder": str(out), "notes": report.attrs["notes"], "tensors": rows}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif not quiet:
        console = Console(width=None if sys.stdout.isatty() else 200)  # in a pipe, names stay on one line
        console.print(_table(report))
        for note in (*_without_norms(report), *report.attrs["notes"]):
            console.print(note, markup=False, highlight=False)
    if not report.written.any():
        typer.echo(f"spectra: nothing was written to {out}; the reasons are in the table", err=True)
        raise typer.Exit(1)


def _table(report: pd.DataFrame) -> Table:
    """A line per matrix that changed, and one for all that were written."""
    from rich.table import Table
    from rich.text import Text

    from spectra.report.wording import counted, number, printable

    unchanged, written = report.reason == "unchanged", report[report.written]
    shown = report[report.update_norm.notna() & ~unchanged]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_footer=True, footer_style="bold")
    table.add_column("tensor", f"{counted(len(written), 'LoRA')} written, {int(unchanged.sum())} tensors unchanged")
    ranks = f"{written['rank'].min()} to {written['rank'].max()}" if len(written) else ""
    table.add_column("rank", ranks, justify="right", no_wrap=True)
    totals = [float((written[column] ** 2).sum() ** 0.5) for column in ("update_norm", "residual", "noise")]
    for name, total in zip(("||D||", "residual", "rounding"), totals, strict=True):
        table.add_column(name, number(total) if len(written) else "", justify="right", no_wrap=True)
    table.add_column("", f"{int(written.recognised.sum())} of exactly low rank", overflow="fold")
    for row in shown.itertuples():
        said = "; ".join(text for text in ("exactly low rank" if row.recognised else "", str(row.reason)) if text)
        cells = (
            str(row.name),
            "-" if not row.written else str(row.rank),
            number(float(row.update_norm)),  # type: ignore[arg-type]
            number(float(row.residual)),  # type: ignore[arg-type]
            number(float(row.noise)),  # type: ignore[arg-type]
            said,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _without_norms(report: pd.DataFrame) -> Iterator[str]:
    """A line per kind of reason for which tensors were not looked at as matrices."""
    from spectra.report.wording import counted, listed, pattern, printable

    rest = report[report.update_norm.isna() & (report.reason != "unchanged")]
    for _, group in rest.groupby(rest.reason.map(pattern), sort=False):
        names, reason = [str(name) for name in group.name], printable(str(group.reason.iloc[0]))
        yield f"{counted(len(names), 'tensor')} not carried ({reason}): {listed(names)}"

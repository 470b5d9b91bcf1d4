"""`spectra inspect`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from .options import AsJson


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(inspect)


def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint file, a model folder, an adapter folder, or a cached hub id.")
    ],
    as_json: AsJson = False,
) -> None:
    """List the tensors of a checkpoint: shapes, dtypes, roles, bytes, and what is no weight matrix and why.

    Only headers are read.
    """
    from spectra.inspecting import inspect_checkpoint

    listing = inspect_checkpoint(checkpoint)
    if as_json:
        json.dump(listing, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    from spectra.report.tables import inspect_table

    rows: list[dict[str, Any]] = listing["tensors"]
    console = Console(width=None if sys.stdout.isatty() else 200)  # in a pipe, names stay on one line
    console.print(inspect_table(rows))
    for note in listing["notes"]:
        console.print(note, markup=False, highlight=False)

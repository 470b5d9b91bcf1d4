"""`spectra report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .output import finish


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(report)


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `spectra compare --out` wrote.")],
    top: Annotated[int, typer.Option(help="How many of the most changed matrices the table shows.", min=1)] = 15,
    as_json: AsJson = False,
    pictures: Annotated[bool, typer.Option(help="Whether to draw the pictures and report.html again.")] = True,
) -> None:
    """Show a saved comparison again, and redraw its pictures. Needs none of the checkpoints."""
    from spectra.comparison import load

    finish(load(folder), out=folder, pictures=pictures, as_json=as_json, quiet=False, top=top)

"""`spectra report`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .output import finish, finish_shift


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(report)


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `spectra compare` or `covariance` wrote with --out.")],
    top: Annotated[int, typer.Option(help="How many of the most changed matrices the table shows.", min=1)] = 15,
    as_json: AsJson = False,
    pictures: Annotated[bool, typer.Option(help="Whether to draw the pictures and report.html again.")] = True,
) -> None:
    """Show a saved comparison or covariance shift again, and redraw its pictures. Needs none of the checkpoints.

    Where the folder holds both, both are shown; as JSON, the shift then stands under `covariance_shift`.
    """
    from spectra.comparison import load
    from spectra.shift import PROVENANCE, CovarianceShift

    has_shift = (folder / PROVENANCE).exists()
    has_comparison = not has_shift or (folder / "comparison.json").exists()
    both = has_shift and has_comparison
    if has_comparison:
        comparison = load(folder)
        finish(comparison, out=folder, pictures=pictures, as_json=as_json and not both, quiet=both and as_json, top=top)
    if has_shift:
        shift = CovarianceShift.load(folder)
        kept = tuple(shift.matrices.files) if shift.matrices else ()
        finish_shift(
            shift,
            out=folder,
            pictures=pictures,
            as_json=as_json and not both,
            quiet=both and as_json,
            top=top,
            matrices=kept,
        )
    if both and as_json:
        from spectra.report.shift_tables import shift_to_json
        from spectra.report.tables import to_json

        json.dump({**to_json(comparison, top), "covariance_shift": shift_to_json(shift, top)}, sys.stdout, indent=2)
        sys.stdout.write("\n")

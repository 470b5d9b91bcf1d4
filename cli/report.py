"""`spectra report`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from . import intruders, overlap
from .options import AsJson
from .output import PICTURES, as_plain, finish, finish_shift


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(report)


def report(
    folder: Annotated[
        Path, typer.Argument(help="A folder that compare, covariance, intruders or overlap wrote with --out.")
    ],
    top: Annotated[int, typer.Option(help="How many of the most changed matrices the table shows.", min=1)] = 15,
    as_json: AsJson = False,
    pictures: Annotated[bool, typer.Option(help="Whether to draw the pictures and report.html again.")] = True,
) -> None:
    """Show a saved result again, and redraw its pictures. Needs none of the checkpoints.

    Results of a comparison, a covariance shift, intruders and overlaps are shown, one after the other where the folder
    holds several. As JSON, those then stand under `covariance_shift`, `intruders` and `overlap`.
    """
    from spectra.shift import KIND

    files = {"covariance_shift": KIND.provenance, "intruders": "intruders.json", "overlap": "overlap.json"}
    there = [kind for kind, file in files.items() if (folder / file).exists()]
    has_comparison = not there or (folder / "comparison.json").exists()
    options = _Options(folder, top, pictures, as_json, alone=len(there) + has_comparison == 1)
    plain: dict[str, Any] = {}
    if has_comparison:
        plain |= _comparison(options)
    for kind in there:
        found = {"covariance_shift": _shift, "intruders": _intruders, "overlap": _overlap}[kind](options)
        if found:
            plain |= found if options.alone else {kind: found}
    if plain:
        json.dump(plain, sys.stdout, indent=2)
        sys.stdout.write("\n")


@dataclass(frozen=True)
class _Options:
    """What was asked for. Each kind of result is shown by a function that gives back what is to be printed as JSON.

    A result that is alone in its folder prints its own JSON where it can, as the command that made it does.
    """

    folder: Path
    top: int
    pictures: bool
    as_json: bool
    alone: bool


def _comparison(options: _Options) -> dict[str, Any]:
    from spectra.comparison import load

    result, silent = load(options.folder), options.as_json and not options.alone
    finish(
        result,
        out=options.folder,
        pictures=options.pictures,
        as_json=options.as_json and options.alone,
        quiet=silent,
        top=options.top,
    )
    return as_plain(result, options.top) if silent else {}


def _shift(options: _Options) -> dict[str, Any]:
    from spectra.report.shift_tables import shift_to_json
    from spectra.shift import CovarianceShift

    result, silent = CovarianceShift.load(options.folder), options.as_json and not options.alone
    finish_shift(
        result,
        out=options.folder,
        pictures=options.pictures,
        as_json=options.as_json and options.alone,
        quiet=silent,
        top=options.top,
        matrices=tuple(result.matrices.files) if result.matrices else (),
    )
    return shift_to_json(result, options.top) if silent else {}


def _intruders(options: _Options) -> dict[str, Any]:
    from spectra.intrusion import Intrusion

    result = Intrusion.load(options.folder)
    if options.pictures:
        intruders.draw(result, options.folder / PICTURES)
    if options.as_json:
        return intruders.as_plain(result)
    intruders.show(result, options.top)
    return {}


def _overlap(options: _Options) -> dict[str, Any]:
    from spectra.overlapping import Overlap

    result = Overlap.load(options.folder)
    if options.pictures:
        overlap.draw(result, options.folder / PICTURES)
    if options.as_json:
        return overlap.as_plain(result)
    overlap.show(result)
    return {}

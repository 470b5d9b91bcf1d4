"""Where results go: the folder of `--out`, checked before the work and filled after it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from spectra.errors import SpectraError

if TYPE_CHECKING:
    from spectra.comparison import Comparison
    from spectra.shift import CovarianceShift

PICTURES = "pictures"  # a folder of our own below --out, so that those of an earlier run can be cleared away


def check_writable(folder: Path) -> None:
    """Make the folder and a file in it, so that hours of work do not end at a missing permission."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".spectra-"):
            pass
    except OSError as error:
        raise SpectraError(
            f"cannot write into {folder}: {error.strerror or error}; choose another folder for --out"
        ) from error


def finish(result: Comparison, *, out: Path | None, pictures: bool, as_json: bool, quiet: bool, top: int) -> None:
    """Write the comparison into `out`, then print it: also where writing fails, which is raised afterwards."""
    failure: SpectraError | None = None
    if out is not None:
        try:
            _save(result, out, pictures)
        except SpectraError as error:
            failure, out = error, out if (out / "comparison.json").exists() else None
    _show(result, out, as_json, quiet, top)
    if failure is not None:
        raise failure


def _show(result: Comparison, out: Path | None, as_json: bool, quiet: bool, top: int) -> None:
    """Print the comparison as a table or as JSON."""
    from spectra.report.sequence_table import is_sequence

    if as_json:
        json.dump(as_plain(result, top), sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif not quiet and is_sequence(result):
        from spectra.report.sequence_printing import print_sequence

        print_sequence(result, Console(), out=out)
    elif not quiet:
        from spectra.report.tables import print_comparison

        print_comparison(result, Console(), top=top, out=out)
    sys.stdout.flush()


def as_plain(result: Comparison, top: int) -> dict[str, Any]:
    """The comparison as JSON knows it; of models in sequence also a row per model."""
    from spectra.report.sequence_printing import sequence_json
    from spectra.report.sequence_table import is_sequence
    from spectra.report.tables import to_json

    return to_json(result, top) | ({"sequence": sequence_json(result)} if is_sequence(result) else {})


def _save(result: Comparison, folder: Path, pictures: bool) -> None:
    """Write tables, pictures and the page. Tables first: they are what cannot be made again from the rest."""
    result.save(folder)
    if pictures:
        from spectra.report.page import write_page
        from spectra.report.plots import save_pictures

        try:
            drawn = save_pictures(result, folder / PICTURES)
            for earlier in set((folder / PICTURES).glob("*.png")) - set(drawn):
                earlier.unlink()
            write_page(result, folder, drawn)
        except OSError as error:
            raise SpectraError(
                f"the tables are complete in {folder}, but its pictures could not be written: "
                f"{error.strerror or error}; free some space and run `spectra report {folder}`"
            ) from error


def finish_shift(
    result: CovarianceShift,
    *,
    out: Path | None,
    pictures: bool,
    as_json: bool,
    quiet: bool,
    top: int,
    matrices: tuple[str, ...] = (),
) -> None:
    """Write the shift into `out`, then print it: also where writing fails, which is raised afterwards.

    Args:
        matrices: globs on the matrices whose Delta is kept; those of the pictures are kept too.
    """
    failure: SpectraError | None = None
    if out is not None:
        try:
            _save_shift(result, out, pictures, matrices)
        except SpectraError as error:
            failure, out = error, out if (out / "covariance_shift.json").exists() else None
    if as_json:
        from spectra.report.shift_tables import shift_to_json

        json.dump(shift_to_json(result, top), sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif not quiet:
        from spectra.report.shift_tables import print_shift

        print_shift(result, Console(), top=top, out=out)
    sys.stdout.flush()
    if failure is not None:
        raise failure


def _save_shift(result: CovarianceShift, folder: Path, pictures: bool, matrices: tuple[str, ...]) -> None:
    """Write tables, then pictures. Without them, those of another shift in the folder are cleared away."""
    from spectra.report.shift_plots import FOLDER, close_ups, save_shift_pictures
    from spectra.shift import KIND

    there = folder / KIND.provenance
    before = there.read_bytes() if there.exists() else b""
    result.save(folder, (*matrices, *close_ups(result)) if pictures else matrices)
    if not pictures and there.read_bytes() != before:
        for earlier in (folder / FOLDER).glob("*.png"):
            earlier.unlink()
    if pictures:
        try:
            drawn = save_shift_pictures(result, folder / FOLDER)
            for earlier in set((folder / FOLDER).glob("*.png")) - set(drawn):
                earlier.unlink()
        except OSError as error:
            raise SpectraError(
                f"the tables are complete in {folder}, but its pictures could not be written: "
                f"{error.strerror or error}; free some space and run `spectra report {folder}`"
            ) from error

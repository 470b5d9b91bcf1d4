"""The folder of a sweep: whether it may be gone on with, and the rows of the runs that are finished in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from spectra.errors import SpectraError
from spectra.training.place import check_examples, check_retained
from spectra.training.run import SUMMARY
from spectra.training.settings import TrainSettings
from spectra.training.sweep_grid import DECIDED
from spectra.training.sweep_result import KIND, load_sweep

RUNS, ROW = "runs", "row.json"


def begun(folder: Path, settings: TrainSettings, *, resume: bool) -> Mapping[str, Any] | None:
    """Make the folder. Returns: the provenance of the sweep that it holds, None where it holds none.

    Raises: SpectraError where that is not to be gone on with, is one of other settings, or is no sweep.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not KIND.begun_in(folder):
            return None
    except OSError as error:
        raise SpectraError(f"cannot write into {folder}: {error.strerror or error}; choose another folder") from error
    if not resume:
        raise SpectraError(f"{folder} holds a sweep already; go on with it, or choose another folder")
    there = load_sweep(folder).provenance
    changed = TrainSettings.from_mapping(there["settings"]).differences(settings)
    if different := [key for key in changed if key not in DECIDED]:
        raise SpectraError(
            f"{folder} holds a sweep with other settings ({', '.join(different[:5])}); "
            "choose another folder, or remove it"
        )
    return there


def check_finished(
    folder: Path, names: Iterable[str], retained: Collection[str], examples: Callable[[], Mapping[str, str]]
) -> None:
    """Refuse to put new runs beside finished ones that read other examples, or watched other tasks of the base's own.

    Args:
        names: of the finished runs.   retained: names of the tasks that new runs will watch.
        examples: gives the fingerprints of the files that they will read (`Built.fingerprints`).
    """
    now = cache(examples)
    for name in names:
        run = folder / RUNS / name
        try:
            summary = _read(run / SUMMARY, run)
        except FileNotFoundError as error:
            raise SpectraError(f"{run / SUMMARY} is missing; remove {run}, and its run is run again") from error
        check_retained(run, summary["retained"], retained)
        check_examples(run, summary.get("data_sha256"), now)


def finished_rows(folder: Path) -> dict[str, Mapping[str, Any]]:
    """The rows of all finished runs in the folder, by name, in the order of the names."""
    rows = {run.name: _finished_row(run) for run in sorted((folder / RUNS).glob("*")) if run.is_dir()}
    return {name: row for name, row in rows.items() if row is not None}


def _finished_row(run: Path) -> Mapping[str, Any] | None:
    """The row that a run left in its folder; None where it has not ended, or failed and is to be tried again."""
    try:
        row = _read(run / ROW, run)
    except FileNotFoundError:
        return None
    return row if row["status"] == "finished" else None


def _read(file: Path, run: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise SpectraError(f"{file} cannot be read ({error}); remove {run}, and its run is run again") from error
    return values

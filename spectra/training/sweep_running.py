"""`sweep`: every run of a grid, side by side, each in a folder of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import spectra
from spectra.atomic import replacing
from spectra.engines.local import available_cores
from spectra.errors import SpectraError
from spectra.report.wording import counted
from spectra.sources.libraries import first_line
from spectra.training.building import MakeTask, build, load_base
from spectra.training.run import Run
from spectra.training.running import train
from spectra.training.settings import SETTINGS, TrainSettings
from spectra.training.state import fingerprint, seeded
from spectra.training.sweep_folder import ROW, RUNS, begun, check_finished, finished_rows
from spectra.training.sweep_grid import MATCHED, Grid, PlannedRun, plan
from spectra.training.sweep_matching import matched_rates, start_sizes
from spectra.training.sweep_result import Sweep, spectral_columns, table_of
from spectra.training.sweep_workers import Died, Processes, run_here

if TYPE_CHECKING:
    from spectra.training.loop import Progress


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C during a sweep. `sweep` holds the runs that were finished; those under way saved their state."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        super().__init__(
            f"interrupted with {counted(len(sweep.runs), 'run')} done; the same sweep into {folder} goes on from there"
        )
        self.sweep, self.folder = sweep, folder


def sweep(
    settings: TrainSettings | Mapping[str, Any],
    grid: Grid | Mapping[str, Any],
    *,
    out: str | os.PathLike[str],
    base: nn.Module | None = None,
    task: MakeTask | None = None,
    retain: Mapping[str, MakeTask] | None = None,
    validation: Callable[[nn.Module], float] | None = None,
    workers: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Sweep:
    """Train every run of a grid of slices and methods, learning rates and seeds, and put their numbers in one table.

    Every run has a folder below `out`/runs, and `out`/sweep_runs.parquet is written anew as each of them ends. A sweep
    that was stopped, in whatever way, goes on when it is asked for again, and ends with the table (but for `seconds`)
    of one that was not. Runs that failed are rows with the reason, and are tried again then. Another grid of the same
    settings may be asked for in the same folder: runs of earlier ones stay in the table, after those of this one. The
    base is decomposed once, into the settings' `cache` (`out`/spectra by default).

    Args:
        settings: what all runs share, as of `train`; `out` and what the grid decides are not looked at.
        grid: `Grid`, or plain values of one.   out: the folder of the sweep.
        base, task, retain: as of `train`; functions must be importable, for they are sent to other processes.
        validation: gives a score of the trained model (the task's module with its new head) on examples that neither
            training nor the test uses; it becomes `validation_score`, by which the best learning rates are chosen.
        workers: processes, each with one BLAS thread; by default one a core, or one a CUDA device. 0: none, the runs
            follow each other in this process, which needs nothing to be importable.
        resume: False refuses a folder that holds a sweep.
        progress: called with (runs done, runs in all, the name of the last one).
    Raises: SpectraError for settings that do not fit the grid, for a folder with a sweep of other settings, on other
        examples or of another base, and where every run of the grid failed; SweepInterrupted (a KeyboardInterrupt) on
        Ctrl-C.
    Cost: beside the runs, one loading of the base, for its fingerprint, and where runs are finished already that read
        files, one of base and examples, for theirs.
    """
    settings = settings if isinstance(settings, TrainSettings) else TrainSettings.from_mapping(settings)
    grid = grid if isinstance(grid, Grid) else Grid.from_mapping(grid)
    folder = Path(out)
    cache = settings.cache or str(folder / "spectra")
    settings = replace(settings, out=None, cache=cache)
    planned = plan(settings, grid)
    if workers is not None and workers < 0:
        raise SpectraError(f"a sweep with {workers} workers cannot run; give 1 or more, or 0 for this process")
    there = begun(folder, settings, resume=resume)
    mark = _fingerprint(settings, base)
    if there is not None and "base_sha256" not in there:
        raise SpectraError(
            f"{folder} holds a sweep of an older version of spectra, which did not keep of which base it is; choose "
            "another folder"
        )
    if there is not None and there["base_sha256"] != mark:
        raise SpectraError(
            f"the runs in {folder} began with another base than the one given now; choose another folder, or remove it"
        )
    provenance = {
        "spectra": spectra.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.to_mapping(),
        "grid": grid.to_mapping(),
        "base_sha256": mark,
    }
    rows = finished_rows(folder)
    watched = [*(retain or (["retain"] if settings.retain else []))]  # as `build` calls them
    check_finished(folder, rows, watched, lambda: _examples(settings, base, task, retain))
    names = [run.name for run in planned]
    others = [name for name in rows if name not in names]

    def so_far() -> Sweep:
        return Sweep(table_of([rows[name] for name in (*names, *others) if name in rows]), provenance)

    def note(run: PlannedRun, row: Mapping[str, Any]) -> None:
        rows[run.name] = row
        so_far().save(folder)
        if progress:
            progress(len(rows) - len(others), len(planned), run.name)

    pending = [run for run in planned if run.name not in rows]
    work = _Work(folder, base, task, dict(retain) if retain else None, validation)
    so_far().save(folder)
    try:
        if workers == 0:
            _run(lambda jobs: run_here(work, jobs), pending, grid, note)
        elif pending:
            with Processes(work, _places(settings.device, workers, len(pending))) as processes:
                _run(processes.run, pending, grid, note)
    except KeyboardInterrupt as interruption:
        raise SweepInterrupted(so_far(), folder) from interruption
    if all(rows[name]["status"] == "failed" for name in names):
        what = f"all {len(planned)} runs of the sweep failed; the first" if len(planned) > 1 else "the only run failed"
        raise SpectraError(f"{what}: {rows[names[0]]['reason']}")
    return so_far()


def _fingerprint(settings: TrainSettings, base: nn.Module | None) -> str:
    """That of the base which the runs will have."""
    with seeded(0):  # weights that a folder lacks are drawn at random, the same for one folder
        return fingerprint(load_base(settings.model)[0] if base is None else base)


def _examples(
    settings: TrainSettings, base: nn.Module | None, task: MakeTask | None, retain: Mapping[str, MakeTask] | None
) -> dict[str, str]:
    """Fingerprints of the files that the runs will read."""
    with seeded(settings.seed):
        return build(settings, base=base, task=task, retain=retain or None).fingerprints()


def _run(
    run: Callable[[Sequence[Any]], Iterator[tuple[int, Any]]],
    pending: Sequence[PlannedRun],
    grid: Grid,
    note: Callable[[PlannedRun, Mapping[str, Any]], None],
) -> None:
    """Decompose the base and match step sizes, then run what is pending."""
    adapters = [planned for planned in pending if planned.settings.method.name in MATCHED]
    rates: Mapping[str, Mapping[str, float]] = {}
    if adapters:
        (_, answer), *_ = run([_Preparation(tuple(adapters), grid.match_step_size)])
        if isinstance(answer, SpectraError | Died):
            raise answer if isinstance(answer, SpectraError) else SpectraError(f"the sweep could not begin: {answer}")
        rates = answer
    jobs = [
        replace(planned, settings=planned.settings.changed({"optimiser.learning_rate_pattern": rates[planned.name]}))
        if planned.name in rates
        else planned
        for planned in pending
    ]
    for index, row in run(jobs):
        if isinstance(row, Died):
            row = {**jobs[index].place, "status": "failed", "reason": str(row)}
        note(pending[index], row)


@dataclass(frozen=True)
class _Preparation:
    """The first job: the base's spectra into the cache, and the rates of runs whose step sizes are matched."""

    runs: tuple[PlannedRun, ...]
    reference: float | None


@dataclass(frozen=True)
class _Work:
    """What a worker does, with what all runs share."""

    folder: Path
    base: nn.Module | None
    task: MakeTask | None
    retain: dict[str, MakeTask] | None
    validation: Callable[[nn.Module], float] | None

    def __call__(self, job: PlannedRun | _Preparation, place: str | None) -> Any:
        if isinstance(job, PlannedRun):
            return self._row(job, place)
        try:
            return self._prepared(job)
        except SpectraError as error:
            return error

    def _prepared(self, job: _Preparation) -> dict[str, dict[str, float]]:
        settings = job.runs[0].settings
        with seeded(settings.seed):
            task = build(settings, base=self.base, task=self.task, retain={}).task
            if job.reference is None:
                start_sizes(task, settings.method, settings.seed, settings.cache)
                return {}
            methods = {run.point: run.settings.method for run in job.runs}  # one for all rates and seeds
            patterns = settings.optimiser.learning_rate_pattern
            rates = matched_rates(task, methods, job.reference, patterns, settings.seed, settings.cache)
        return {run.name: rates[run.point] for run in job.runs}

    def _row(self, job: PlannedRun, place: str | None) -> dict[str, Any]:
        """Train one run and write its row. Whatever goes wrong in it is its own."""
        folder = self.folder / RUNS / job.name
        settings = replace(job.settings, out=str(folder), device=place or job.settings.device)
        anew = (folder / ROW).exists() or not (folder / SETTINGS).exists()  # it failed, or has not begun
        try:
            try:
                run = self._trained(settings, resume=not anew, force=anew)
                if self.validation is not None and run.model is None:  # it was stopped after its end, before its row
                    run = self._trained(settings, resume=False, force=True)
                row = {**job.place, "status": "finished", **_measured(run)}
                if self.validation is not None:
                    assert run.model is not None
                    row["validation_score"] = float(self.validation(run.model))
            except Exception as error:
                words = (
                    str(error) if isinstance(error, SpectraError) else f"{type(error).__name__}: {first_line(error)}"
                )
                row = {**job.place, "status": "failed", "reason": words.replace(str(folder), job.name)}
                folder.mkdir(parents=True, exist_ok=True)
            plain = {
                key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()
            }
            with replacing(folder / ROW) as path:
                path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            plain = {
                **job.place,
                "status": "failed",
                "reason": f"cannot write into {folder}: {error.strerror or error}",
            }
        return plain

    def _trained(self, settings: TrainSettings, *, resume: bool, force: bool) -> Run:
        return train(settings, base=self.base, task=self.task, retain=self.retain, resume=resume, force=force)


def _measured(run: Run) -> dict[str, Any]:
    summary = run.summary
    retained = summary["retained"].values()
    row = {
        "metric": summary["metric"],
        "score_before": summary["score_before"],
        "score": summary["score"],
        "loss": summary["loss"],
        "retained_before": _mean([scores["before"] for scores in retained]),
        "retained_after": _mean([scores["after"] for scores in retained]),
        "forgetting": summary["forgetting"],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "trainable_parameters": summary["trainable_parameters"],
    }
    return {**row, **(spectral_columns(run.comparison) if run.settings.compare else {})}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _places(device: str, workers: int | None, jobs: int) -> list[str | None]:
    """A place for every worker: the CUDA devices in turn where they are to be used, None (as the settings say) else."""
    devices: list[str | None] = [None]
    if device in ("auto", "cuda") and torch.cuda.is_available():
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    on_cpu = device == "cpu" or (
        device == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )
    count = workers or (available_cores() if on_cpu else len(devices))
    return [devices[index % len(devices)] for index in range(min(count, jobs))]

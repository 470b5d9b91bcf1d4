"""The folder of a run: what lies where, whether it may be written, and whether it is to be gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from spectra.atomic import replacing
from spectra.errors import SpectraError
from spectra.training.journal import METRICS
from spectra.training.run import ADAPTER, COMPARISON, MODEL, SUMMARY
from spectra.training.settings import ADJUSTABLE, SETTINGS, TrainSettings
from spectra.training.state import STATE

KEPT = "step-"
FILES = (SUMMARY, STATE, METRICS, SETTINGS)


def kept_folder(folder: Path, step: int) -> Path:
    """Where a run keeps what is trained as it stood after a step."""
    return folder / f"{KEPT}{step}"


@contextmanager
def reserved(folder: Path, settings: TrainSettings, *, resume: bool, force: bool) -> Iterator[None]:
    """Make the folder for the block, which writes into it; folders that it leaves empty in failing go again.

    Raises: SpectraError where it holds another run, this one but nobody asked to go on with it, other files, or what
        the run reads in a place that the run would write.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check(folder, settings, resume=resume, force=force)
        except OSError as error:
            raise _refused(folder, error) from error
        yield
    except BaseException:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # it holds what was computed
                break
        raise


def _check(folder: Path, settings: TrainSettings, *, resume: bool, force: bool) -> None:
    _check_inputs(folder, settings)
    if not (folder / SETTINGS).exists():
        _check_foreign(folder)
        if not force and any(folder.iterdir()):
            raise SpectraError(f"{folder} holds files that are no run; choose another folder, or --force to use it")
    elif not force:
        _check_same(folder, settings, resume=resume)


def claim(folder: Path, settings: TrainSettings, *, force: bool) -> None:
    """Write settings.json, after which the folder is this run's.

    What a killed run left half written is taken away before; with `force`, all that another run wrote.
    """
    try:
        if (folder / SETTINGS).exists():
            _sweep_up(folder)
        if force:
            _clear(folder)
        with replacing(folder / SETTINGS) as path:
            path.write_text(json.dumps(settings.to_mapping(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _refused(folder, error) from error


def _refused(folder: Path, error: OSError) -> SpectraError:
    return SpectraError(f"cannot write into {folder}: {error.strerror or error}; choose another folder for the run")


def _check_inputs(folder: Path, settings: TrainSettings) -> None:
    """Base and data must not lie where the run's own results will."""
    written = [path.resolve() for path in (*_written(folder), *(folder / name for name in FILES))]
    read = (settings.model.source, settings.data.train, settings.data.test, settings.retain and settings.retain.test)
    for source in read:
        if source and any(Path(source).resolve().is_relative_to(path) for path in written):
            raise SpectraError(
                f"the run reads {source}, which lies in its own folder {folder}, where it would be replaced; "
                "choose another folder for the run"
            )


def _check_foreign(folder: Path) -> None:
    """Where no run was, nothing may be taken away that has the name of what a run writes."""
    for path in (*_written(folder), *(folder / name for name in FILES)):
        if path.exists():
            raise SpectraError(
                f"{folder} holds {path.name!r}, which no run of this toolkit left there and a run would replace; "
                "move it away, or choose another folder"
            )


def _written(folder: Path) -> list[Path]:
    """The folders that a run makes in its own."""
    return [*(folder / name for name in (ADAPTER, MODEL, COMPARISON)), *folder.glob(f"{KEPT}[0-9]*")]


def _check_same(folder: Path, settings: TrainSettings, *, resume: bool) -> None:
    """The run that is there must be this one, and it must be meant to be gone on with."""
    finished = (folder / SUMMARY).exists()
    different, may_change = differing(folder, settings)
    if different and not (resume and may_change):
        remedy = "give --resume to go on with them from its last saved state" if may_change else "choose another folder"
        raise SpectraError(
            f"{folder} holds a run with other settings ({', '.join(different[:5])}"
            f"{', ...' if len(different) > 5 else ''}); {remedy}, or give --force to replace it"
        )
    if not resume:
        state, what = ("finished", "show it again") if finished else ("begun and not finished", "go on with it")
        raise SpectraError(f"{folder} holds this very run, {state}; give --resume to {what}, or --force to start anew")


def differing(folder: Path, settings: TrainSettings) -> tuple[list[str], bool]:
    """In which settings the run that is there is another one, and whether it may be gone on with in spite of them."""
    different = TrainSettings.from_file(folder / SETTINGS).differences(settings)
    return different, not (folder / SUMMARY).exists() and {*different} <= {*ADJUSTABLE}


def check_examples(place: Path, then: Mapping[str, str] | None, now: Callable[[], Mapping[str, str]]) -> None:
    """Refuse to put new numbers beside those in a place whose examples came from files that have changed since.

    Args:
        then: fingerprints of the files, by the settings that name them; None where none were kept.
        now: gives those of today; called where files were read then, or may have been.
    """
    if then is not None and not then:
        return  # functions made the examples
    today = now()
    if then is None and today:
        raise SpectraError(
            f"{place} is of an older version of spectra, which kept nothing that tells whether {' and '.join(today)} "
            "held the same examples then; choose another folder"
        )
    for name, mark in today.items():
        if then is not None and then.get(name) != mark:
            raise SpectraError(
                f"{name} holds other examples than those that {place} was made with; give those again, or choose "
                "another folder"
            )


def check_retained(place: Path, then: Collection[str], now: Collection[str]) -> None:
    """Refuse to put new numbers beside those in a place that were taken with other tasks of the base's own."""
    if {*then} != {*now}:
        before, after = (", ".join(map(repr, sorted(names))) or "none" for names in (then, now))
        raise SpectraError(
            f"of the base's own tasks, {place} was made with {before}, and now {after} is given; retain the same ones, "
            "or choose another folder"
        )


def finished(folder: Path) -> bool:
    """Whether a run ended here, whose last saved state is then taken away, where killing had left it."""
    if not (folder / SUMMARY).exists():
        return False
    with suppress(OSError):  # it may only be looked at
        (folder / STATE).unlink(missing_ok=True)
        _sweep_up(folder)
    return True


def _sweep_up(folder: Path) -> None:
    """Take away what was being written when a run was killed; see `spectra.atomic` for the names."""
    for name in (*FILES, ADAPTER, MODEL, COMPARISON, f"{KEPT}[0-9]*"):
        for path in folder.glob(f".{name}.*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Take away what a run writes, and nothing else; settings.json last, by which the rest is known as a run's."""
    for name in FILES:
        if name != SETTINGS:
            (folder / name).unlink(missing_ok=True)
    for place in _written(folder):
        shutil.rmtree(place, ignore_errors=True)
    (folder / SETTINGS).unlink(missing_ok=True)

"""The folder of a sequence of tasks: what lies where, what is finished in it, and whether it may be gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectra.atomic import replacing
from spectra.errors import SpectraError
from spectra.training.building import MakeTask
from spectra.training.continual_result import KIND, RETAINED, load_continual
from spectra.training.place import check_examples, check_retained, differing
from spectra.training.run import SUMMARY
from spectra.training.settings import SETTINGS, TrainSettings

STAGE, BODY, HEAD, RUN = "stage.json", "body.safetensors", "head.safetensors", "run"
_ELSE = "choose another folder, or remove this one and those after it"


@dataclass(frozen=True)
class Stage:
    """One task of the sequence: its name, its settings, and what makes it where the settings do not."""

    number: int
    name: str
    settings: TrainSettings
    task: MakeTask | None
    folder: Path


def begun(folder: Path, mark: str, *, resume: bool) -> None:
    """Make the folder. `mark`: fingerprint of the base.

    Raises: SpectraError where it holds a sequence that is not to be gone on with, or of another base, or none at all.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not KIND.begun_in(folder):
            return
    except OSError as error:
        raise SpectraError(f"cannot write into {folder}: {error.strerror or error}; choose another folder") from error
    if not resume:
        raise SpectraError(f"{folder} holds a sequence of tasks already; go on with it, or choose another folder")
    there = load_continual(folder).provenance
    if "base_sha256" not in there:
        raise SpectraError(
            f"{folder} holds a sequence of an older version of spectra, which did not keep with which base it began; "
            "choose another folder"
        )
    if there["base_sha256"] != mark:
        raise SpectraError(f"{folder} holds a sequence that began with another base; choose another folder")


def finished_stages(
    folder: Path,
    stages: Sequence[Stage],
    retained: Collection[str],
    examples: Callable[[Stage], Mapping[str, str]],
) -> list[dict[str, Any]]:
    """What the finished stages wrote, in their order; nothing is written here, and none is left out.

    Args:
        stages: those that are asked for.   retained: names of the tasks of the base's own that are to be scored.
        examples: gives the fingerprints of the files that a stage reads (`Built.fingerprints`).
    Raises: SpectraError where the folder holds tasks that are not asked for, or were learnt otherwise: with other
        settings, on other examples, or beside other tasks of the base's own. (`check_body` asks after which body.)
    """
    there = sorted((path.parent for path in folder.glob(f"*/{STAGE}")), key=_number)
    asked = {stage.folder: stage for stage in stages}
    for place in there:
        if place not in asked:
            raise SpectraError(
                f"{place} is finished and not among the tasks that are asked for now, which have to begin with all of "
                f"that folder that are finished ({', '.join(each.name for each in there)}); give those, and new ones "
                f"after them, or {_ELSE}"
            )
    count = len(there)
    if wrong := [stage for stage in stages[:count] if stage.folder not in there]:
        raise SpectraError(
            f"{there[-1]} is finished, and {wrong[0].folder} before it is not; remove {there[-1]}, or choose another "
            "folder"
        )
    finished = [_finished(stage, retained, examples) for stage in stages[:count]]
    for stage in stages[count:]:
        _check_begun(stage, examples)
    return finished


def _number(place: Path) -> tuple[int, str]:
    number = place.name.partition("-")[0]
    return int(number) if number.isdecimal() else 0, place.name


def _finished(
    stage: Stage, retained: Collection[str], examples: Callable[[Stage], Mapping[str, str]]
) -> dict[str, Any]:
    done = _read(stage.folder / STAGE)
    different = TrainSettings.from_mapping(done["settings"], str(stage.folder / STAGE)).differences(stage.settings)
    if different:
        raise SpectraError(
            f"{stage.folder} holds this task learnt with other settings ({', '.join(different[:5])}); {_ELSE}"
        )
    rows = [row for row in done["evaluations"] if row["stage"] == stage.number]
    check_retained(stage.folder, [row["task"] for row in rows if row["kind"] == RETAINED], retained)
    check_examples(stage.folder, done.get("data_sha256"), lambda: examples(stage))
    return done


def _check_begun(stage: Stage, examples: Callable[[Stage], Mapping[str, str]]) -> None:
    """A stage that is not finished may hold a run, which it goes on with."""
    run = stage.folder / RUN
    if not (run / SETTINGS).exists():
        return
    different, may_change = differing(run, stage.settings)
    if different and not may_change:
        raise SpectraError(
            f"{stage.folder} holds this task begun with other settings ({', '.join(different[:5])}); {_ELSE}"
        )
    if (run / SUMMARY).exists():

        def of_the_run() -> dict[str, str]:  # it watched no tasks of the base's own
            return {name: mark for name, mark in examples(stage).items() if not name.startswith("retain.")}

        check_examples(run, _read(run / SUMMARY).get("data_sha256"), of_the_run)


def check_body(stage: Stage, done: Mapping[str, Any], before: str) -> None:
    """Refuse a finished stage that began with another body than it would now, of the fingerprint `before`."""
    if "body_sha256" not in done:
        raise SpectraError(
            f"{stage.folder} is of an older version of spectra, which did not keep with which body it began; {_ELSE}"
        )
    if done["body_sha256"] != before:
        raise SpectraError(
            f"{stage.folder} holds this task learnt after other tasks than those that come before it now; {_ELSE}"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpectraError(f"{file} cannot be read ({error}); remove its folder and those after it") from error
    return values


def write_stage(stage: Stage, done: Mapping[str, Any]) -> None:
    """The stage's numbers, last of all: their being there says that it is finished."""
    with replacing(stage.folder / STAGE) as path:
        path.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")

"""`continual`: tasks one after another, each on the merged body that the last one left, all scored each time."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import spectra
from spectra.atomic import replacing
from spectra.comparing import compare
from spectra.errors import SpectraError
from spectra.lora import merge
from spectra.tensor_files import write_tensors
from spectra.training.accelerating import make_accelerator
from spectra.training.building import Built, MakeTask, build, load_base
from spectra.training.continual_folder import (
    BODY,
    HEAD,
    RUN,
    Stage,
    begun,
    check_body,
    finished_stages,
    write_stage,
)
from spectra.training.continual_result import NEW, RETAINED, Continual
from spectra.training.examples import in_turn
from spectra.training.run import ADAPTER
from spectra.training.running import train
from spectra.training.settings import SETTINGS, TrainSettings
from spectra.training.sharding import is_asked_for
from spectra.training.state import fingerprint, seeded
from spectra.training.sweep_result import spectral_columns
from spectra.training.tasks import Task, evaluate

if TYPE_CHECKING:
    from spectra.training.loop import Progress

RETAIN = "retain"  # what the task of the settings' [retain] is called
_SHARED = {"model", "retain", "out"}  # settings that a task cannot have for itself


def continual(
    settings: TrainSettings | Mapping[str, Any],
    tasks: Mapping[str, MakeTask | Mapping[str, Any]],
    *,
    out: str | os.PathLike[str],
    base: nn.Module | None = None,
    retain: Mapping[str, MakeTask] | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Continual:
    """Learn tasks one after another and score, after each, all that were learnt so far and what the base could do.

    Every task is one run of `train` on the body that the tasks before it left; its adapter is merged into that body,
    and its head is kept for it. So the body of stage t is the base plus the sum of t updates, to rounding. Slices are
    those of the body at hand, decomposed anew at each stage. A sequence that was stopped, in whatever way, goes on when
    it is asked for again, and may have got more tasks at its end. What is finished must be asked for as it was learnt,
    of one base and in one order, with the same settings, examples and tasks to retain; where it is not, that is refused
    before anything is written.

    Args:
        settings: what all tasks share, as of `train`.
        tasks: name -> function that makes a `Task` on the body, or settings in the place of the shared ones, as nested
            plain values: {"mail": {"data": {"train": "mail.csv"}}}.
        out: a folder; each stage has one in it, with its run, `body.safetensors`, `head.safetensors` and `comparison/`.
        base, retain: as of `train`.   progress: called with (steps done, steps in all, a word) by the run under way.
        resume: False refuses a folder that holds a sequence.
    Returns: `Continual`, which is also kept in `out` (`load_continual`).
    Raises: SpectraError for settings and folders that will not do, and where training diverges; TrainingInterrupted (a
        KeyboardInterrupt) on Ctrl-C.
    Cost: of stage t, one training, t evaluations, and one comparison with the base.
    """
    settings = settings if isinstance(settings, TrainSettings) else TrainSettings.from_mapping(settings)
    folder = Path(out)
    settings = replace(settings, out=None, compare=False, cache=settings.cache or str(folder / "spectra"))
    stages = [_stage(number, name, given, settings, folder) for number, (name, given) in enumerate(tasks.items(), 1)]
    if not stages:
        raise SpectraError("the sequence has no tasks; give at least one")
    own = retain if retain is not None else {RETAIN} if settings.retain else {}
    if both := [name for name in tasks if name in own]:
        raise SpectraError(
            f"{both[0]!r} names a task of the sequence and one of the base's own, whose scores stand in one table; "
            "give one of them another name"
        )
    base = copy.deepcopy(base) if base is not None else load_base(settings.model)[0]
    mark = fingerprint(base)
    begun(folder, mark, resume=resume)
    finished = finished_stages(folder, stages, own, lambda stage: _built(stage, base, retain).fingerprints())
    body = base
    for stage, done in zip(stages, finished, strict=False):
        check_body(stage, done, fingerprint(body))
        body = _body(stage, body)
    provenance = {
        "spectra": spectra.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.to_mapping(),
        "tasks": [stage.name for stage in stages],
        "base_sha256": mark,
    }
    evaluations = [row for done in finished for row in done["evaluations"]]
    drift = [done["drift"] for done in finished]
    result = _tabulated(evaluations, drift, provenance)
    result.save(folder)
    for stage in stages[len(finished) :]:
        before = fingerprint(body)
        _learn(stage, body, before, progress)
        body = _body(stage, body)
        done = {"body_sha256": before, **_looked_at(stages[: stage.number], base, body, retain)}
        write_stage(stage, done)
        evaluations += done["evaluations"]
        drift.append(done["drift"])
        result = _tabulated(evaluations, drift, provenance)
        result.save(folder)
    return result


def _stage(number: int, name: str, given: MakeTask | Mapping[str, Any], settings: TrainSettings, folder: Path) -> Stage:
    if not re.fullmatch(r"[\w.-]+", name):
        raise SpectraError(f"a task is called {name!r}; give names of letters, digits, dots and dashes")
    place = folder / f"{number}-{name}"
    own: dict[str, Any] = {"out": str(place / RUN)}
    for key, value in given.items() if isinstance(given, Mapping) else ():
        if key in _SHARED:
            raise SpectraError(f"the task {name!r} has its own {key}; all tasks share one, give it beside them")
        own |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, Mapping) else {key: value}
    make = None if isinstance(given, Mapping) else given
    chosen = settings.changed(own, f"the task {name!r}")
    if is_asked_for(chosen.shard):
        raise SpectraError("weights are not shared among processes (shard) in a sequence of tasks; leave shard out")
    return Stage(number, name, chosen, make, place)


def _learn(stage: Stage, body: nn.Module, before: str, progress: Progress | None) -> None:
    """Train a stage, and write what it makes of the body (whose fingerprint is `before`), and its head."""
    if (stage.folder / BODY).exists() and _began_with(stage.folder / BODY) == before:
        return
    folder = stage.folder / RUN
    anew = not (folder / SETTINGS).exists()
    options: dict[str, Any] = {"base": body, "task": stage.task, "retain": {}, "progress": progress}
    run = train(stage.settings, **options, resume=not anew, force=anew)
    if run.model is None:  # it was stopped between the end of training and the lines below
        run = train(stage.settings, **options, force=True)
    assert run.model is not None
    trained = merge(run.model, copy=False) if run.summary["result"] == ADAPTER else run.model
    shared, head = _shared(_built(stage, body, {}), body)
    state = trained.state_dict()
    _save({name: state[name] for name in head}, stage.folder / HEAD)
    _save({name: state[other] for name, other in shared.items()}, stage.folder / BODY, {"body_sha256": before})


def _shared(built: Built, body: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Which tensors of a task's model are the body's: body's name -> task's name; and the names of all others."""
    known = body.state_dict().keys()
    names = {id(tensor): name for name, tensor in built.base.state_dict(keep_vars=True).items() if name in known}
    shared, head = {}, []
    for name, tensor in built.task.model.state_dict(keep_vars=True).items():
        if id(tensor) in names:
            shared[names[id(tensor)]] = name
        else:
            head.append(name)
    return shared, head


def _built(stage: Stage, body: nn.Module, retain: Mapping[str, MakeTask] | None) -> Built:
    """The task of a stage on a copy of a body."""
    with seeded(stage.settings.seed):
        return build(stage.settings, base=body, task=stage.task, retain=retain)


def _body(stage: Stage, body: nn.Module) -> nn.Module:
    """A copy of the body with what the stage made of it."""
    following = copy.deepcopy(body)
    following.load_state_dict(_load_tensors(stage.folder / BODY), strict=False)
    return following


def _looked_at(
    stages: list[Stage], base: nn.Module, body: nn.Module, retain: Mapping[str, MakeTask] | None
) -> dict[str, Any]:
    """Scores of all tasks so far on the body of the last stage, and how far that is from the base."""
    last = stages[-1]
    rows = []
    if last.number == 1:
        rows += _own_scores(_built(last, base, retain), last, 0, None)
    for stage in stages:
        built = _built(stage, body, retain if stage is last else {})
        built.task.model.load_state_dict(_load_tensors(stage.folder / HEAD), strict=False)
        rows.append(_row(last.number, last.name, stage.name, NEW, built.task, stage))
    rows += _own_scores(built, last, last.number, last.name)
    found = compare(base, {last.name: body}, device=last.settings.device, cache=last.settings.cache)
    found.save(last.folder / "comparison")
    return {
        "settings": last.settings.to_mapping(),
        "data_sha256": built.fingerprints(),
        "evaluations": rows,
        "drift": {"stage": last.number, "learnt": last.name, **spectral_columns(found)},
    }


def _own_scores(built: Built, stage: Stage, number: int, learnt: str | None) -> list[dict[str, Any]]:
    return [_row(number, learnt, name, RETAINED, task, stage) for name, task in built.retained.items()]


def _row(number: int, learnt: str | None, name: str, kind: str, task: Task, stage: Stage) -> dict[str, Any]:
    from accelerate.utils import send_to_device  # type: ignore[import-untyped]

    accelerator = make_accelerator(stage.settings, stage.folder)
    task.model.to(accelerator.device)
    batches = in_turn(task.test, stage.settings.evaluation_batch_size)
    on_device = (send_to_device(batch, accelerator.device) for batch in batches)
    score = evaluate(task, on_device, accelerator.autocast)["score"]
    return {"stage": number, "learnt": learnt, "task": name, "kind": kind, "metric": task.metric, "score": score}


def _tabulated(
    evaluations: list[dict[str, Any]], drift: list[dict[str, Any]], provenance: Mapping[str, Any]
) -> Continual:
    import pandas as pd

    kinds = {"stage": "int64", "learnt": "str", "task": "str", "kind": "str", "metric": "str", "score": "float64"}
    columns = {name: pd.Series([row[name] for row in evaluations], dtype=kind) for name, kind in kinds.items()}
    return Continual(pd.DataFrame(columns), pd.DataFrame(drift), provenance)


def _save(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    own = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    try:
        with replacing(file) as path:
            write_tensors(own, path, metadata)
    except OSError as error:
        raise SpectraError(f"cannot write {file}: {error.strerror or error}; free some space and go on") from error


def _began_with(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return str((opened.metadata() or {}).get("body_sha256", ""))


def _load_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)

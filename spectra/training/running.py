"""`train`: one run from its settings to its summary."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import spectra
from spectra.atomic import replacing
from spectra.checkpoints import open_checkpoint
from spectra.comparing import compare
from spectra.errors import SpectraError
from spectra.linalg.svd import Spectrum
from spectra.lora import attachment
from spectra.lora.saving import class_names
from spectra.pairing import pair
from spectra.training.accelerating import make_accelerator, peak_memory
from spectra.training.building import Built, MakeTask, build
from spectra.training.examples import Batch, drawn, examples_per_batch
from spectra.training.journal import Journal, Log, read_lines
from spectra.training.loop import Loop, Progress, TrainingInterrupted
from spectra.training.methods import METHODS, Preparation, adapter_config, full, head, method_named
from spectra.training.optimising import lost_steps, make_optimiser, steps_in_all
from spectra.training.place import claim, finished, kept_folder, reserved
from spectra.training.run import COMPARISON, SUMMARY, Run, load_run
from spectra.training.saving import save_result, save_trained
from spectra.training.settings import TrainSettings
from spectra.training.sharding import Sharded, is_asked_for
from spectra.training.state import STATE, draw_apart, fingerprint, load_state, seeded
from spectra.training.stopping import wish_to_stop

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

__all__ = ["METHODS", "TrainingInterrupted", "train"]


def train(
    settings: TrainSettings | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    base: nn.Module | None = None,
    task: MakeTask | None = None,
    retain: Mapping[str, MakeTask] | None = None,
    spectra: MutableMapping[str, Spectrum] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> Run:
    """Fine-tune a base, score the new task and what is left of the old one, and compare base and result.

    One seed decides everything that is random: a run repeats bit by bit on one machine, and a run that was killed and
    gone on with ends as one that was not (on a CPU; on other devices as far as their kernels are deterministic).

    Args:
        settings: `TrainSettings`, nested plain values, or a TOML file.   changes: some others in their place, tables as
            mappings: `train("run.toml", seed=1, method={"position": 0.5})`.
        base: a module in the place of `[model]`; it is copied and stays as it is.
        task, retain: functions that make a `Task` on the (copied) base, in the place of `[task]` and `[retain]`;
            retained tasks have a name each.
        spectra: name of module -> `Spectrum` of the base, filled and used again from run to run of a sweep.
        resume: go on from the last saved state where there is one, if need be at another learning rate or clip; a
            finished run is only read.
        force: replace a run that is in the folder `out`, once the first step of this one has succeeded.
        progress: called with (steps done, steps in all, a word) after every step.
    Returns: `Run`. Its summary holds metric, score_before, score, loss, best_score, best_step, retained (per task:
        before, after, forgetting = before - after), forgetting (their mean), steps, seconds, examples, classes (names
        by number, None where the model has none), parameters, trainable_parameters, peak_memory_mib, device, result
        (name of the folder), base_sha256, data_sha256 (of the files of examples), notes (what was decided on the way,
        a sentence each) and versions.
    Raises: SpectraError for settings, files or folders that will not do, and for a loss that is no longer finite (the
        last saved state stays); TrainingInterrupted (a KeyboardInterrupt) on Ctrl-C, after saving. A run that fails
        before its first step leaves nothing in its folder.
    """
    chosen = _settings(settings, changes)
    if chosen.out is None:
        raise SpectraError("the settings name no folder for the run; give out")
    if resume and force:
        raise SpectraError("resume goes on with a run and force replaces it; give one of them")
    folder = Path(chosen.out)
    method = method_named(chosen.method.name)
    if method not in (full, head):
        adapter_config(chosen.method)
    accelerator = make_accelerator(chosen, folder)
    is_first = accelerator.is_main_process
    with reserved(folder, chosen, resume=resume, force=force) if is_first else nullcontext():
        accelerator.wait_for_everyone()
        if finished(folder) and not force:
            return load_run(folder)
        saved = load_state(folder) if resume else None
        with seeded(chosen.seed):
            built = build(chosen, base=base, task=task, retain=retain)
            # A full fine-tuning overwrites the base; where that has a folder, the folder is read again instead.
            before = built.source or _weights(built, copied=method is full)
            mark = fingerprint(built.task.model)
            cache = Path(chosen.cache) if chosen.cache else None
            preparation = Preparation(chosen.seed, cache, spectra, lambda: _first_batches(built, chosen))
            model = method(built.task, chosen.method, preparation)
            log = _log(chosen, folder, accelerator, 0 if saved is None else saved["journal"], force)
            loop = _ready(chosen, folder, accelerator, built, model, mark, log, progress)
            draw_apart(chosen.seed, accelerator.process_index)
            if saved is not None:
                loop.restore(saved)
            _train(loop)
        result = ""
        with loop.whole():
            if is_first:
                result = save_result(folder, built.task, model, is_adapter=method not in (full, head))
        if is_first:
            if chosen.compare:
                _compare(chosen, before, folder / result, built.task.head)
            own = () if method in (full, head) else attachment(model).notes
            narrow = filter(None, [lost_steps(model)])
            _summarise(
                loop, result, class_names(built.task.model), (*built.notes, *own, *narrow, *loop.position.changes)
            )
            (folder / STATE).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        return Run(folder, chosen, json.loads((folder / SUMMARY).read_text(encoding="utf-8")), model)


def _settings(given: Any, changes: Mapping[str, Any]) -> TrainSettings:
    if given is None:
        settings = TrainSettings()
    elif isinstance(given, TrainSettings):
        settings = given
    elif isinstance(given, Mapping):
        settings = TrainSettings.from_mapping(given)
    else:
        settings = TrainSettings.from_file(given)
    return settings.changed(dict(_dotted(changes)))


def _dotted(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tables as dotted keys, so that a change of one setting leaves its neighbours."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and not key.endswith("_pattern"):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_batches(built: Built, settings: TrainSettings) -> list[Batch]:
    """The batches that training will begin with: what `lora_ga` takes its gradient from."""
    examples = built.task.train
    assert examples is not None
    size = examples_per_batch(examples, settings.optimiser.batch_size)
    indices = drawn(len(examples), settings.seed, 0, size * settings.method.gradient_batches)
    return [examples.batch(indices[start : start + size]) for start in range(0, len(indices), size)]


def _weights(built: Built, *, copied: bool) -> dict[str, Tensor]:
    """The weights before training, by the names that the result will have."""
    state = {name: value for name, value in built.task.model.state_dict().items() if isinstance(value, Tensor)}
    return {name: value.clone() for name, value in state.items()} if copied else state


def _ready(
    settings: TrainSettings,
    folder: Path,
    accelerator: Accelerator,
    built: Built,
    model: nn.Module,
    mark: str,
    log: Log,
    progress: Progress | None,
) -> Loop:
    """Everything on its device, the trained model wrapped by accelerate or shared among the processes."""
    retained, sharded = dict(built.retained), None
    models = [model, *(task.model for task in retained.values())]
    is_adapter = method_named(settings.method.name) not in (full, head)
    if is_asked_for(settings.shard):
        sharded = Sharded.over(accelerator, models, is_adapter=is_adapter)
    else:
        for module in models:
            module.to(accelerator.device)
    examples = built.task.train
    assert examples is not None
    steps = steps_in_all(settings.optimiser, len(examples), examples_per_batch(examples, settings.optimiser.batch_size))
    optimiser, task = make_optimiser(settings.optimiser, model), built.task.called_through(model)
    wrapped: nn.Module
    if sharded is None:
        wrapped, prepared = accelerator.prepare(model, optimiser)
    else:
        wrapped, prepared = model, accelerator.prepare(optimiser)
        task, retained = sharded.through(task), {name: sharded.through(each) for name, each in retained.items()}
    return Loop(
        settings, folder, accelerator, task, wrapped, prepared, retained, steps, mark, built.fingerprints(), log,
        progress=progress, sharded=sharded,
        keep=lambda step: save_trained(kept_folder(folder, step), built.task, model, is_adapter),
    )  # fmt: skip


def _log(settings: TrainSettings, folder: Path, accelerator: Accelerator, size: int, force: bool) -> Log:
    """The lines of the run, the first of which make the folder its own. `size`: of the journal that is gone on with."""

    def begin() -> Journal | None:
        journal = None
        if accelerator.is_main_process:
            claim(folder, settings, force=force)
            journal = Journal(folder, size)
        if settings.trackers:
            accelerator.init_trackers("spectra", config={"seed": settings.seed, "method": settings.method.name})
        return journal

    def track(values: Mapping[str, Any], step: int) -> None:
        if settings.trackers:
            accelerator.log(values, step=step)

    return Log(begin, track)


def _train(loop: Loop) -> None:
    try:
        with wish_to_stop() as stop:
            loop.run(stop)
    finally:
        loop.log.close()
        if loop.settings.trackers and loop.log.has_begun:
            loop.accelerator.end_training()


def _compare(settings: TrainSettings, base: Any, result: Path, new: tuple[str, ...]) -> None:
    """Hold the result against the base, but for the new head where it bears the name of the base's own."""
    before, after = open_checkpoint(base), open_checkpoint(result)
    names = [item.matrix.name for item in pair(before, after).pairs]
    found = compare(
        before,
        {settings.method.name: after},
        exclude=[name for name in names if any(name.startswith(f"{head}.") for head in new)],
        device=settings.device,
        cache=settings.cache,
    )
    found.save(result.parent / COMPARISON)


def _summarise(loop: Loop, result: str, classes: Sequence[str], notes: Iterable[str]) -> None:
    """Write summary.json, last of all: its being there says that the run is finished."""
    lines, position = read_lines(loop.folder), loop.position
    of = {name: [line for line in lines if line["split"] == name] for name in ("test", *loop.retained)}
    first, last = of["test"][0], of["test"][-1]
    retained = {
        name: {"before": of[name][0]["score"], "after": of[name][-1]["score"], "metric": task.metric}
        for name, task in loop.retained.items()
    }
    for scores in retained.values():
        before, after = scores["before"], scores["after"]
        scores["forgetting"] = None if before is None or after is None else before - after
    lost = [scores["forgetting"] for scores in retained.values()]
    model = loop.accelerator.unwrap_model(loop.model)
    sizes = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:  # what peft keeps of a module that it trains a copy of
            sizes[parameter.requires_grad] += parameter.numel()
    assert loop.task.train is not None
    summary = {
        "method": loop.settings.method.name,
        "metric": loop.task.metric,
        "score_before": first["score"],
        "score": last["score"],
        "loss": last["loss"],
        "best_score": position.best_score,
        "best_step": position.best_step,
        "retained": retained,
        "forgetting": None if not lost or None in lost else sum(lost) / len(lost),
        "steps": position.step,
        "seconds": round(position.seconds, 3),
        "examples": len(loop.task.train),
        "classes": list(classes) or None,
        "trainable_parameters": sizes[True],
        "parameters": sum(sizes.values()),
        "peak_memory_mib": round(peak_memory(loop.accelerator.device), 1),
        "device": str(loop.accelerator.device),
        "processes": loop.accelerator.num_processes,
        "result": result,
        "base_sha256": loop.fingerprint,
        "data_sha256": dict(loop.data),
        "notes": list(dict.fromkeys(notes)),
        "versions": {
            "spectra": spectra.__version__,
            **{name: version(name) for name in ("torch", "accelerate", "peft", "transformers")},
        },
    }
    try:
        with replacing(loop.folder / SUMMARY) as path:
            path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SpectraError(
            f"cannot write {loop.folder / SUMMARY}: {error.strerror or error}; free some space, then go on with "
            "--resume"
        ) from error

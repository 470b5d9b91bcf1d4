"""The training loop: draw, step, look, save. Everything before it prepares; everything after it reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.report.wording import counted
from spectra.training.examples import Batch, drawn, examples_per_batch, in_turn, in_vain
from spectra.training.journal import Log
from spectra.training.optimising import learning_rate
from spectra.training.settings import ADJUSTABLE, TrainSettings
from spectra.training.settings_reading import flat
from spectra.training.sharding import Sharded, own_share, shared_state, whole_tensor, whole_tensors
from spectra.training.state import (
    moving_tensors,
    random_state,
    restore_random_state,
    restore_tensors,
    save_state,
    undrawn,
)
from spectra.training.tasks import Task, evaluate

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

Progress = Callable[[int, int, str], None]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C (or SIGTERM) while training, after the state was saved. `folder` is that of the run, `step` its last."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}; the state is in {folder}, --resume goes on from there")
        self.folder, self.step = folder, step


@dataclass
class Position:
    """Where a run stands. The data need no entry: what is drawn next follows from the seed and the step.

    `changes` says, a sentence each, from which step on a setting was another than that which the run began with.
    """

    step: int = 0
    seconds: float = 0.0
    best_score: float = float("-inf")
    best_step: int = 0
    changes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A run that is ready to go: everything is on its device, and `model` is the task's, wrapped by accelerate.

    `retained` are tasks that are only watched, by the names of their lines in the log. `data` are fingerprints of the
    files of examples, by the settings that name them. `keep` writes what is trained, at the steps that
    settings.keep_every names. `sharded`: what shares the weights among the processes, where they are shared.
    """

    settings: TrainSettings
    folder: Path
    accelerator: Accelerator
    task: Task
    model: nn.Module
    optimiser: Any  # accelerate's wrapper of a torch optimiser
    retained: Mapping[str, Task]
    steps: int
    fingerprint: str
    data: Mapping[str, str]
    log: Log
    progress: Progress | None = None
    keep: Callable[[int], None] | None = None
    sharded: Sharded | None = None
    position: Position = field(default_factory=Position)

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Train from where `position` stands to the last step. The log begins when the first step has succeeded.

        Raises: SpectraError where the model cannot be run on the data, where the loss is no longer finite, and where
            the disk is full; TrainingInterrupted where `stop` says so.
        """
        settings, position, task = self.settings, self.position, self.task.called_through(self.model)
        assert task.train is not None
        size = examples_per_batch(task.train, settings.optimiser.batch_size)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        started = time.perf_counter() - position.seconds
        last_loss = float("nan")
        save_every = ceil(self.steps / 10) if settings.save_every is None else settings.save_every
        self.optimiser.zero_grad()  # a base may come with gradients of its own training
        if position.step == 0:
            self._look(started)
        else:
            self.log.begin()
        while position.step < self.steps:
            step = position.step + 1
            rate = learning_rate(settings.optimiser, step, self.steps)
            for group in self.optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            # A step's loss is the mean over all its targets, however they are cut into batches and processes.
            batches = self._batches(step, size)
            count = self._targets(batches)
            if not count:
                raise SpectraError(f"no target of the training examples of step {step} counts; mend the labels")
            _train_mode(self.model)
            loss = torch.zeros((), device=self.accelerator.device)
            for number, batch in enumerate(batches, 1):
                waits = number < len(batches)  # processes exchange gradients once a step
                with self._exchanging(not waits):
                    with self.accelerator.autocast():
                        total, _, _ = task.losses(batch)
                    self.accelerator.backward(total * (self.accelerator.num_processes / count))
                loss += total.detach()
            mean = self._sum(loss).item() / count
            clip = settings.optimiser.clip or float("inf")
            norm = float(whole_tensor(self.accelerator.clip_grad_norm_(trained, clip)))
            if not isfinite(mean):
                raise self._diverged(step, rate, f"the loss became {mean}", last_loss)
            # In fp16 the gradient overflows now and then, and the step is then left out and the scale lowered.
            if not isfinite(norm) and settings.precision != "fp16":
                raise self._diverged(step, rate, f"the norm of the gradient became {norm}", last_loss)
            self.optimiser.step()
            self.optimiser.zero_grad()
            last_loss, position.step, position.seconds = mean, step, time.perf_counter() - started
            line = {"loss": mean, "learning_rate": rate, "gradient_norm": norm if isfinite(norm) else None}
            self.log.begin()
            self._write("train", line)
            keeping = settings.keep_every and _is_due(step, settings.keep_every, self.steps)
            if keeping or _is_due(step, settings.evaluate_every, self.steps):
                self._look(started)
            stopping = bool(self._sum(torch.tensor(float(stop()))).item())  # one process that is asked stops all
            saving = stopping or _is_due(step, save_every, self.steps)
            if (saving or keeping) and not self._all_finite(trained):
                raise self._diverged(step, rate, "a weight became infinite or NaN", last_loss)
            if saving and step < self.steps and not isfinite(next_loss := self._loss_of(step + 1, size)):
                following = learning_rate(settings.optimiser, step + 1, self.steps)
                raise self._diverged(step + 1, following, f"the loss became {next_loss}", last_loss)
            if keeping and self.keep is not None:
                with self.whole():
                    if self.accelerator.is_main_process:
                        self.keep(step)
            if saving:
                self._save()
            if self.progress:
                self.progress(step, self.steps, f"loss {mean:.3f}")
            if stopping and step < self.steps:
                raise TrainingInterrupted(self.folder, step)
        self.log.begin()  # of a run without steps, or one that was stopped after its last

    def whole(self) -> AbstractContextManager[None]:
        """What is saved of the model, for a block in which the first process writes it. All processes must enter."""
        return nullcontext() if self.sharded is None else self.sharded.gathered()

    def _exchanging(self, now: bool) -> AbstractContextManager[None]:
        """Whether the gradients of a block are added up over the processes."""
        if self.sharded is not None:
            return self.sharded.exchanging(now)
        waiting: AbstractContextManager[None] = nullcontext() if now else self.accelerator.no_sync(self.model)
        return waiting

    def _all_finite(self, parameters: Sequence[Tensor]) -> bool:
        wrong = sum(not bool(torch.isfinite(own_share(parameter)).all()) for parameter in parameters)
        return not self._sum(torch.tensor(float(wrong))).item()

    def _batches(self, step: int, size: int) -> list[Batch]:
        """The batches of a step that are this process's, on the device."""
        train, accumulate = self.task.train, self.settings.optimiser.accumulate
        assert train is not None
        accelerator = self.accelerator
        first = (step - 1) * size * accumulate
        chosen = drawn(len(train), self.settings.seed, first, first + size * accumulate)
        own = chosen[accelerator.process_index :: accelerator.num_processes]
        parts = (own[start : start + size] for start in range(0, len(own), size))
        return [_on(accelerator.device, train.batch(indices)) for indices in parts]

    def _loss_of(self, step: int, size: int) -> float:
        """The loss that a step begins with, without dropout: weights that give none are not worth saving.

        Where examples are drawn at random, the step itself draws them anew, as if nobody had looked.
        """
        with undrawn(self.accelerator.device):
            batches = self._batches(step, size)
            if not self._targets(batches):  # which the step itself refuses
                return 0.0
            return evaluate(self.task, batches, self.accelerator.autocast, self._sum)["loss"]

    def _targets(self, batches: Sequence[Batch]) -> float:
        """How many targets count in the batches of all processes."""
        return self._sum(torch.tensor(float(sum(self.task.counted(batch) for batch in batches)))).item()

    def _look(self, started: float) -> None:
        """Score the new task and the retained ones, one line each."""
        accelerator, position = self.accelerator, self.position
        for name, task in {"test": self.task, **self.retained}.items():
            size, processes = self.settings.evaluation_batch_size, accelerator.num_processes
            shares = in_turn(task.test, size, accelerator.process_index, processes)
            idle = in_vain(task.test, size, accelerator.process_index, processes) if self.sharded else ()
            found = evaluate(
                task,
                (_on(accelerator.device, batch) for batch in shares),
                accelerator.autocast,
                self._sum,
                idle=(_on(accelerator.device, batch) for batch in idle),
            )
            position.seconds = time.perf_counter() - started
            self._write(name, found)
            if name == "test" and found["score"] > position.best_score:
                position.best_score, position.best_step = found["score"], position.step

    def _write(self, split: str, values: Mapping[str, float | None]) -> None:
        self.log.write(self.position.step, split, values, round(self.position.seconds, 3))

    def _sum(self, value: Tensor) -> Tensor:
        """Added over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        reduced: Tensor = self.accelerator.reduce(value.to(self.accelerator.device), "sum")
        return reduced.cpu()

    def _save(self) -> None:
        scaler = self.accelerator.scaler
        states = [random_state(self.accelerator.device)]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object  # type: ignore[import-untyped]

            states = gather_object(states)
        # Weights that are shared are put together by all processes, and written by the first.
        tensors = whole_tensors(moving_tensors(self.accelerator.unwrap_model(self.model)))
        optimiser = whole_tensors(self.optimiser.state_dict())
        if self.log.journal is None:
            return
        values = {
            **vars(self.position),
            "adjustable": self._adjustable(),
            "fingerprint": self.fingerprint,
            "data": dict(self.data),
            "examples": len(self.task.train) if self.task.train is not None else 0,
            "journal": self.log.journal.size,
            "tensors": tensors,
            "optimiser": optimiser,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": states,
        }
        save_state(self.folder, values)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where the saved state stood, and note settings that are others now.

        Raises `SpectraError` where it is the state of another run, or of one on other data.
        """
        if state["fingerprint"] != self.fingerprint:
            raise SpectraError(
                f"the base is not the one that the run in {self.folder} started from; give that base, or --force"
            )
        for name, mark in self.data.items():
            if state["data"].get(name) != mark:
                raise SpectraError(
                    f"{name} holds other examples than those that the run in {self.folder} began with; give those "
                    "again, or --force to start anew"
                )
        if self.task.train is not None and state["examples"] != len(self.task.train):
            raise SpectraError(
                f"the run in {self.folder} began with {counted(state['examples'], 'training example')}, and now there "
                f"are {len(self.task.train)}; give the same data, or --force to start anew"
            )
        restore_tensors(self.accelerator.unwrap_model(self.model), state["tensors"])
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        self.optimiser.load_state_dict(shared_state(state["optimiser"], parameters))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == self.accelerator.num_processes:
            restore_random_state(state["random"][self.accelerator.process_index], self.accelerator.device)
        for name in vars(self.position):
            setattr(self.position, name, state[name])
        for name, value in self._adjustable().items():
            if (before := state["adjustable"][name]) != value:
                since = f"{name} is {value:g} from step {self.position.step + 1} on; it was {before:g} before"
                self.position.changes.append(since)

    def _adjustable(self) -> dict[str, float]:
        """The settings that a run may be gone on with otherwise."""
        settings = flat(self.settings.to_mapping())
        return {name: settings[name] for name in ADJUSTABLE}

    def _diverged(self, step: int, rate: float, what: str, last: float) -> SpectraError:
        state = self.folder / "state.pt"
        before = f"{last:.4g}" if isfinite(last) else "none in this run"
        if not self.log.has_begun:
            remedy = "start again with"
        elif state.exists() and not isfinite(last):
            remedy = f"the state in {state} diverges at once; start anew with --force and"
        elif state.exists():
            remedy = f"the last good state is in {state}; go on from there with --resume and"
        else:
            remedy = "no state had been saved yet; start again with --resume and"
        return SpectraError(
            f"{what} at step {step} (learning rate {rate:.3g}, last finite loss {before}); {remedy} "
            "a lower optimiser.learning_rate, or a tighter optimiser.clip"
        )


def _is_due(step: int, every: int | None, steps: int) -> bool:
    """Whether something that is done every so often, and after the last step, is done after this one."""
    return step == steps or bool(every and step % every == 0)


def _train_mode(model: nn.Module) -> None:
    """Dropout on; but a frozen batch norm keeps its statistics, which no adapter would carry."""
    model.train()
    for module in model.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and frozen:
            module.eval()


def _on(device: torch.device, batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _on(device, value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_on(device, value) for value in batch)
    return batch

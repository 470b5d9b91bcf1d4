"""The training loop: draw, step, look, save. Everything before it prepares; everything after it reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.training.examples import Batch, drawn, examples_per_batch, in_turn
from spectra.training.journal import Journal
from spectra.training.optimising import learning_rate
from spectra.training.settings import TrainSettings
from spectra.training.state import moving_tensors, random_state, restore_random_state, restore_tensors, save_state
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
    """Where a run stands. The data need no entry: what is drawn next follows from the seed and the step."""

    step: int = 0
    seconds: float = 0.0
    best_score: float = float("-inf")
    best_step: int = 0


@dataclass(frozen=True)
class Loop:
    """A run that is ready to go: everything is on its device, and `model` is the task's, wrapped by accelerate.

    `retained` are tasks that are only watched, by the names of their lines in the journal. `keep` writes what is
    trained, at the steps that settings.keep_every names.
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
    progress: Progress | None = None
    keep: Callable[[int], None] | None = None
    position: Position = field(default_factory=Position)

    def run(self, journal: Journal | None, stop: Callable[[], bool] = lambda: False) -> None:
        """Train from where `position` stands to the last step. `journal` is None in all processes but the first.

        Raises: SpectraError where the loss is no longer finite; TrainingInterrupted where `stop` says so.
        """
        settings, position, task = self.settings, self.position, self.task.called_through(self.model)
        assert task.train is not None
        size = examples_per_batch(task.train, settings.optimiser.batch_size)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        started = time.perf_counter() - position.seconds
        last_loss = float("nan")
        if position.step == 0:
            self._look(journal, started)
        while position.step < self.steps:
            step = position.step + 1
            rate = learning_rate(settings.optimiser, step, self.steps)
            for group in self.optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            # A step's loss is the mean over all its targets, however they are cut into batches and processes.
            batches = self._batches(step, size)
            count = self._sum(torch.tensor(float(sum(task.counted(batch) for batch in batches)))).item()
            if not count:
                raise SpectraError(f"no target of the training examples of step {step} counts; mend the labels")
            _train_mode(self.model)
            loss = torch.zeros((), device=self.accelerator.device)
            for number, batch in enumerate(batches, 1):
                waits = number < len(batches)  # processes exchange gradients once a step
                with self.accelerator.no_sync(self.model) if waits else nullcontext():
                    with self.accelerator.autocast():
                        total, _, _ = task.losses(batch)
                    self.accelerator.backward(total * (self.accelerator.num_processes / count))
                loss += total.detach()
            mean = self._sum(loss).item() / count
            clip = settings.optimiser.clip or float("inf")
            norm = float(self.accelerator.clip_grad_norm_(trained, clip))
            if not isfinite(mean):
                raise self._diverged(step, rate, f"the loss became {mean}", last_loss)
            # In fp16 the gradient overflows now and then, and the step is then left out and the scale lowered.
            if not isfinite(norm) and settings.precision != "fp16":
                raise self._diverged(step, rate, f"the norm of the gradient became {norm}", last_loss)
            self.optimiser.step()
            self.optimiser.zero_grad()
            last_loss, position.step, position.seconds = mean, step, time.perf_counter() - started
            line = {"loss": mean, "learning_rate": rate, "gradient_norm": norm if isfinite(norm) else None}
            self._write(journal, "train", line)
            keeping = settings.keep_every and _is_due(step, settings.keep_every, self.steps)
            if keeping or _is_due(step, settings.evaluate_every, self.steps):
                self._look(journal, started)
            stopping = bool(self._sum(torch.tensor(float(stop()))).item())  # one process that is asked stops all
            saving = stopping or _is_due(step, settings.save_every, self.steps)
            if (saving or keeping) and not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
                raise self._diverged(step, rate, "a weight became infinite or NaN", last_loss)
            if keeping and self.keep is not None and journal is not None:
                self.keep(step)
            if saving:
                self._save(journal)
            if self.progress:
                self.progress(step, self.steps, f"loss {mean:.3f}")
            if stopping and step < self.steps:
                raise TrainingInterrupted(self.folder, step)

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

    def _look(self, journal: Journal | None, started: float) -> None:
        """Score the new task and the retained ones, one line each."""
        accelerator, position = self.accelerator, self.position
        for name, task in {"test": self.task, **self.retained}.items():
            size = self.settings.evaluation_batch_size
            shares = in_turn(task.test, size, accelerator.process_index, accelerator.num_processes)
            found = evaluate(
                task, (_on(accelerator.device, batch) for batch in shares), accelerator.autocast, self._sum
            )
            position.seconds = time.perf_counter() - started
            self._write(journal, name, found)
            if name == "test" and found["score"] > position.best_score:
                position.best_score, position.best_step = found["score"], position.step

    def _write(self, journal: Journal | None, split: str, values: Mapping[str, float | None]) -> None:
        step, seconds = self.position.step, round(self.position.seconds, 3)
        if journal is not None:
            journal.write(step=step, split=split, **values, seconds=seconds)
        if self.settings.trackers:
            self.accelerator.log({f"{split}/{key}": value for key, value in values.items()}, step=step)

    def _sum(self, value: Tensor) -> Tensor:
        """Added over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        reduced: Tensor = self.accelerator.reduce(value.to(self.accelerator.device), "sum")
        return reduced.cpu()

    def _save(self, journal: Journal | None) -> None:
        scaler = self.accelerator.scaler
        states = [random_state(self.accelerator.device)]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object  # type: ignore[import-untyped]

            states = gather_object(states)
        if journal is None:
            return
        values = {
            **vars(self.position),
            "fingerprint": self.fingerprint,
            "examples": len(self.task.train) if self.task.train is not None else 0,
            "journal": journal.size,
            "tensors": moving_tensors(self.accelerator.unwrap_model(self.model)),
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "random": states,
        }
        save_state(self.folder, values)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where the saved state stood. Raises `SpectraError` where it is that of another run."""
        if state["fingerprint"] != self.fingerprint:
            raise SpectraError(
                f"the base is not the one that the run in {self.folder} started from; give that base, or --force"
            )
        if self.task.train is not None and state["examples"] != len(self.task.train):
            raise SpectraError(
                f"the run in {self.folder} began with {state['examples']} training examples, and now there are "
                f"{len(self.task.train)}; give the same data, or --force"
            )
        restore_tensors(self.accelerator.unwrap_model(self.model), state["tensors"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == self.accelerator.num_processes:
            restore_random_state(state["random"][self.accelerator.process_index], self.accelerator.device)
        for name in vars(self.position):
            setattr(self.position, name, state[name])

    def _diverged(self, step: int, rate: float, what: str, last: float) -> SpectraError:
        state = self.folder / "state.pt"
        kept = f"the last good state is in {state}" if state.exists() else "no state had been saved yet"
        before = f"{last:.4g}" if isfinite(last) else "none in this run"
        return SpectraError(
            f"{what} at step {step} (learning rate {rate:.3g}, last finite loss "
            f"{before}); {kept}; lower optimiser.learning_rate, or set optimiser.clip"
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

"""A task: a module, the batches it is shown, and what counts as loss and score on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import exp
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.sources.libraries import first_line
from spectra.training.examples import Batch, Examples, as_examples

Metric = Literal["accuracy", "log_likelihood"]


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a model called the usual way: mapping -> model(**batch) without labels, tuple -> model(first)."""
    if isinstance(batch, Mapping):
        output = model(**without_labels(batch))
    else:
        output = model(batch[0] if isinstance(batch, tuple | list) else batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise SpectraError(
            f"the model gives {type(output).__name__} without logits; give a model with a head, or a task whose "
            "`forward` returns the logits"
        )
    return logits


def without_labels(batch: Batch) -> Batch:
    """A mapping without its "labels"; anything else as it is."""
    return {name: value for name, value in batch.items() if name != "labels"} if isinstance(batch, Mapping) else batch


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch: its "labels", or the last of a tuple."""
    labels = (
        batch.get("labels") if isinstance(batch, Mapping) else batch[-1] if isinstance(batch, tuple | list) else None
    )
    if not isinstance(labels, Tensor):
        raise SpectraError('a batch holds no labels; give them under "labels", or as the last of a tuple')
    return labels


def next_token_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (N, T - 1, vocabulary) of all positions that have a next token."""
    return logits_of(model, batch)[:, :-1]


def next_tokens(batch: Batch) -> Tensor:
    """The next token at every position (N, T - 1), -100 where it is padding."""
    labels: Tensor = batch.get("labels", batch["input_ids"])
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    return labels[:, 1:]


def described(batch: Batch) -> str:
    """The shapes of a batch, for messages.

    >>> described({"input_ids": torch.zeros(8, 600), "labels": torch.zeros(8)})
    'input_ids 8 x 600, labels 8'
    """
    if isinstance(batch, Mapping):
        return ", ".join(f"{name} {described(value)}" for name, value in batch.items())
    if isinstance(batch, tuple | list):
        return ", ".join(map(described, batch))
    return " x ".join(map(str, batch.shape)) if isinstance(batch, Tensor) else type(batch).__name__


IGNORED = -100  # the target that does not count, as in torch's cross_entropy


@dataclass(frozen=True)
class Task:
    """What a run learns, or watches. Several tasks share one body: their `model`s hold the same modules.

    Attributes:
        model: the module that is called, head included.
        test: examples for the score: `Examples`, a mapping of equally long tensors, or an iterable of batches.
        train: examples to learn from; None for a task that is only watched.
        head: names, in `model`, of the modules that are new with this task: always trained, and saved whole.
        metric: "accuracy", the share of counted targets hit, or "log_likelihood", minus the mean loss in nats.
        forward: (model, batch) -> logits (..., classes).   targets: batch -> (...) of classes, -100 = not counted.
        tokenizer: what is saved beside the model, so that the folder serves again as a base.
    """

    model: nn.Module
    test: Examples
    train: Examples | None = None
    head: tuple[str, ...] = ()
    metric: Metric = "accuracy"
    forward: Callable[[nn.Module, Batch], Tensor] = logits_of
    targets: Callable[[Batch], Tensor] = labels_of
    tokenizer: Any = None

    def __post_init__(self) -> None:
        for name in ("test", "train"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, as_examples(given, f"`{name}` of the task"))

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the losses (float32, differentiable), number of hits, number of counted targets of one batch.

        Raises: SpectraError where the model cannot be run on the batch, or its logits do not fit the targets.
        """
        try:
            logits, targets = self.forward(self.model, batch), self.targets(batch)
        except SpectraError:
            raise
        except Exception as error:  # models and tasks are the user's own, and may raise anything
            raise SpectraError(
                f"{type(self.model).__name__} cannot be run on a batch of {described(batch)}: "
                f"{type(error).__name__}: {first_line(error)}; give data that it takes, or mend the task"
            ) from error
        if logits.shape[:-1] != targets.shape:
            raise SpectraError(
                f"the model gives logits of shape {tuple(logits.shape)} for targets of shape {tuple(targets.shape)}; "
                "the logits must have one more dimension, the classes"
            )
        flat, wanted = logits.flatten(0, -2).float(), targets.flatten()  # (P, classes), (P,)
        counted = wanted != IGNORED
        if bool((wanted[counted] >= flat.shape[-1]).any()) or bool((wanted[counted] < 0).any()):
            raise SpectraError(
                f"labels reach from {int(wanted[counted].min())} to {int(wanted[counted].max())}, but the head has "
                f"{flat.shape[-1]} classes, numbered from 0"
            )
        hits = ((flat.argmax(-1) == wanted) & counted).sum()
        return F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum"), hits, counted.sum()

    def counted(self, batch: Batch) -> int:
        """How many targets of a batch count."""
        return int((self.targets(batch) != IGNORED).sum())

    def called_through(self, model: nn.Module) -> Task:
        """This task with `model` (an adapter around it, a distributed wrapper) in the model's place."""
        return replace(self, model=model)


def evaluate(
    task: Task,
    batches: Iterable[Batch],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
    idle: Iterable[Batch] = (),
) -> dict[str, float]:
    """Loss (mean over counted targets, nats) and score of a task, dropout off; a perplexity for language models.

    Sums run in float64; `reduce` adds them over processes. Batches of `idle` are run and not counted. The model's mode
    is as before afterwards.
    """
    modes = [(module, module.training) for module in task.model.modules()]
    task.model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    try:
        with torch.no_grad():
            for batch in batches:
                with autocast():
                    sums = task.losses(batch)
                total += torch.stack([part.detach().cpu().double() for part in sums])
            for batch in idle:
                with autocast():
                    task.losses(batch)
    finally:
        for module, training in modes:
            module.training = training
    loss, hits, count = reduce(total).tolist()
    if not count:
        raise SpectraError("no target of the test examples counts, so there is nothing to score")
    mean = loss / count
    if task.metric == "accuracy":
        return {"loss": mean, "score": hits / count}
    return {"loss": mean, "score": -mean, "perplexity": exp(mean) if mean < 700 else float("inf")}

"""A small plain network with two heads on one body, and examples that each of them can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectra.training import Run, Task, TensorExamples, train


class Base(nn.Module):
    """A body of two linear layers and the head of its own task, four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 24)
        self.fc2 = nn.Linear(24, 16)
        self.classifier = nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc2(torch.relu(self.fc1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class WithNewHead(nn.Module):
    """The base's body under a new head of three classes, with dropout, whose random state resuming must restore."""

    def __init__(self, body: Base, dropout: float = 0.2) -> None:
        super().__init__()
        self.body, self.dropout, self.head = body, nn.Dropout(dropout), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body.features(x)))


def make_base() -> Base:
    torch.manual_seed(7)
    return Base()


def inputs() -> Tensor:
    return torch.randn(120, 12, generator=torch.Generator().manual_seed(3))


def new_task(base: nn.Module, dropout: float = 0.2) -> Task:
    """Which of three random directions is the largest."""
    assert isinstance(base, Base)
    x = inputs()
    labels = (x @ torch.randn(12, 3, generator=torch.Generator().manual_seed(4))).argmax(1)
    columns = {"x": x, "labels": labels}
    return Task(
        WithNewHead(base, dropout),
        train=TensorExamples({name: column[:90] for name, column in columns.items()}),
        test=TensorExamples({name: column[90:] for name, column in columns.items()}),
        head=("head",),
    )


def old_task(base: nn.Module) -> Task:
    """What the base itself said before training: its score starts at 1."""
    x = inputs()
    with torch.no_grad():
        return Task(base, test=TensorExamples({"x": x, "labels": make_base()(x).argmax(1)}))


def still_task(base: nn.Module) -> Task:
    """The new task without dropout, whose masks are drawn in each process."""
    return new_task(base, dropout=0.0)


def run_small(out: Path, changes: dict[str, Any] | None = None, *, still: bool = False, **others: Any) -> Run:
    """A short run on the small base; `changes` are settings as nested tables."""
    settings: dict[str, Any] = {
        "out": str(out),
        "compare": False,
        "method": {"name": "slice", "rank": 4, "position": 0.5},
        "optimiser": {"steps": 12, "learning_rate": 1e-2, "batch_size": 16, "warmup": 0.25},
    }
    for key, value in (changes or {}).items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) and key in settings else value
    task = still_task if still else new_task
    return train(settings, base=make_base(), task=task, retain={"old": old_task}, **others)


def method_settings(name: str) -> dict[str, Any]:
    """The settings of a method in its usual form: a slice in the middle, no position for all others."""
    rank = None if name in ("full", "head") else 4
    return {"name": name, "rank": rank, "position": 0.5 if name == "slice" else None}

"""Labels as a model expects them: class numbers, or numbers to predict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectra.errors import SpectraError
from spectra.sources.models import task_of

WITH_CLASSES = ("classification", "image-classification")


def label_tensor(
    values: Sequence[Any],
    config: Any,
    source: str,
    column: str,
    task: str | None = None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Labels of a table for a model with this configuration.

    Args:
        values: numbers of classes, or their names as in the model's `label2id`; for a model with a single output
            (a regression) numbers.
        source, column: where they come from, for messages.   task: the model's; by default what its config says.
        rows: of the values in the file, counted from 0, where not all rows are given; for messages.
    Returns: (N,) int64 classes, or float32 numbers for a regression.
    Raises: SpectraError that names the first row whose label does not do, counted from 1.

    >>> from types import SimpleNamespace
    >>> names = {"no": 0, "yes": 1}
    >>> config = SimpleNamespace(architectures=["BertForSequenceClassification"], num_labels=2, label2id=names)
    >>> label_tensor(["yes", 0], config, "a.csv", "label").tolist()
    [1, 0]
    """
    task = task or task_of(config, source)
    if task not in WITH_CLASSES:
        raise SpectraError(
            f"the column {column!r} of {source} has no use: a model for {task} takes no label a row; leave it out"
        )
    numbered = [(at + 1, value) for at, value in zip(range(len(values)) if rows is None else rows, values, strict=True)]
    if is_regression(config):
        return torch.tensor([_number(value, row, source, column) for row, value in numbered])
    names = class_numbers(config)
    count = int(config.num_labels)
    return torch.tensor(
        [_class(value, row, names, count, source, column) for row, value in numbered], dtype=torch.int64
    )


def is_regression(config: Any) -> bool:
    """Whether a classification head predicts numbers, as transformers decides it."""
    return getattr(config, "problem_type", None) == "regression" or int(getattr(config, "num_labels", 2)) == 1


def class_numbers(config: Any) -> dict[str, int]:
    """Name -> number of the classes of a model."""
    named = getattr(config, "label2id", None)
    return {str(name): int(number) for name, number in named.items()} if isinstance(named, Mapping) else {}


def _number(value: Any, row: int, source: str, column: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        return float(value)
    raise SpectraError(
        f"row {row} of {source} has {value!r} in the column {column!r}, where a regression needs a number; "
        "mend that row"
    )


def _class(value: Any, row: int, names: Mapping[str, int], count: int, source: str, column: str) -> int:
    if isinstance(value, str) and value in names:
        return names[value]
    is_whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
    if is_whole:
        if 0 <= int(value) < count:
            return int(value)
        raise SpectraError(
            f"row {row} of {source} has the label {value!r} in the column {column!r}, and the model's classes are "
            f"0 to {count - 1}; mend that row, or give the column of the right labels"
        )
    known = ", ".join(map(repr, list(names)[:6])) + (", ..." if len(names) > 6 else "")
    raise SpectraError(
        f"row {row} of {source} has {value!r} in the column {column!r}, which is none of the model's classes "
        f"({known}); mend that row, or number the classes as the model does"
    )

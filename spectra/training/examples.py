"""Examples by number: drawn for training in an order that the seed alone decides, read through for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from spectra.errors import SpectraError

Batch: TypeAlias = Any  # a mapping of tensors, a tuple of tensors or a tensor: whatever the task's `forward` takes


@runtime_checkable
class Examples(Protocol):
    """Examples that are put together into batches on demand."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """The examples of these numbers as one batch, on the CPU."""
        ...


@dataclass(frozen=True)
class TensorExamples:
    """Examples held in tensors whose first dimension counts them: {"pixel_values": (N, ...), "labels": (N,)}."""

    columns: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
            raise SpectraError(f"columns of examples must be of one length above 0; these are of {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Those rows of every column."""
        chosen = torch.as_tensor(indices, dtype=torch.long)
        return {name: column[chosen] for name, column in self.columns.items()}


@dataclass(frozen=True)
class ReadyBatches:
    """Batches that a factory has already put together: an example is a batch."""

    batches: Sequence[Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The one batch of that number."""
        (index,) = indices
        return self.batches[index]


def as_examples(given: Any, what: str) -> Examples:
    """Examples out of what a factory gave: examples, a mapping of equally long tensors, or an iterable of batches.

    Raises `SpectraError` naming `what` for anything else, and where there is no example.
    """
    if isinstance(given, Examples):
        examples = given
    elif isinstance(given, Mapping):
        examples = TensorExamples(given)
    elif isinstance(given, Iterable):
        examples = ReadyBatches(given if isinstance(given, Sequence) else list(given))
    else:
        raise SpectraError(f"{what} is {type(given).__name__}; give a mapping of tensors or an iterable of batches")
    if not len(examples):
        raise SpectraError(f"{what} is empty; give at least one example")
    return examples


def drawn(count: int, seed: int, start: int, stop: int) -> list[int]:
    """Examples number [start, stop) of the endless stream of shuffled epochs over `count` examples.

    A pure function: where a run stands in its data is the number of examples that it has drawn, nothing else.

    >>> sorted(drawn(5, seed=0, start=5, stop=10))
    [0, 1, 2, 3, 4]
    """
    indices: list[int] = []
    for epoch in range(start // count, -(-stop // count)):
        order = np.random.default_rng((seed, epoch)).permutation(count)
        first = epoch * count
        indices += order[max(start - first, 0) : stop - first].tolist()
    return indices


def in_turn(examples: Examples, batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """All examples in their own order, batch by batch; with several processes, every `ranks`-th batch."""
    size = examples_per_batch(examples, batch_size)
    for start in range(rank * size, len(examples), ranks * size):
        yield examples.batch(range(start, min(start + size, len(examples))))


def in_vain(examples: Examples, batch_size: int, rank: int, ranks: int) -> Iterator[Batch]:
    """The first batch again where `in_turn` gives this process one less than others, which wait for it to run one."""
    size = examples_per_batch(examples, batch_size)
    if rank >= -(-len(examples) // size) % ranks > 0:
        yield examples.batch(range(min(size, len(examples))))


def examples_per_batch(examples: Examples, batch_size: int) -> int:
    """`batch_size`, or 1 where an example is already a batch."""
    return 1 if isinstance(examples, ReadyBatches) else batch_size

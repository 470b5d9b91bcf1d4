"""Batches of a model's inputs, which may be gone through any number of times and come out the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Batches:
    """Samples in a fixed order, put together a batch at a time when they are asked for.

    Attributes:
        collate: makes a batch (tensors by name, samples along their first axis) of samples by their numbers.
        order: numbers of the samples in the order in which they come; rows of the source, counted from 0.
        batch_size: samples a batch; the last may have fewer.
        notes: what was decided on the way, a sentence each.

    >>> import torch
    >>> batches = Batches(lambda rows: {"x": torch.tensor(rows)}, (0, 2, 4), 2)
    >>> [batch["x"].tolist() for _ in range(2) for batch in batches], len(batches)
    ([[0, 2], [4], [0, 2], [4]], 2)
    """

    collate: Callable[[Sequence[int]], Batch]
    order: tuple[int, ...]
    batch_size: int
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return len(self.order)

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.order), self.batch_size):
            yield self.collate(self.order[start : start + self.batch_size])

"""A checkpoint as the rest of the house sees it: named tensors, described at once and loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank


class CheckpointError(SpectraError):
    """A checkpoint that cannot be read, or must not be."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor, before any of its bytes are read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the tensor's elements in memory."""
        return prod(self.shape) * self.dtype.itemsize


Index = tuple[int | slice, ...]
"""What is asked of a tensor, dimension by dimension from the first: `tensor[index]`, with slices that run forwards."""


@dataclass(frozen=True)
class Entry:
    """A tensor and the way to it. `load` and `part` may be called from any thread, any number of times.

    `load_part` loads `tensor[index]` at the cost of that part; None where it costs as much as the whole.
    """

    info: TensorInfo
    load: Callable[[], Tensor]
    load_part: Callable[[Index], Tensor] | None = None

    def part(self, index: Index) -> Tensor:
        """`load()[index]`, of which no more is read than need be."""
        return self.load()[index] if self.load_part is None else self.load_part(index)


@dataclass(frozen=True)
class LowRankInfo:
    """A low-rank update D (m x n) of the base tensor `name`, described before its factors are read."""

    name: str
    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LowRankEntry:
    """A low-rank update and the way to its factors."""

    info: LowRankInfo
    load: Callable[[], LowRank]


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of one model by name. Indexing loads one tensor, in its stored dtype, on the CPU.

    Attributes:
        source: what the user gave (a path, or a few words for an object in memory), for messages.
        files: every file that is read, for hashing; empty for an object in memory.
        config: the model's `config.json`; empty where there is none.
        tied: alias -> name, for tensors that share their storage with one of `tensors` and are not listed there.
        refused: name -> reason, for tensors that are there and cannot be used as weights (packed quantised bytes, ...).
        notes: what was decided on the way ("took 'state_dict' of 'epoch, optimizer, state_dict'"), one sentence each.
    """

    def __init__(
        self,
        source: str,
        entries: Mapping[str, Entry],
        *,
        files: tuple[Path, ...] = (),
        config: Mapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.files = files
        self.config: Mapping[str, Any] = config or {}
        self.tied: Mapping[str, str] = tied or {}
        self.refused: Mapping[str, str] = refused or {}
        self.notes = notes
        self._entries = dict(entries)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """What is known of each tensor without loading it, in the file's order."""
        return {name: entry.info for name, entry in self._entries.items()}

    def entry(self, name: str) -> Entry:
        """A tensor's description and the way to it, to be handed on without loading."""
        return self._entries[name]

    def described(self, source: str, **changes: Any) -> Self:
        """The same tensors under another `source` and with other `files`, `config`, `tied`, `refused` or `notes`.

        Names in `refused` are no longer among the tensors.
        """
        other = copy(self)
        vars(other).pop("tensors", None)  # what was cached here need not hold there
        vars(other).update(changes, source=source)
        other._entries = {name: entry for name, entry in self._entries.items() if name not in other.refused}
        return other

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name].load()

    def part(self, name: str, index: Index) -> Tensor:
        """`self[name][index]`, of which only the bytes from the part's first element to its last are read.

        One expert of a stack, or one of q | k | v, so costs its own size and not that of the tensor that holds it.

        >>> from spectra.checkpoints import open_checkpoint
        >>> stack = open_checkpoint({"experts.down_proj": torch.arange(24.0).reshape(2, 3, 4)})
        >>> stack.part("experts.down_proj", (1, slice(0, 2))).shape
        torch.Size([2, 4])
        """
        return self._entries[name].part(index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self)} tensors)"


class Adapter(Checkpoint):
    """Low-rank updates of a base, and the few tensors that the adapter replaces whole (as a `Checkpoint`).

    An update D is (out x in), so that y = (W + D) x, also where the base stores W transposed. Embeddings are the
    exception: theirs is (rows of the table x dim), as stored. Convolution kernels are flattened to (out x in*kh*kw).
    `config` is the adapter's own `adapter_config.json`.
    """

    def __init__(
        self, source: str, entries: Mapping[str, Entry], updates: Mapping[str, LowRankEntry], **described: Any
    ) -> None:
        super().__init__(source, entries, **described)
        self._updates = dict(updates)

    @cached_property
    def updates(self) -> dict[str, LowRankInfo]:
        """Base tensor name -> what is known of its update D without loading its factors."""
        return {name: entry.info for name, entry in self._updates.items()}

    def update(self, name: str) -> LowRank:
        """Load the factors of the update of base tensor `name`."""
        return self._updates[name].load()

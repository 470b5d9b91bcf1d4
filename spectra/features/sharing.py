"""Moments that are kept once where several modules receive the same tensor, as the projections of an attention do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from spectra.features.views import View


class Mergeable(Protocol):
    """Moments that can be added up."""

    def merge(self, other: Any) -> Self: ...

    def copy(self) -> Self: ...


Moments = TypeVar("Moments", bound=Mergeable)


@dataclass(frozen=True, eq=False)
class Event:
    """Tensors as they were when a module received them. Holding them keeps their memory from being used again."""

    tensors: tuple[Tensor, ...]
    view: View
    mask: Tensor | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_marks", tuple(_mark(tensor) for tensor in self.tensors))

    _marks: tuple[object, ...] = field(init=False)

    def is_same(self, other: Event) -> bool:
        """Whether both read the same memory, unchanged between the two, in the same way."""
        return None not in self._marks and (self._marks, self.view) == (other._marks, other.view) and (
            self.mask is other.mask
        )  # fmt: skip


class Shared(Generic[Moments]):
    """Moments of named streams: one for each distinct set of streams that received the same tensors.

    Two streams share while they are told the same tensors one after the other, and part without loss when they are not:
    what a stream has seen is the sum over the sets that it is in. Memory: the moments of each distinct set, which in a
    model whose every pass is alike are those of each distinct input; and those of the last tensor.
    """

    def __init__(self) -> None:
        self._sets: dict[frozenset[tuple[Hashable, int]], Moments] = {}
        self._last: tuple[Event, Moments, Counter[Hashable]] | None = None

    def add(self, stream: Hashable, event: Event, moments: Callable[[], Moments]) -> None:
        """Count an event for a stream. `moments` computes those of the event, where it is a new one."""
        if self._last is None or not self._last[0].is_same(event):
            self._flush()
            self._last = event, moments(), Counter()
        self._last[2][stream] += 1

    def of(self, stream: Hashable) -> Moments | None:
        """The moments of all that a stream has seen; those of others must not be changed through it. None: nothing."""
        self._flush()
        counted = ((moments, dict(streams).get(stream, 0)) for streams, moments in self._sets.items())
        found = [(moments, times) for moments, times in counted if times]
        if not found:
            return None
        if len(found) == 1 and found[0][1] == 1:
            return found[0][0]
        total = found[0][0].copy()
        for index, (moments, times) in enumerate(found):
            for _ in range(times - (index == 0)):
                total.merge(moments)
        return total

    def __len__(self) -> int:
        """How many moments are kept."""
        self._flush()
        return len(self._sets)

    def _flush(self) -> None:
        if self._last is not None:
            _, moments, streams = self._last
            key = frozenset(streams.items())
            if key in self._sets:
                self._sets[key].merge(moments)
            else:
                self._sets[key] = moments
            self._last = None


def _mark(tensor: Tensor) -> object:
    """Equal for views of the same memory that no operation has written to in between; None where that is not known."""
    if tensor.is_inference():  # counts no versions
        return None
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor._version

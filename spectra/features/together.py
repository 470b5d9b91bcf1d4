"""The cross-moments of what two models take in, sample by sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from spectra.features.accumulator import CrossAccumulator
from spectra.features.sharing import Event, Shared
from spectra.features.views import View


class Together:
    """The cross-moments of two models' inputs, while both run over the same batches one after the other.

    The base's inputs of one batch are held (a copy each) until the tuned model's come.

    Args: streams: (stream of the base, stream of the tuned model) that belong together.
    """

    def __init__(self, streams: Iterable[tuple[str, str]], dtype: torch.dtype) -> None:
        self._partners: dict[str, list[str]] = {}
        for base, tuned in dict.fromkeys(streams):
            self._partners.setdefault(tuned, []).append(base)
        self._dtype = dtype
        self._cross: Shared[CrossAccumulator] = Shared()
        self._held: dict[str, list[tuple[Event, Tensor]]] = {}
        self._last: tuple[Event, Tensor] | None = None
        self._calls: Counter[str] = Counter()
        self._apart: set[tuple[str, str]] = set()

    def of(self, base: str, tuned: str) -> CrossAccumulator | None:
        """The cross-moment of two streams; None where their vectors did not come in pairs."""
        return None if (base, tuned) in self._apart else self._cross.of((base, tuned))

    def hear_base(self, stream: str, view: View, x: Tensor, mask: Tensor | None) -> None:
        """The listener of the base's pass."""
        event = Event((x,), view, mask)
        if self._last is None or not self._last[0].is_same(event):
            self._last = event, x.clone()  # the model may go on to write into x
        self._held.setdefault(stream, []).append(self._last)

    def hear_tuned(self, stream: str, view: View, x: Tensor, mask: Tensor | None) -> None:
        """The listener of the tuned model's pass."""
        number = self._calls[stream]
        self._calls[stream] += 1
        for base in self._partners.get(stream, ()):
            held = self._held.get(base, [])
            if number >= len(held):
                self._apart.add((base, stream))
                continue
            of_base, copy = held[number]
            event = Event((copy, x), view, mask)
            try:
                self._cross.add((base, stream), event, partial(self._moments, of_base, copy, event))
            except ValueError:
                self._apart.add((base, stream))

    def next_batch(self) -> None:
        """Let go of the base's inputs."""
        for tuned, bases in self._partners.items():
            self._apart |= {(base, tuned) for base in bases if len(self._held.get(base, [])) != self._calls[tuned]}
        self._held.clear()
        self._calls.clear()
        self._last = None

    def _moments(self, of_base: Event, copy: Tensor, of_tuned: Event) -> CrossAccumulator:
        moments = CrossAccumulator(self._dtype)
        pairs = (of_base.view.blocks(copy, of_base.mask), of_tuned.view.blocks(of_tuned.tensors[1], of_tuned.mask))
        for rows, rows_tuned in zip(*pairs, strict=True):
            moments.update(rows, rows_tuned)
        return moments

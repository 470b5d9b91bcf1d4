"""Which matrices are measured together: many small ones of one shape, and on a GPU whatever fits.

A 64 x 64 matrix alone costs more in calls than in arithmetic, and attention heads, experts and convolution kernels come
in thousands.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spectra.jobs import (
    CAN_FAIL,
    Job,
    Outcome,
    Settings,
    bits,
    compared,
    failed,
    shared,
    unchanged,
)
from spectra.linalg.batched import is_small, spectra
from spectra.linalg.lapack import LapackError
from spectra.loading import identical, not_finite
from spectra.measures.stack import STACKS, measure_stack

if TYPE_CHECKING:
    from spectra.pairing import Pair

MOST = 512  # matrices in a batch: what a Ctrl-C may lose, and a step of the progress bar
CPU_BYTES = 1 << 21  # of a batch's float64 weights on the CPU: a few of them stay in its cache
DEVICE_BYTES = 1 << 30  # taken to be free on a device that does not tell
FREE_SHARE = 0.6  # of what is free on a device
HOST_BYTES = 1 << 30  # of a batch's weights as they were stored, while they wait for a device


@dataclass(frozen=True)
class _Update:
    """A tuned matrix of a batch that differs from its base, the `base`-th of the batch."""

    base: int
    label: str
    pair: Pair
    stored: Tensor


@dataclass(frozen=True)
class Batch:
    """Base matrices of one shape, one dtype a side and one set of tuned models, all dense: measured together."""

    jobs: tuple[Job, ...]

    @property
    def cost(self) -> int:
        return max(job.cost for job in self.jobs)

    def run(self, settings: Settings, device: torch.device) -> list[Outcome]:
        """Load and measure all of them. What fails here fails alone, and no row depends on the others."""
        outcomes, bases, updates = [], list[Tensor](), list[_Update]()
        twins: list[tuple[str, Pair, str]] = []  # (label, pair, label of the first model with these bits)
        for job in self.jobs:
            try:
                stored = job.pairs[0][1].load_base()
            except CAN_FAIL as error:
                outcomes += [failed(error, label, pair, "base") for label, pair in job.pairs]
                continue
            seen: dict[str, str] = {}
            for label, pair in job.pairs:
                try:
                    tuned = stored if pair.is_untouched else pair.load_tuned()
                    assert isinstance(tuned, Tensor)
                    if identical(tuned, stored):
                        outcomes.append(unchanged(label, pair, stored))
                        continue
                except CAN_FAIL as error:
                    outcomes.append(failed(error, label, pair))
                    continue
                key = bits(tuned, job)
                if key in seen:
                    twins.append((label, pair, seen[key]))
                    continue
                if key:
                    seen[key] = label
                updates.append(_Update(len(bases), label, pair, tuned))
            bases.append(stored)
        found = {(o.tuned, o.pair.matrix.name): o for o in _halving(bases, updates, settings, device)}
        outcomes += found.values()
        for label, pair, first in twins:
            twin = found[first, pair.matrix.name]
            again = Job(((label, pair),))  # what failed for one model fails for the other in its own words
            outcomes += [shared(twin, label, pair)] if twin.measured else again.run(settings, device)
        return outcomes


def _halving(
    bases: Sequence[Tensor], updates: Sequence[_Update], settings: Settings, device: torch.device
) -> list[Outcome]:
    """The outcomes of a batch; of its halves where it does not fit into memory or a solver fails for one of it."""
    if not updates:
        return []
    try:
        return _together(bases, updates, settings, device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        if len(bases) == 1:
            return [failed(error, update.label, update.pair) for update in updates]
    except LapackError:
        if len(bases) == 1:  # the way of a single matrix has further solvers
            return Job(tuple((update.label, update.pair) for update in updates)).run(settings, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    middle = len(bases) // 2
    upper = [replace(update, base=update.base - middle) for update in updates if update.base >= middle]
    return _halving(bases[:middle], [u for u in updates if u.base < middle], settings, device) + _halving(
        bases[middle:], upper, settings, device
    )


def _together(
    bases: Sequence[Tensor], updates: Sequence[_Update], settings: Settings, device: torch.device
) -> list[Outcome]:
    W, finite = _stack(bases, device)
    refused = [update for update in updates if not finite[update.base]]
    outcomes = [failed(not_finite(bases[one.base], one.pair, "base"), one.label, one.pair) for one in refused]
    kept = [index for index, ok in enumerate(finite) if ok]
    if not kept:
        return outcomes
    W, place = _some(W, kept), {index: at for at, index in enumerate(kept)}
    base = spectra(W, squarable=bases[0].dtype != torch.float64)
    for label in dict.fromkeys(update.label for update in updates):
        mine = [update for update in updates if update.label == label and finite[update.base]]
        if not mine:
            continue
        tuned, sound = _stack([update.stored for update in mine], device)
        outcomes += [
            failed(not_finite(one.stored, one.pair, "tuned"), label, one.pair)
            for one, ok in zip(mine, sound, strict=True)
            if not ok
        ]
        index = [at for at, ok in enumerate(sound) if ok]
        if not index:
            continue
        mine = [mine[at] for at in index]
        here = [place[update.base] for update in mine]
        measured = measure_stack(
            _some(W, here),
            base.select(here),
            _some(tuned, index),
            base_dtype=mine[0].pair.base_dtype,
            tuned_dtype=mine[0].pair.tuned_dtype,
            slices=settings.slices,
            top=settings.top,
            epsilon=settings.epsilon,
        )
        outcomes += [compared(label, one.pair, row) for one, row in zip(mine, measured, strict=True)]
    return outcomes


def _stack(weights: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[bool]]:
    """Stored weights as one float64 tensor (b, m, n) on the device, and which of them are finite."""
    stack = torch.empty(len(weights), *weights[0].shape, dtype=torch.float64, device=device)
    for index, weight in enumerate(weights):
        stack[index] = weight
    finite: list[bool] = torch.isfinite(stack).flatten(1).all(1).tolist()
    return stack, finite


def _some(stack: Tensor, index: list[int]) -> Tensor:
    """Those of a stack; a copy, unless it is all of it in order."""
    return stack if index == list(range(len(stack))) else stack[index]


def batched(jobs: Sequence[Job], settings: Settings, devices: Sequence[torch.device]) -> list[Job | Batch]:
    """The same work with matrices of one shape, dtypes and tuned models together, the largest matrices first.

    On the CPU those whose arithmetic costs no more than the calls for it; on another device every dense update, unless
    its base's spectrum is to be kept. On one device the way of a matrix follows from its shape alone. Updates given as
    factors go one at a time, and `fast` ones where iterating is the faster way.
    """
    groups: dict[Hashable, list[Job]] = {}
    units: list[Job | Batch] = []
    for job in jobs:
        shape = job.matrix.rows, job.matrix.columns
        together = is_small(*shape) or (settings.cache is None and devices[0].type != "cpu")
        together = together and (is_small(*shape) or not settings.fast)
        joined = [together and not pair.is_low_rank for _, pair in job.pairs]
        dense, rest = (
            tuple(one for one, is_joined in zip(job.pairs, joined, strict=True) if is_joined == wanted)
            for wanted in (True, False)
        )
        if dense:
            tuned = tuple((label, pair.tuned_dtype) for label, pair in dense)
            groups.setdefault((shape, dense[0][1].base_dtype, tuned), []).append(Job(dense))
        if rest:
            units.append(Job(rest))
    for group in groups.values():
        count = min(len(group), max(len(devices), ceil(len(group) / _most(group[0], devices))))
        cuts = [len(group) * at // count for at in range(count + 1)]  # as even as can be
        units += [Batch(tuple(group[low:high])) for low, high in pairwise(cuts)]
    return sorted(units, key=lambda unit: unit.cost, reverse=True)


def _most(job: Job, devices: Sequence[torch.device]) -> int:
    """How many matrices of that kind a batch may hold."""
    m, n, p = job.matrix.rows, job.matrix.columns, min(job.matrix.rows, job.matrix.columns)
    if devices[0].type == "cpu":
        return max(1, min(MOST, CPU_BYTES // (8 * m * n)))
    each = 8 * STACKS * (m * n + p * p)  # with the workspace of the solvers
    free = min(_free_bytes(device) // devices.count(device) for device in devices)
    loaded = (1 + len(job.pairs)) * m * n * job.pairs[0][1].base_dtype.itemsize
    return max(1, min(MOST, int(FREE_SHARE * free) // each, HOST_BYTES // loaded))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else DEVICE_BYTES

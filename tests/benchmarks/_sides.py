"""What is timed: the plain loops that a researcher writes first, and the same pair in spectra."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _synthetic import Weights
from torch import Tensor

from spectra.linalg.lowrank import LowRank
from spectra.linalg.svd import Spectrum, svd
from spectra.measures.matrix import Measured, measure

TOP = 10
COLD, CACHED, ADAPTER, ADAPTER_TOP = "cold", "base cached", "adapter, all values", "adapter, top-k"
JOBS = COLD, CACHED, ADAPTER, ADAPTER_TOP


@dataclass(frozen=True)
class Plain:
    """What the loop ends with: singular values of both sides, C, and the best cosine of the top directions."""

    base_values: Tensor  # (k,)
    tuned_values: Tensor  # (k,)
    C: Tensor  # (k, k)
    best_cosine: Tensor  # (TOP,)


def torch_loop(base: Tensor, tuned: Tensor) -> Plain:
    """Two thin `torch.linalg.svd` in float32, C = U^T D V, and the cosines of the top left directions."""
    U, S, Vh = torch.linalg.svd(base, full_matrices=False)
    Y, S_tuned, _ = torch.linalg.svd(tuned, full_matrices=False)
    C = U.T @ (tuned - base) @ Vh.T
    return Plain(S, S_tuned, C, (U.T @ Y[:, :TOP]).abs().amax(0))


def numpy_loop(base: Tensor, tuned: Tensor) -> Plain:
    """The same with `numpy.linalg.svd`."""
    W, W_tuned = base.numpy(), tuned.numpy()
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    Y, S_tuned, _ = np.linalg.svd(W_tuned, full_matrices=False)
    C = U.T @ (W_tuned - W) @ Vh.T
    found = S, S_tuned, C, np.abs(U.T @ Y[:, :TOP]).max(0)
    return Plain(*(torch.from_numpy(array) for array in found))


def ours(pair: Weights) -> dict[str, Callable[[], Measured]]:
    """The four jobs of spectra on a pair, by name; a mode that this version of spectra does not have is left out.

    Cached base spectra are made here, outside the clock: with float64 vectors for the adapter's job, in float32 for the
    others, as `spectra.jobs` chooses.
    """
    narrow, wide, W_wide = svd(pair.base), svd(pair.base, torch.float64), pair.base.double()

    def job(W: Tensor, spectrum: Spectrum, tuned: Tensor | LowRank, **mode: bool) -> Measured:
        return measure(W, spectrum, tuned, base_dtype=torch.float32, tuned_dtype=torch.float32, top=TOP, **mode)

    jobs: dict[str, Callable[[], Measured]] = {
        COLD: lambda: job(pair.base, svd(pair.base), pair.tuned),
        CACHED: lambda: job(pair.base, narrow, pair.tuned),
        ADAPTER: lambda: job(W_wide, wide, pair.adapter),
    }
    if "fast" in inspect.signature(measure).parameters:
        jobs[ADAPTER_TOP] = lambda: job(pair.base, narrow, pair.adapter, fast=True)
    return jobs

"""Everything that is measured of one weight matrix and one update of it, in one pass over the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.iterative import float32_gram, lanczos_triplets
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.perturbed import perturbed_triplets
from spectra.linalg.products import gram
from spectra.linalg.projected import project
from spectra.linalg.svd import Spectrum
from spectra.linalg.triplets import Triplets, leading_triplets, singular_values
from spectra.measures.decomposition import Decomposition, decompose
from spectra.measures.rounding import Rounding, rounding
from spectra.measures.rows import Measured, padded, rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def measure(
    W: Tensor,
    base: Spectrum,
    tuned: Tensor | LowRank,
    *,
    base_dtype: torch.dtype,
    tuned_dtype: torch.dtype,
    slices: int = 8,
    top: int = 10,
    epsilon: float = 0.5,
    fast: bool = False,
) -> Measured:
    """Measure what happened to W.

    Args:
        W: (m, n) the base weight, and `base` its spectrum, of one device; W in float32 or float64, as base.U.
        tuned: W' (m, n), or the update D as factors.
        base_dtype, tuned_dtype: as stored, for the rounding floor.
        slices: into how many slices the components are cut.   top: leading triplets compared.   epsilon: intruder
            threshold.
        fast: iterate the leading triplets instead of computing all singular values. What needs them all (nuclear norm,
            effective, numerical and energy ranks, spectral shift) is NaN then, but for updates given as factors; and so
            is the rotation of those.
    Raises: NotFiniteError where W' holds NaN or infinite entries.
    """
    if isinstance(tuned, LowRank):
        found = _factored(base, tuned, slices, top, fast)
        nothing = np.array(0.0)
        stored = Rounding(nothing, nothing, np.array(np.nan))  # factors carry no storage noise of W or W'
    else:
        D = tuned.to(W.dtype) - W
        found = _dense(base, tuned, D, slices, top, fast)
        stored = rounding(W, D, base_dtype, tuned_dtype)
    exact = isinstance(tuned, LowRank) or base_dtype == tuned_dtype == torch.float64
    (row,) = rows(
        base,
        *found,
        stored,
        update_form="low rank" if isinstance(tuned, LowRank) else "dense",
        digits=torch.float64 if exact else torch.float32,
        top=top,
        epsilon=epsilon,
    )
    return row


def _factored(base: Spectrum, D: LowRank, slices: int, top: int, fast: bool) -> tuple[Triplets, Decomposition, Array]:
    """Triplets of W + D, the split of D and its singular values, from the factors."""
    update = project(base, D)
    try:
        triplets = perturbed_triplets(base, update, top, iterate=fast)
    except LapackError:
        if not fast:
            raise
        triplets = perturbed_triplets(base, update, top)
    return triplets, decompose(base, update, slices, rotation=not fast), _padded(update.values, len(base.S), 0.0)


def _dense(
    base: Spectrum, tuned: Tensor, D: Tensor, slices: int, top: int, fast: bool
) -> tuple[Triplets, Decomposition, Array]:
    """Triplets of W', the split of D and its singular values: all of them, or (`fast`) the largest and NaN."""
    short = D if D.shape[0] <= D.shape[1] else D.T
    if fast and D.dtype == torch.float32:
        try:
            triplets = _iterated(tuned, top)
            G = float32_gram(short)
            largest = _iterated(D, 1, G).S
            return triplets, decompose(base, D, slices, gram=torch.tril(G)), _padded(largest, len(base.S), np.nan)
        except LapackError:
            pass  # small, clustered or out of float32's range: the direct way copes
    triplets = leading_triplets(tuned, top)
    G = gram(short)
    split = decompose(base, D, slices, gram=G)
    return triplets, split, singular_values(D, G).cpu().numpy()


def _iterated(W: Tensor, count: int, G: Tensor | None = None) -> Triplets:
    """Leading triplets by Lanczos: the Gram matrix is a product for W's device, the small steps are the CPU's."""
    if W.device.type == "cpu":
        return lanczos_triplets(W, count, G)
    short = W if W.shape[0] <= W.shape[1] else W.T
    found = lanczos_triplets(W.cpu(), count, (float32_gram(short) if G is None else G).cpu())
    Y, S, Z = (X.to(W.device) for X in (found.Y, found.S, found.Z))
    return Triplets(Y, S, Z, found.algorithm, found.residual)


def _padded(values: Tensor, k: int, fill: float) -> Array:
    return padded(values.cpu().numpy(), k, fill)

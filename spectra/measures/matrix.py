"""Everything that is measured of one weight matrix and one update of it, in one pass over the data."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from spectra.errors import SpectraError
from spectra.linalg.iterative import float32_gram, lanczos_triplets
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.products import CHUNK, Difference, gram
from spectra.linalg.projected import project
from spectra.linalg.svd import Spectrum
from spectra.linalg.triplets import Triplets, leading_triplets, singular_values
from spectra.measures.decomposition import Decomposition, decompose
from spectra.measures.rounding import Rounding, rounding
from spectra.measures.rows import Measured, padded, rows
from spectra.measures.tuned import factored_triplets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Dense = TypeVar("Dense", Tensor, Difference)


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
    overwrite: bool = False,
) -> Measured:
    """Measure what happened to W.

    The singular values and the norm of D = W' - W are those of the float64 difference; D in the dtype of base.U, whose
    entries are rounded, is made for C and the energies alone.

    Args:
        W: (m, n) the base weight in any real floating dtype, and `base` its spectrum, of one device.
        tuned: W' (m, n), or the update D as factors.
        base_dtype, tuned_dtype: as stored, for the rounding floor.
        slices: into how many slices the components are cut.   top: leading triplets compared.   epsilon: intruder
            threshold.
        fast: iterate the leading triplets instead of computing all singular values. What needs them all (nuclear norm,
            effective, numerical and energy ranks, spectral shift) is NaN then, but for updates given as factors; and so
            is the rotation of those.
        overwrite: whether D may take the place of W' where both are of one dtype, which spares a matrix.
    Raises: NotFiniteError where W' holds NaN or infinite entries, and then W' is as it was; SpectraError where an entry
        of D leaves the range of the dtype of base.U, or the squares of W or of a D of factors that of float64.
    Memory beside the arguments: of float64 squares of the short side at most three, and a D that finds no place.
    """
    if isinstance(tuned, LowRank):
        found = _factored(W, base, tuned, slices, top, fast)
        nothing = np.array(0.0)
        stored = Rounding(nothing, nothing, np.array(np.nan))  # factors carry no storage noise of W or W'
    else:
        found, D = _dense(base, W, tuned, slices, top, fast, overwrite)
        stored = rounding(W, D, base_dtype, tuned_dtype)
    exact = isinstance(tuned, LowRank) or base_dtype == tuned_dtype == torch.float64
    (row,) = rows(
        base,
        *found,
        stored,
        update_form="low rank" if isinstance(tuned, LowRank) else "dense",
        digits=torch.float64 if exact else torch.float32,
        tuned_digits=tuned_dtype,
        top=top,
        epsilon=epsilon,
    )
    return row


def _factored(
    W: Tensor, base: Spectrum, D: LowRank, slices: int, top: int, fast: bool
) -> tuple[Triplets, Decomposition, Array]:
    """Triplets of W + D, the split of D and its singular values, from the factors."""
    update = project(base, D)
    if not all(isfinite(float(values @ values)) for values in (base.S, update.values)):
        raise SpectraError("the squares of W or of W' - W leave the range of float64; scale both models down")
    triplets = factored_triplets(W, base, update, top, fast)
    return triplets, decompose(base, update, slices, rotation=not fast), _padded(update.values, len(base.S), 0.0)


def _dense(
    base: Spectrum, W: Tensor, tuned: Tensor, slices: int, top: int, fast: bool, overwrite: bool
) -> tuple[tuple[Triplets, Decomposition, Array], Tensor]:
    """Triplets of W', the split of D and its singular values: all of them, or (`fast`) the largest and NaN; and D.

    D comes last: it may be W' that is overwritten.
    """
    k, dtype = len(base.S), base.U.dtype
    if fast and dtype == torch.float32:
        try:
            triplets = _iterated(tuned.float(), top)
        except LapackError:
            pass  # small, clustered or out of float32's range: the direct way copes
        else:
            D = _update(W, tuned, dtype, overwrite)
            G, values = _largest(D)
            return (triplets, decompose(base, D, slices, gram=G), _padded(values, k, np.nan)), D
    triplets = leading_triplets(tuned, top)
    if torch.float64 in (W.dtype, tuned.dtype):  # too many digits to be squared
        D = _update(W, tuned, dtype, overwrite)
        G, values = gram(_short_side_first(D)), singular_values(D)
    else:
        exact = _short_side_first(Difference(tuned, W))
        G = gram(exact)
        values = singular_values(exact, G.clone())
        D = _update(W, tuned, dtype, overwrite)
    return (triplets, decompose(base, D, slices, gram=G), values.cpu().numpy()), D


def _update(W: Tensor, tuned: Tensor, dtype: torch.dtype, overwrite: bool) -> Tensor:
    """D = W' - W (m, n), computed in the widest of the dtypes; in the place of W' where that may be overwritten."""
    widest = torch.promote_types(torch.promote_types(W.dtype, tuned.dtype), dtype)
    D = tuned.to(widest, copy=not overwrite)
    for start in range(0, len(D), CHUNK):  # by blocks: of a W in another dtype, a copy is made
        D[start : start + CHUNK] -= W[start : start + CHUNK]
    D = D.to(dtype)
    if not all(map(isfinite, torch.aminmax(D))):
        raise SpectraError("W' - W has entries beyond the range of its dtype; compare in float64, or scale both down")
    return D


def _largest(D: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix of D on the short side, its lower triangle, and the largest singular value of D, or all."""
    short = _short_side_first(D)
    try:
        G = float32_gram(short)
        return torch.tril(G), _iterated(D, 1, G).S
    except LapackError:
        wide = gram(short)
        return wide, singular_values(D, wide.clone())


def _short_side_first(X: Dense) -> Dense:
    return X if X.shape[0] <= X.shape[1] else X.T


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

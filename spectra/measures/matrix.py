"""Everything that is measured of one weight matrix and one update of it, in one pass over the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.iterative import float32_gram, lanczos_triplets
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.perturbed import perturbed_triplets
from spectra.linalg.products import gram
from spectra.linalg.recognise import explained_by_rounding
from spectra.linalg.svd import Spectrum
from spectra.linalg.triplets import Triplets, leading_triplets, singular_values
from spectra.measures.decomposition import Decomposition, decompose
from spectra.measures.intruders import intruders
from spectra.measures.rounding import FLOOR_FACTOR, Rounding, rounding
from spectra.measures.whole import (
    cosine,
    effective_rank,
    energy_rank,
    numerical_rank,
    rank_tolerance,
    spectral_shift,
    stable_rank,
    subspace_overlap,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """The measures of one (tuned, matrix): a value per column of `layers`, an array per column of the other tables."""

    layer: dict[str, Any]
    components: dict[str, Array]
    slices: dict[str, Array | NDArray[np.intp]]


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
        stored = Rounding(0.0, 0.0, float("nan"))  # factors carry no storage noise of W or W'
    else:
        D = tuned.to(W.dtype) - W
        found = _dense(base, tuned, D, slices, top, fast)
        stored = rounding(W, D, base_dtype, tuned_dtype)
    triplets, split, update_values = found
    s, s_tuned = base.S.cpu().numpy(), _padded(triplets.S, len(base.S), np.nan)
    norm, update_norm = float(np.linalg.norm(s)), float(np.sqrt(split.update_energy))
    exact = isinstance(tuned, LowRank) or base_dtype == tuned_dtype == torch.float64
    digits = torch.float64 if exact else torch.float32
    tolerance = rank_tolerance(base.shape, digits, stored.floor * norm, float(update_values[0]))
    relative_update = update_norm / norm if norm > 0 else np.nan
    layer = {
        "update_form": "low rank" if isinstance(tuned, LowRank) else "dense",
        "base_norm": norm,
        "update_norm": update_norm,
        "relative_update": relative_update,
        "cosine": cosine(norm, update_norm, float(s @ split.diagonal)),
        **_shares(split, has_directions=norm > 0),
        "spectral_norm_update": float(update_values[0]),
        "nuclear_norm_update": float(update_values.sum()),
        "stable_rank": stable_rank(split.update_energy, float(update_values[0])),
        **_ranks(update_values, tolerance),
        "rank_tolerance": tolerance,
        **_low_rank(update_values, base.shape, norm, stored, digits),
        "spectral_norm_base": float(s[0]),
        "spectral_norm_tuned": float(s_tuned[0]),
        "effective_rank_base": effective_rank(s),
        "effective_rank_tuned": effective_rank(s_tuned),
        "spectral_shift": spectral_shift(s, s_tuned),
        **_leading_directions(base, triplets, top, epsilon),
        "rounding_floor": stored.floor,
        "below_rounding_floor": relative_update < FLOOR_FACTOR * stored.floor,
        "unmoved_share": stored.unmoved_share,
        "base_algorithm": base.algorithm,
        "tuned_algorithm": triplets.algorithm,
        "tuned_residual": triplets.residual,
    }
    return Measured(layer, _components(s, s_tuned, update_values, split), _slices(split))


def _factored(base: Spectrum, D: LowRank, slices: int, top: int, fast: bool) -> tuple[Triplets, Decomposition, Array]:
    """Triplets of W + D, the split of D and its singular values, from the factors."""
    try:
        triplets = perturbed_triplets(base, D, top, iterate=fast)
    except LapackError:
        if not fast:
            raise
        triplets = perturbed_triplets(base, D, top)
    return triplets, decompose(base, D, slices, rotation=not fast), _padded(singular_values(D), len(base.S), 0.0)


def _dense(
    base: Spectrum, tuned: Tensor, D: Tensor, slices: int, top: int, fast: bool
) -> tuple[Triplets, Decomposition, Array]:
    """Triplets of W', the split of D and its singular values: all of them, or (`fast`) the largest and NaN."""
    short = D if D.shape[0] <= D.shape[1] else D.T
    if fast and D.dtype == torch.float32:
        try:
            triplets = lanczos_triplets(tuned, top)
            G = float32_gram(short)
            largest = lanczos_triplets(D, 1, G).S
            return triplets, decompose(base, D, slices, gram=torch.tril(G)), _padded(largest, len(base.S), np.nan)
        except LapackError:
            pass  # small, clustered or out of float32's range: the direct way copes
    triplets = leading_triplets(tuned, top)
    G = gram(short)
    split = decompose(base, D, slices, gram=G)
    return triplets, split, singular_values(D, G).cpu().numpy()


def _low_rank(
    values: Array, shape: tuple[int, int], norm: float, stored: Rounding, digits: torch.dtype
) -> dict[str, Any]:
    """The exact low rank of the update and what it leaves; none where there is none or the values are not known."""
    found = None
    if not np.isnan(values).any():
        s = torch.from_numpy(values)
        tries = (explained_by_rounding(s, shape, floor * norm, digits) for floor in (stored.tuned_floor, stored.floor))
        found = next((one for one in tries if one), None)
    return {"low_rank": found.rank if found else None, "low_rank_residual": found.residual if found else np.nan}


def _ranks(values: Array, tolerance: float) -> dict[str, Any]:
    """The ranks that need every singular value; none where some are not known."""
    if np.isnan(values).any():
        return {"effective_rank": np.nan, "numerical_rank": None, "energy_rank_90": None, "energy_rank_99": None}
    return {
        "effective_rank": effective_rank(values),
        "numerical_rank": numerical_rank(values, tolerance),
        "energy_rank_90": energy_rank(values, 0.90),
        "energy_rank_99": energy_rank(values, 0.99),
    }


def _shares(split: Decomposition, has_directions: bool) -> dict[str, float]:
    """Where the update lies; for a zero base, whose basis is the solver's choice, nowhere in particular."""
    shares = {
        "diagonal_share": split.diagonal_share,
        "off_diagonal_share": split.off_diagonal_share,
        "outside_share": split.outside_share,
        "diagonal_enrichment": split.diagonal_enrichment,
    }
    return shares if has_directions else dict.fromkeys(shares, np.nan)


def _leading_directions(base: Spectrum, tuned: Triplets, top: int, epsilon: float) -> dict[str, Any]:
    if base.S[0] == 0 or tuned.S[0] == 0:  # a zero matrix has no leading directions
        measures = ("left_overlap", "right_overlap", "left_angle", "right_angle", "overlap_null", "lowest_best_cosine")
        return {**dict.fromkeys((*measures, "cosine_null"), np.nan), "intruders": None}
    left, right = (subspace_overlap(base, tuned, side, top) for side in ("left", "right"))
    found = intruders(base, tuned, top, epsilon)
    return {
        "left_overlap": left.overlap,
        "right_overlap": right.overlap,
        "left_angle": left.angle,
        "right_angle": right.angle,
        "overlap_null": left.null,
        "intruders": found.count,
        "lowest_best_cosine": float(found.best_cosine.min()) if len(found.best_cosine) else float("nan"),
        "cosine_null": found.null,
    }


def _components(s: Array, s_tuned: Array, s_update: Array, split: Decomposition) -> dict[str, Array]:
    return {
        "singular_value": s,
        "tuned_singular_value": s_tuned,
        "update_singular_value": s_update,
        "diagonal": split.diagonal,
        "relative_diagonal": split.relative_diagonal,
        "row_energy": split.row_energy,
        "column_energy": split.column_energy,
        "outside_energy": split.outside_energy,
        "plasticity": split.plasticity,
        "left_stability": split.left_stability,
        "right_stability": split.right_stability,
        "stability": split.stability,
        "rotation": split.rotation,
        "gap": split.gap,
    }


def _slices(split: Decomposition) -> dict[str, Array | NDArray[np.intp]]:
    bounds, total = split.slice_bounds, split.update_energy or 1.0
    return {
        "slice": np.arange(len(bounds) - 1),
        "start": bounds[:-1],
        "stop": bounds[1:],
        "block_energy": split.block_energy,
        "cross_energy": split.cross_energy,
        "block_share": split.block_energy / total,
        "cross_share": split.cross_energy / total,
        "plasticity": np.add.reduceat(split.plasticity, bounds[:-1]),
    }


def _padded(values: Tensor, k: int, fill: float) -> Array:
    """Singular values as k numbers: those that were not computed, or that r directions do not have, are `fill`."""
    shown = values.cpu().numpy()[:k]
    return np.pad(shown, (0, k - len(shown)), constant_values=fill)

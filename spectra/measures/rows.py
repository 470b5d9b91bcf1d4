"""From what was computed of a matrix, or of a stack of them, to the rows of the tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spectra.linalg.batched import AnySpectrum, AnyTriplets
from spectra.linalg.recognise import GAP, explained_by_rounding
from spectra.linalg.svd import Spectrum
from spectra.linalg.triplets import Triplets
from spectra.measures.covariance import data_free_diagonal
from spectra.measures.decomposition import Decomposition
from spectra.measures.intruders import best_cosines, cluster_cosines, random_cosine, zero_to_rounding
from spectra.measures.rounding import FLOOR_FACTOR, Rounding
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


# The row of a matrix that did not move; its norm comes to it.
UNCHANGED: dict[str, Any] = {
    "update_norm": 0.0,
    "relative_update": 0.0,
    "cosine": 1.0,
    "diagonal_share": 0.0,
    "off_diagonal_share": 0.0,
    "outside_share": 0.0,
    "spectral_norm_update": 0.0,
    "nuclear_norm_update": 0.0,
    "numerical_rank": 0,
    "energy_rank_90": 0,
    "energy_rank_99": 0,
    "spectral_shift": 0.0,
    "intruders": 0,
    "spread_intruders": 0,
    "unmoved_share": 1.0,
}


@dataclass(frozen=True)
class Measured:
    """The measures of one (tuned, matrix): a value per column of `layers`, an array per column of the other tables."""

    layer: dict[str, Any]
    components: dict[str, Array]
    slices: dict[str, Array | NDArray[np.intp]]


def rows(
    base: AnySpectrum,
    tuned: AnyTriplets,
    split: Decomposition,
    update_values: Array,
    stored: Rounding,
    *,
    update_form: str,
    digits: torch.dtype,
    tuned_digits: torch.dtype,
    top: int,
    epsilon: float,
) -> list[Measured]:
    """The rows of a stack of b matrices, or the one row of a single matrix (then nothing has a leading dimension).

    Args:
        base: the spectra of W.   tuned: the leading triplets of W'.   split: D in the basis of W.
        update_values: (..., k) the singular values of D, NaN where they are not known.   stored: the rounding of
            storage.   update_form: "dense" or "low rank".   digits: the dtype whose eps the digits of D have.
        tuned_digits: that in which W' is stored.
        top, epsilon: as of `measure`.
    """
    s, s_tuned = base.S.cpu().numpy(), padded(tuned.S.cpu().numpy(), base.S.shape[-1], np.nan)
    norm, update_norm = np.linalg.norm(s, axis=-1), np.sqrt(split.update_energy)
    largest, noise = update_values[..., 0], stored.floor * norm
    tolerance = rank_tolerance(base.shape, digits, noise, largest)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_update = np.where(norm > 0, update_norm / norm, np.nan)
    layer = {
        "update_form": update_form,
        "base_norm": norm,
        "update_norm": update_norm,
        "relative_update": relative_update,
        "cosine": cosine(norm, update_norm, (s * split.diagonal).sum(-1)),
        **_shares(split, has_directions=norm > 0),
        "spectral_norm_update": largest,
        "nuclear_norm_update": update_values.sum(-1),
        "stable_rank": stable_rank(split.update_energy, largest),
        **_ranks(update_values, tolerance),
        "rank_tolerance": tolerance,
        **_low_rank(update_values, base.shape, (stored.tuned_floor * norm, noise), digits),
        "spectral_norm_base": s[..., 0],
        "spectral_norm_tuned": s_tuned[..., 0],
        "effective_rank_base": effective_rank(s),
        "effective_rank_tuned": effective_rank(s_tuned),
        "spectral_shift": spectral_shift(s, s_tuned),
        **_leading_directions(base, tuned, top, epsilon, tuned_digits),
        "rounding_floor": stored.floor,
        "below_rounding_floor": relative_update < FLOOR_FACTOR * stored.floor,
        "unmoved_share": stored.unmoved_share,
        "base_algorithm": base.algorithm if isinstance(base, Spectrum) else base.algorithms,
        "tuned_algorithm": tuned.algorithm if isinstance(tuned, Triplets) else tuned.algorithms,
        "tuned_residual": tuned.residual if isinstance(tuned, Triplets) else np.nan,
    }
    count = norm.size
    columns = [np.broadcast_to(np.asarray(column).reshape(-1), count).tolist() for column in layer.values()]
    components = _components(base.shape, s, s_tuned, update_values, split)
    slices = _slices(split, count)
    by_component = [column.reshape(count, -1) for column in components.values()]
    by_slice = [column.reshape(count, -1) for column in slices.values()]
    return [
        Measured(
            dict(zip(layer, values, strict=True)),
            {name: column[i] for name, column in zip(components, by_component, strict=True)},
            {name: column[i] for name, column in zip(slices, by_slice, strict=True)},
        )
        for i, values in enumerate(zip(*columns, strict=True))
    ]


def padded(values: Array, k: int, fill: float) -> Array:
    """Singular values as k numbers: those that were not computed, or that r directions do not have, are `fill`."""
    shown = values[..., :k]
    if shown.shape[-1] == k:
        return shown
    return np.pad(shown, (0, k - len(shown)), constant_values=fill)


def _missing(counts: NDArray[np.int64], where: NDArray[np.bool_] | np.bool_) -> NDArray[Any]:
    """Counts as objects, None where there is nothing to count."""
    objects = np.asarray(counts).astype(object)
    objects[where] = None
    return objects


def _low_rank(
    values: Array, shape: tuple[int, int], noises: tuple[Array, Array], digits: torch.dtype
) -> dict[str, NDArray[Any]]:
    """The exact low rank of the update and what it leaves; none where there is none or the values are not known.

    Tried with the noise of the tuned side alone, and with that of both.
    """
    k = values.shape[-1]
    stack, by_noise = values.reshape(-1, k), [np.broadcast_to(noise, values.shape[:-1]).reshape(-1) for noise in noises]
    ranks, residuals = np.full(len(stack), None), np.full(len(stack), np.nan)
    # No rank is told without a gap; NaN has none.
    gaps = (stack[:, :-1] >= GAP * stack[:, 1:])[:, : max(k // 2, 1)].any(1)
    for i in np.flatnonzero(gaps & ~np.isnan(stack).any(1)):
        s = torch.from_numpy(stack[i])
        tries = (explained_by_rounding(s, shape, float(noise[i]), digits) for noise in by_noise)
        found = next((one for one in tries if one), None)
        if found:
            ranks[i], residuals[i] = found.rank, found.residual
    return {"low_rank": ranks, "low_rank_residual": residuals}


def _ranks(values: Array, tolerance: Array) -> dict[str, NDArray[Any]]:
    """The ranks that need every singular value; none where some are not known."""
    unknown = np.isnan(values).any(-1)
    return {
        "effective_rank": effective_rank(values),
        "numerical_rank": _missing(numerical_rank(values, tolerance), unknown),
        "energy_rank_90": _missing(energy_rank(values, 0.90), unknown),
        "energy_rank_99": _missing(energy_rank(values, 0.99), unknown),
    }


def _shares(split: Decomposition, has_directions: NDArray[np.bool_]) -> dict[str, Array]:
    """Where the update lies; for a zero base, whose basis is the solver's choice, nowhere in particular."""
    shares = {
        "diagonal_share": split.diagonal_share,
        "off_diagonal_share": split.off_diagonal_share,
        "outside_share": split.outside_share,
        "diagonal_enrichment": split.diagonal_enrichment,
    }
    return {name: np.where(has_directions, share, np.nan) for name, share in shares.items()}


def _leading_directions(
    base: AnySpectrum, tuned: AnyTriplets, top: int, epsilon: float, digits: torch.dtype
) -> dict[str, NDArray[Any]]:
    """How the leading directions of W' lie to those of W; a zero matrix has none."""
    none = ((base.S[..., 0] == 0) | (tuned.S[..., 0] == 0)).cpu().numpy()
    left, right = (subspace_overlap(base, tuned, side, top) for side in ("left", "right"))
    best, partner = best_cosines(base, tuned, top, zero=zero_to_rounding(base, tuned, digits))
    spread = (best < epsilon) & (cluster_cosines(base, tuned, partner)[0] >= epsilon)
    lowest = np.where(np.isnan(best), np.inf, best).min(-1)
    measures: dict[str, Array] = {
        "left_overlap": left.overlap,
        "right_overlap": right.overlap,
        "left_angle": left.angle,
        "right_angle": right.angle,
        "overlap_null": np.array(left.null),
        "lowest_best_cosine": np.where(np.isinf(lowest), np.nan, lowest),
        "cosine_null": np.array(random_cosine(base.shape[0], min(base.shape))),
    }
    known = {name: np.where(none, np.nan, measure) for name, measure in measures.items()}
    counts = {"intruders": best < epsilon, "spread_intruders": spread}
    return {**known, **{name: _missing(found.sum(-1), none) for name, found in counts.items()}}


def _components(
    shape: tuple[int, int], s: Array, s_tuned: Array, s_update: Array, split: Decomposition
) -> dict[str, Array]:
    m, n = shape
    shifted = data_free_diagonal(s, split.diagonal, split.row_energy, split.outside_energy if n > m else 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        white_shift = np.where(s[..., :1] > 0, shifted / (s**2).sum(-1, keepdims=True), np.nan)
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
        "white_shift": white_shift,
        "left_stability": split.left_stability,
        "right_stability": split.right_stability,
        "stability": split.stability,
        "rotation": split.rotation,
        "gap": split.gap,
    }


def _slices(split: Decomposition, count: int) -> dict[str, Array | NDArray[np.intp]]:
    bounds = split.slice_bounds
    total = np.asarray(split.update_energy)[..., None]
    total = np.where(total > 0, total, 1.0)
    numbers = {"slice": np.arange(len(bounds) - 1), "start": bounds[:-1], "stop": bounds[1:]}
    return {
        **{name: np.broadcast_to(column, (count, len(column))) for name, column in numbers.items()},
        "block_energy": split.block_energy,
        "cross_energy": split.cross_energy,
        "block_share": split.block_energy / total,
        "cross_share": split.cross_energy / total,
        "plasticity": np.add.reduceat(split.plasticity, bounds[:-1], axis=-1),
    }

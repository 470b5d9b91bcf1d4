"""Measures of a whole matrix: size, rank, spectrum and leading subspaces. Definitions: `spectra/definitions.md`.

Each takes one matrix's numbers or, with a leading dimension, those of a stack: s is (k,) or (b, k), a norm () or (b,).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectra.linalg.batched import AnySpectrum, AnyTriplets, matmul

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Counts = NDArray[np.int64]


def stable_rank(energy: Array, spectral_norm: Array) -> Array:
    """||D||_F^2 / ||D||_2^2; NaN for a zero matrix."""
    return _ratio(energy, spectral_norm**2)


def effective_rank(s: Array) -> Array:
    """exp of the entropy of s / sum(s) (Roy and Vetterli 2007); NaN for a zero or not wholly known s."""
    p = _ratio(s, s.sum(-1, keepdims=True))
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)  # 0 log 0 = 0
    rank: Array = np.exp(entropy)
    return rank


NOISE_MARGIN = 1.5  # rows of unequal scale make noise matrices of larger norm than equal ones


def rank_tolerance(shape: tuple[int, int], dtype: torch.dtype, noise: Array, spectral_norm: Array) -> Array:
    """The share of s_0 under which singular values of D count as zero.

    Args: shape (m, n); dtype of the update's digits, whose eps times max(m, n) is the least tolerance; `noise`, the
    expected Frobenius norm of storage rounding in D, which as a random matrix has a spectral norm of noise (1/sqrt(m) +
    1/sqrt(n)); `spectral_norm`, ||D||_2. At most 1.
    """
    m, n = shape
    least = max(shape) * torch.finfo(dtype).eps
    of_noise = np.nan_to_num(_ratio(NOISE_MARGIN * noise * (1 / sqrt(m) + 1 / sqrt(n)), spectral_norm))
    tolerance: Array = np.minimum(1.0, np.maximum(least, of_noise))
    return tolerance


def numerical_rank(s: Array, tolerance: Array) -> Counts:
    """How many singular values exceed tolerance * s_0."""
    count: Counts = (s > np.asarray(tolerance)[..., None] * s[..., :1]).sum(-1)
    return count


def energy_rank(s: Array, share: float) -> Counts:
    """K_90, K_99: how many leading directions hold `share` of sum(s^2); 0 for a zero matrix."""
    energy = np.cumsum(_ratio(s, s[..., :1]) ** 2, axis=-1)
    count: Counts = (energy < share * energy[..., -1:] * (1 - 1e-12)).sum(-1) + 1
    return np.where(s[..., 0] > 0, count, 0)[()]


def spectral_shift(s: Array, s_tuned: Array) -> Array:
    """||s' - s||_2 / ||s||_2; NaN for a zero base."""
    scale = s[..., :1]
    shift, size = (np.linalg.norm(_ratio(x, scale), axis=-1) for x in (s_tuned - s, s))
    return _ratio(shift, size)


def cosine(base_norm: Array, update_norm: Array, inner: Array) -> Array:
    """<W, W'> / (||W|| ||W'||) from ||W||, ||D|| and <W, D> = sum_i s_i C_ii; NaN where either is zero."""
    ratio, along = _ratio(update_norm, base_norm), _ratio(inner, base_norm**2)
    squared_tuned = 1 + 2 * along + ratio**2
    return _ratio(1 + along, np.sqrt(np.maximum(squared_tuned, 0.0)))


@dataclass(frozen=True)
class SubspaceOverlap:
    """The span of the top i singular vectors of the base against that of the tuned weight, one side.

    Attributes:
        overlap: phi = ||U_i^T Y_i||_F^2 / i in [0, 1] (Hu et al. 2021).   null: i / d, its mean for random subspaces.
        angle: the largest principal angle, radians.
    """

    overlap: Array
    angle: Array
    null: float


def subspace_overlap(base: AnySpectrum, tuned: AnyTriplets, side: str, i: int = 10) -> SubspaceOverlap:
    """phi and the largest principal angle between the top-i subspaces of W and W'.

    The angle comes from its sine, ||(1 - U_i U_i^T) Y_i||_2, since arccos loses all digits near 1.
    """
    X, Y = (base.U, tuned.Y) if side == "left" else (base.V, tuned.Z)
    i = min(i, Y.shape[-1], X.shape[-1])
    X_i, Y_i = (vectors[..., :i].double().contiguous() for vectors in (X, Y))  # (d, i)
    M = matmul(X_i.mT, Y_i)  # (i, i)
    outside = Y_i - matmul(X_i, M)
    # Of i vectors a Gram matrix is far cheaper than a norm of d x i, and its largest eigenvalue as exact.
    sine = np.sqrt(np.linalg.eigvalsh(matmul(outside.mT, outside).cpu().numpy())[..., -1].clip(0, 1))
    least_cosine = np.linalg.svd(M.cpu().numpy(), compute_uv=False)[..., -1].clip(0, 1)
    angle = np.where(sine < 0.7, np.arcsin(sine), np.arccos(least_cosine))
    return SubspaceOverlap((M * M).sum((-2, -1)).cpu().numpy() / i, angle, i / X.shape[-2])


def _ratio(numerator: Array, denominator: Array) -> Array:
    """a / b, and NaN where b is zero (or NaN)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio: Array = np.where(denominator > 0, np.divide(numerator, denominator), np.nan)
    return ratio[()]

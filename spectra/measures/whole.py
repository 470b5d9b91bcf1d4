"""Measures of a whole matrix: size, rank, spectrum and leading subspaces. Definitions: `spectra/definitions.md`."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch

from spectra.linalg.products import matmul
from spectra.linalg.svd import Spectrum
from spectra.linalg.triplets import Triplets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


def stable_rank(energy: float, spectral_norm: float) -> float:
    """||D||_F^2 / ||D||_2^2; NaN for a zero matrix."""
    return energy / spectral_norm**2 if spectral_norm > 0 else float("nan")


def effective_rank(s: Array) -> float:
    """exp of the entropy of s / sum(s) (Roy and Vetterli 2007); NaN for a zero or not wholly known s."""
    if s[0] <= 0 or np.isnan(s).any():
        return float("nan")
    p = s[s > 0] / s.sum()
    return float(np.exp(-(p @ np.log(p))))


NOISE_MARGIN = 1.5  # rows of unequal scale make noise matrices of larger norm than equal ones


def rank_tolerance(shape: tuple[int, int], dtype: torch.dtype, noise: float, spectral_norm: float) -> float:
    """The share of s_0 under which singular values of D count as zero.

    Args: shape (m, n); dtype of the update's digits, whose eps times max(m, n) is the least tolerance; `noise`, the
    expected Frobenius norm of storage rounding in D, which as a random matrix has a spectral norm of noise (1/sqrt(m) +
    1/sqrt(n)); `spectral_norm`, ||D||_2. At most 1.
    """
    m, n = shape
    least = max(shape) * torch.finfo(dtype).eps
    if spectral_norm == 0:
        return least
    return min(1.0, max(least, NOISE_MARGIN * noise * (1 / sqrt(m) + 1 / sqrt(n)) / spectral_norm))


def numerical_rank(s: Array, tolerance: float) -> int:
    """How many singular values exceed tolerance * s_0."""
    return int((s > tolerance * s[0]).sum())


def energy_rank(s: Array, share: float) -> int:
    """K_90, K_99: how many leading directions hold `share` of sum(s^2); 0 for a zero matrix."""
    if s[0] <= 0:
        return 0
    energy = np.cumsum((s / s[0]) ** 2)
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1


def spectral_shift(s: Array, s_tuned: Array) -> float:
    """||s' - s||_2 / ||s||_2; NaN for a zero base."""
    scale = float(s[0])
    return float(np.linalg.norm(s_tuned / scale - s / scale) / np.linalg.norm(s / scale)) if scale > 0 else float("nan")


def cosine(base_norm: float, update_norm: float, inner: float) -> float:
    """<W, W'> / (||W|| ||W'||) from ||W||, ||D|| and <W, D> = sum_i s_i C_ii; NaN where either is zero."""
    if base_norm == 0:
        return float("nan")
    ratio, along = update_norm / base_norm, inner / base_norm**2
    squared_tuned = 1 + 2 * along + ratio**2
    return float((1 + along) / sqrt(squared_tuned)) if squared_tuned > 0 else float("nan")


@dataclass(frozen=True)
class SubspaceOverlap:
    """The span of the top i singular vectors of the base against that of the tuned weight, one side.

    Attributes:
        overlap: phi = ||U_i^T Y_i||_F^2 / i in [0, 1] (Hu et al. 2021).   null: i / d, its mean for random subspaces.
        angle: the largest principal angle, radians.
    """

    overlap: float
    angle: float
    null: float


def subspace_overlap(base: Spectrum, tuned: Triplets, side: str, i: int = 10) -> SubspaceOverlap:
    """phi and the largest principal angle between the top-i subspaces of W and W'.

    The angle comes from its sine, ||(1 - U_i U_i^T) Y_i||_2, since arccos loses all digits near 1.
    """
    X, Y = (base.U, tuned.Y) if side == "left" else (base.V, tuned.Z)
    i = min(i, Y.shape[1], X.shape[1])
    X_i, Y_i = X[:, :i].double(), Y[:, :i].double()
    M = matmul(X_i.T, Y_i)  # (i, i)
    sine = float(torch.linalg.matrix_norm(Y_i - matmul(X_i, M), ord=2))
    least_cosine = float(torch.linalg.svdvals(M)[-1])
    angle = np.arcsin(min(sine, 1.0)) if sine < 0.7 else np.arccos(min(least_cosine, 1.0))
    return SubspaceOverlap(float((M * M).sum() / i), float(angle), i / X.shape[0])

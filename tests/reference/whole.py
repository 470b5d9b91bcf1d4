"""Measures of a whole matrix, each from its defining formula."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

from tests.reference.singular import Array, svd


def relative_update(W: Array, D: Array) -> float:
    """||D||_F / ||W||_F."""
    return float(np.sqrt(np.sum(D**2) / np.sum(W**2)))


def cosine(W: Array, tuned: Array) -> float:
    """Cosine of the angle between W and W' as vectors of m n entries."""
    return float(np.sum(W * tuned) / np.sqrt(np.sum(W**2) * np.sum(tuned**2)))


def spectral_norm(D: Array) -> float:
    return float(svd(D).s[0])


def nuclear_norm(D: Array) -> float:
    return float(np.sum(svd(D).s))


def stable_rank(D: Array) -> float:
    """||D||_F^2 / ||D||_2^2."""
    return float(np.sum(D**2) / spectral_norm(D) ** 2)


def effective_rank(D: Array) -> float:
    """exp of the entropy of the singular values as a distribution (Roy and Vetterli 2007)."""
    s = svd(D).s
    p = s[s > 0] / np.sum(s)
    return float(np.exp(-np.sum(p * np.log(p))))


def numerical_rank(D: Array, tolerance: float) -> int:
    """Number of singular values above `tolerance` times the largest."""
    s = svd(D).s
    return int(np.sum(s > tolerance * s[0]))


def energy_rank(D: Array, share: float) -> int:
    """The fewest directions that hold `share` of ||D||_F^2 (K_90 for share = 0.9)."""
    energy = svd(D).s ** 2
    return next(count for count in range(1, len(energy) + 1) if energy[:count].sum() >= share * energy.sum())


def spectral_shift(W: Array, tuned: Array) -> float:
    """||s' - s||_2 / ||s||_2."""
    s = svd(W).s
    return float(np.linalg.norm(svd(tuned).s - s) / np.linalg.norm(s))


def subspace_overlap(W: Array, tuned: Array, count: int) -> float:
    """phi = ||U_i^T U'_i||_F^2 / i of the leading left subspaces, i = min(count, k) (Hu et al. 2021)."""
    first, second = (svd(X).U[:, :count] for X in (W, tuned))
    energy = sum(float(u @ y) ** 2 for u in first.T for y in second.T)
    return float(energy / first.shape[1])


def largest_principal_angle(W: Array, tuned: Array, count: int) -> float:
    """Largest principal angle between the leading left subspaces, radians, through the sine where it is small."""
    first, second = (svd(X).U[:, :count] for X in (W, tuned))
    return float(np.max(scipy.linalg.subspace_angles(first, second)))


def spacing(values: torch.Tensor) -> Array:
    """Distance from |x| to the next larger number of x's own dtype, which is the next bit pattern."""
    magnitude = values.abs().contiguous()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    following = (magnitude.view(integer) + 1).view(values.dtype)
    gap: Array = (following.double() - magnitude.double()).numpy()
    return gap


def unmoved_share(W: torch.Tensor, tuned: torch.Tensor) -> float:
    """Share of entries with |W' - W| no larger than the storage dtype's spacing at W. Both stored in one dtype."""
    moved = np.abs(tuned.double().numpy() - W.double().numpy())
    return float(np.mean(moved <= spacing(W)))

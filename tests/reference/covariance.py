"""Brute force for the shift of feature covariances: from the features themselves, all of them at once, in float64."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]


def covariance(Y: Array, centred: bool = True) -> Array:
    """Population covariance, or second moment, of the rows of Y (N, m)."""
    Y = Y - Y.mean(0) if centred else Y
    total = np.zeros((Y.shape[1], Y.shape[1]))
    for y in Y:
        total += np.outer(y, y)
    return total / len(Y)


def delta(before: Array, after: Array, Q: Array, centred: bool = True) -> Array:
    """Q^T (Sigma' - Sigma) Q from features before and after, (N, m) each."""
    return Q.T @ (covariance(after, centred) - covariance(before, centred)) @ Q


def linear_cka(Y: Array, Z: Array) -> float:
    """From N x N similarity matrices, as Kornblith et al. define it."""
    K, L = Y @ Y.T, Z @ Z.T
    H = np.eye(len(Y)) - 1 / len(Y)
    K, L = H @ K @ H, H @ L @ H
    return float((K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum()))


def bures(one: Array, other: Array) -> float:
    """sqrt(tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2), square roots by scipy."""
    root = scipy.linalg.sqrtm(one).real
    between = scipy.linalg.sqrtm(root @ other @ root).real
    return float(np.sqrt(max(np.trace(one) + np.trace(other) - 2 * np.trace(between), 0.0)))


def patches(X: Array, kernel: tuple[int, int], stride: int, padding: int, dilation: int) -> Array:
    """What each place of a kernel sees of zero-padded images X (B, C, H, W), by loops: (B x places, C kh kw)."""
    X = np.pad(X, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    kh, kw = (dilation * (k - 1) + 1 for k in kernel)
    return np.array(
        [
            image[:, top : top + kh : dilation, left : left + kw : dilation].reshape(-1)
            for image in X
            for top in range(0, image.shape[1] - kh + 1, stride)
            for left in range(0, image.shape[2] - kw + 1, stride)
        ]
    )

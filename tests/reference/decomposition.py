"""The split of an update in the base's singular basis, each quantity from what it means, not from a shortcut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.reference.singular import SVD, Array, svd


@dataclass(frozen=True)
class Columns:
    """One entry per component, k = min(m, n) of them; energies are squared Frobenius norms."""

    singular_value: Array
    diagonal: Array
    relative_diagonal: Array
    row_energy: Array
    column_energy: Array
    outside_energy: Array
    plasticity: Array
    left_stability: Array
    right_stability: Array
    stability: Array
    update_energy: float


def coefficients(basis: SVD, D: Array) -> tuple[Array, Array]:
    """C = U^T D V (k x k), entry by entry, and E (m x n), what the thin basis leaves over."""
    U, _, V = basis
    k = U.shape[1]
    images = [D @ V[:, j] for j in range(k)]
    C = np.array([[U[:, i] @ images[j] for j in range(k)] for i in range(k)])
    m, n = D.shape
    if m > n:
        E = D @ V - U @ C  # (m, n): column i belongs to component i
    elif n > m:
        E = U.T @ D - C @ V.T  # (m, n): row i belongs to component i
    else:
        E = np.zeros((m, n))
    return C, E


def decompose(W: Array, D: Array, basis: SVD | None = None) -> Columns:
    """Every per-component column for the base W and the update D (both m x n), in `basis` or in W's own."""
    basis = basis or svd(W)
    U, s, V = basis
    C, E = coefficients(basis, D)
    m, n = D.shape
    k = len(s)
    total = float(np.sum(D**2))
    diagonal = np.array([C[i, i] for i in range(k)])
    row = np.array([sum(C[i, j] ** 2 for j in range(k) if j != i) for i in range(k)], dtype=float)
    column = np.array([sum(C[j, i] ** 2 for j in range(k) if j != i) for i in range(k)], dtype=float)
    outside = np.array([np.sum((E[:, i] if m > n else E[i]) ** 2) if m != n else 0.0 for i in range(k)])
    left, right = np.full(k, np.nan), np.full(k, np.nan)
    alive = s > max(m, n) * 2.0**-52 * s[0]  # the directions of zeros are the solver's choice
    for i in np.flatnonzero(alive):
        left[i] = cosine(s[i] * U[:, i] + D @ V[:, i], U[:, i])
        right[i] = cosine(s[i] * V[:, i] + D.T @ U[:, i], V[:, i])
    return Columns(
        singular_value=s,
        diagonal=diagonal,
        relative_diagonal=np.array([diagonal[i] / s[i] if alive[i] else np.nan for i in range(k)]),
        row_energy=row,
        column_energy=column,
        outside_energy=outside,
        plasticity=(diagonal**2 + (row + column) / 2 + outside) / total if total > 0 else np.zeros(k),
        left_stability=left,
        right_stability=right,
        stability=np.sign(left) * np.sqrt(np.abs(left * right)),
        update_energy=total,
    )


def cosine(x: Array, y: Array) -> float:
    """Cosine of the angle between two vectors, NaN where one of them is zero."""
    x, y = x / (np.abs(x).max() or 1.0), y / (np.abs(y).max() or 1.0)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norms) if norms > 0 else float("nan")


def rotation(W: Array, D: Array, step: float) -> Array:
    """How fast the left singular vectors of W + t D turn at t = 0: their actual change from t = -step to t = step."""
    U = svd(W).U
    ahead, behind = (svd(W + t * D).U for t in (step, -step))
    ahead, behind = (X * np.sign(np.sum(X * U, axis=0)) for X in (ahead, behind))
    speed: Array = np.linalg.norm(ahead - behind, axis=0) / (2 * step)
    return speed


def slice_energies(C: Array, start: int, stop: int) -> tuple[float, float]:
    """Energy of the block C[start:stop, start:stop], and of its rows and columns outside the block."""
    block = cross = 0.0
    for i in range(C.shape[0]):
        for j in range(C.shape[1]):
            inside = (start <= i < stop) + (start <= j < stop)
            block += C[i, j] ** 2 if inside == 2 else 0.0
            cross += C[i, j] ** 2 if inside == 1 else 0.0
    return block, cross

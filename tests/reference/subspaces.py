"""Overlap and principal angles of two subspaces, one entry at a time."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from tests.reference.singular import Array


def phi(A: Array, B: Array, i: int, j: int) -> float:
    """||A_i^T B_j||_F^2 / min(i, j)."""
    total = 0.0
    for a in range(i):
        for b in range(j):
            total += float(A[:, a] @ B[:, b]) ** 2
    return total / min(i, j)


def angles(A: Array, B: Array) -> Array:
    """Principal angles, ascending, by SciPy (Knyazev and Argentati 2002)."""
    found: Array = np.sort(scipy.linalg.subspace_angles(A, B))
    return found

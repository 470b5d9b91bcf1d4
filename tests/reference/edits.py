"""Edits of an update by their formulas, in float64 and with full SVDs."""

from __future__ import annotations

import numpy as np

from tests.reference.singular import Array, svd


def mitigated(W: Array, tuned: Array, factor: float, which: list[int]) -> Array:
    """W' with the triplets j of `which` multiplied by `factor`."""
    after = svd(tuned)
    s = after.s.copy()
    s[which] *= factor
    return (after.U * s) @ after.V.T


def truncated(D: Array, kept: list[int]) -> Array:
    """The sum of the chosen singular components of D."""
    parts = svd(D)
    total = np.zeros_like(D)
    for index in kept:
        total += parts.s[index] * np.outer(parts.U[:, index], parts.V[:, index])
    return total


def rewound(W: Array, tuned: Array, start: int, stop: int) -> Array:
    """W' whose action on base components [start, stop) is W's again: C_ij, E_i put to zero where i or j is one."""
    base = svd(W)
    D = tuned - W
    left, right = (np.eye(len(X)) - X[:, start:stop] @ X[:, start:stop].T for X in (base.U, base.V))
    projected: Array = W + left @ D @ right
    return projected

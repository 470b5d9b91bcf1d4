"""Starts of LoRA factors, and what one step of gradient descent makes of them, written out in float64."""

from __future__ import annotations

import numpy as np

from tests.reference.singular import Array, svd


def slice_product(W: Array, start: int, rank: int, scale: str) -> Array:
    """c B0 A0 (m x n) of a slice: sum of s_i u_i v_i^T over it, of u_i v_i^T where the scale is orthonormal."""
    U, s, V = svd(W)
    weights = s if scale == "sqrt_sigma" else np.ones_like(s)
    total = np.zeros_like(W)
    for i in range(start, start + rank):
        total += weights[i] * np.outer(U[:, i], V[:, i])
    return total


def truncated(G: Array, rank: int) -> Array:
    """The best approximation of G of this rank."""
    U, s, V = svd(G)
    return (U[:, :rank] * s[:rank]) @ V[:, :rank].T


def first_step(B0: Array, A0: Array, G: Array, c: float, step: float) -> Array:
    """D after one step of gradient descent on B and A from B0 and A0, to all orders of the step; G: gradient by W."""
    dB = -step * c * G @ A0.T
    dA = -step * c * B0.T @ G
    return c * ((B0 + dB) @ (A0 + dA) - B0 @ A0)


def predicted_cross(W: Array, G: Array, start: int, rank: int, c: float, step: float) -> Array:
    """First-order C = U^T D V of a slice's first step, entry by entry.

    C_ij = -step c (U^T G V)_ij (s_i [i in slice] + s_j [j in slice]).
    """
    U, s, V = svd(W)
    projected = U.T @ G @ V
    k = len(s)
    C = np.zeros((k, k))
    for i in range(k):
        for j in range(k):
            inside = sum(s[index] for index in (i, j) if start <= index < start + rank)
            C[i, j] = -step * c * projected[i, j] * inside
    return C

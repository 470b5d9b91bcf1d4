"""Singular triplets of W + D from the SVD of W and the factors of D: nothing of size m x n is formed."""

from __future__ import annotations

import torch
from torch import Tensor

from spectra.linalg.lowrank import LowRank
from spectra.linalg.products import matmul
from spectra.linalg.svd import Spectrum
from spectra.linalg.symmetric import reduce_symmetric
from spectra.linalg.triplets import Triplets

BASE_COORDINATES = "gram64 in base coordinates"


def perturbed_triplets(base: Spectrum, update: LowRank, count: int) -> Triplets:
    """All singular values of W' = W + c B A and its `count` leading triplets, from base coordinates.

    With m <= n and F = U^T D = P A, P = c U^T B, the Gram matrix of W' in the base's left basis is exactly
    U^T W' W'^T U = S^2 + S C^T + C S + F F^T, what of A lies outside the span of V included. For m > n the same is done
    on the transposes.

    Args: base (m x n) with float64 vectors for full accuracy, update of the same shape, count of triplets.
    Returns: `Triplets` in float64; singular values to 2e-8 s_0, those above 1e-4 s_0 to 1e-12 s_0.
    Cost: O((m + n) k r + k^2 r) and one tridiagonal reduction, 4/3 k^3 flops.
    """
    m, n = base.shape
    if m > n:
        mirrored = perturbed_triplets(Spectrum(base.V, base.S, base.U, base.algorithm), update.T, count)
        return Triplets(mirrored.Z, mirrored.S, mirrored.Y, mirrored.algorithm)
    U, S, V = base.U.double(), base.S, base.V.double()
    A = update.A.double()
    P = update.c * matmul(U.T, update.B.double())  # (k, r)
    Z = S[:, None] * matmul(A, V).T + matmul(P, matmul(A, A.T)) / 2  # (k, r): G' = S^2 + P Z^T + Z P^T
    half = matmul(P, Z.T)
    G = torch.tril(half + half.T + torch.diag(S * S)).T.contiguous().T  # Fortran order
    reduced = reduce_symmetric(G)
    values = reduced.values().clamp(min=0).sqrt()
    count = min(count, len(values))
    X = reduced.vectors_between(0, count)[1]  # (k, count), coordinates of y_j in U
    Y = matmul(U, X)
    image = matmul(V, S[:, None] * X) + matmul(A.T, matmul(P.T, X))  # W'^T y_j
    return Triplets(Y, values, _normalised(image, values[:count]), BASE_COORDINATES)


def _normalised(image: Tensor, values: Tensor) -> Tensor:
    """image / s'_j, zero where s'_j is."""
    return torch.where(values > 0, image / values, 0.0)

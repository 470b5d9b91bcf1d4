"""Singular triplets of W + D from the SVD of W and the factors of D: nothing of size m x n is formed."""

from __future__ import annotations

import torch
from torch import Tensor

from spectra.linalg.iterative import leading_eigenvectors
from spectra.linalg.lowrank import LowRank
from spectra.linalg.products import matmul
from spectra.linalg.svd import Spectrum
from spectra.linalg.symmetric import reduce_symmetric
from spectra.linalg.triplets import Triplets

BASE_COORDINATES = "gram64 in base coordinates"
BASE_LANCZOS = "lanczos in base coordinates"
TIGHT = 1e-12  # a product with the operator costs so little that the iteration may run to rounding


def perturbed_triplets(base: Spectrum, update: LowRank, count: int, iterate: bool = False) -> Triplets:
    """Singular values of W' = W + c B A and its `count` leading triplets, from base coordinates.

    With m <= n and F = U^T D = P A, P = c U^T B, the Gram matrix of W' in the base's left basis is exactly
    U^T W' W'^T U = S^2 + S C^T + C S + F F^T = S^2 + P Z^T + Z P^T, what of A lies outside the span of V included, with
    Z = S (A V)^T + P A A^T / 2. For m > n the same is done on the transposes.

    Args:
        base: spectrum of W (m x n), with float64 vectors for full accuracy.   update: of the same shape.
        count: how many triplets.   iterate: only those, by Lanczos on that operator, k x k but never formed.
    Returns: `Triplets`, vectors float64; all values to 2e-8 s_0 (those above 1e-4 s_0 to 1e-12 s_0), or the leading
        ones.
    Raises: LapackError where the iteration does not converge.
    Cost: O((m + n) k r + k^2 r) and one tridiagonal reduction, 4/3 k^3 flops; O((m + n) k r) where iterated.
    """
    m, n = base.shape
    if m > n:
        mirror = perturbed_triplets(Spectrum(base.V, base.S, base.U, base.algorithm), update.T, count, iterate)
        return Triplets(mirror.Z, mirror.S, mirror.Y, mirror.algorithm, mirror.residual)
    U, S, V = base.U, base.S, base.V
    A = update.A.double()
    P = update.c * matmul(U.T, update.B.to(U.dtype)).double()  # (k, r)
    Q = matmul(update.A.to(V.dtype), V).double()  # (r, k)
    Z = S[:, None] * Q.T + matmul(P, matmul(A, A.T)) / 2  # (k, r)
    count = min(count, len(S))
    if iterate:
        values, X = _iterated(S * S, P, Z, count)
    else:
        half = matmul(P, Z.T)
        G = torch.tril(half + half.T + torch.diag(S * S)).T.contiguous().T  # Fortran order
        reduced = reduce_symmetric(G)
        values = reduced.values().clamp(min=0).sqrt()
        X = reduced.vectors_between(0, count)[1]  # (k, count), coordinates of y_j in U
    Y = matmul(U, X.to(U.dtype)).double()
    image = matmul(V, (S[:, None] * X).to(V.dtype)).double() + matmul(A.T, matmul(P.T, X))  # W'^T y_j
    right = torch.where(values[:count] > 0, image / values[:count], 0.0)
    if not iterate:
        return Triplets(Y, values, right, BASE_COORDINATES)
    GX = (S * S)[:, None] * X + matmul(P, matmul(Z.T, X)) + matmul(Z, matmul(P.T, X))
    residual = float(torch.linalg.vector_norm(GX - X * values**2, dim=0).max() / values[0] ** 2)
    return Triplets(Y, values, right, BASE_LANCZOS, residual)


def _iterated(squares: Tensor, P: Tensor, Z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading eigenpairs of diag(squares) + P Z^T + Z P^T, O(k r) a step; values as square roots."""
    diagonal, left, right = squares.cpu().numpy(), P.cpu().numpy(), Z.cpu().numpy()
    values, X = leading_eigenvectors(
        lambda x: diagonal * x + left @ (right.T @ x) + right @ (left.T @ x), len(diagonal), count, TIGHT
    )
    device = squares.device
    return torch.from_numpy(values).clamp(min=0).sqrt().to(device), torch.from_numpy(X).to(device)

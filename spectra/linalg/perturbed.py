"""Singular triplets of W + D from the SVD of W and the factors of D: nothing of size m x n is formed."""

from __future__ import annotations

import torch
from torch import Tensor

from spectra.linalg.iterative import leading_eigenvectors
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.products import diagonal_plus_product, matmul
from spectra.linalg.projected import Projected, project
from spectra.linalg.svd import TAIL, Spectrum, svd
from spectra.linalg.symmetric import reduce_symmetric
from spectra.linalg.triplets import VALUES_TAIL, Triplets, unsquared_values

BASE_COORDINATES = "gram64 in base coordinates"
BASE_LANCZOS = "lanczos in base coordinates"
TIGHT = 1e-12  # a product with the operator costs so little that the iteration may run to rounding


def perturbed_triplets(base: Spectrum, update: LowRank, count: int, iterate: bool = False) -> Triplets:
    """Singular values of W' = W + c B A and its `count` leading triplets, from base coordinates.

    With m <= n and F = U^T D = P A, P = U^T B, the Gram matrix of W' in the base's left basis is exactly
    U^T W' W'^T U = S^2 + S C^T + C S + F F^T = S^2 + P Z^T + Z P^T, what of A lies outside the span of V included, with
    Z = S Q^T + P A A^T / 2, Q = A V. For m > n the same is done on the transposes.

    Args:
        base: spectrum of W (m x n), with float64 vectors for full accuracy.   update: of the same shape;
            a `Projected` one where others ask for its coordinates, too.
        count: how many triplets.   iterate: only those, by Lanczos on that operator, k x k but never formed.
    Returns: `Triplets`, vectors float64; all values to 1e-9 s_0, or the leading ones.
    Raises: LapackError where the iteration does not converge.
    Cost: O((m + n) k r + k^2 r) and one tridiagonal reduction, 4/3 k^3 flops; O((m + n) k r) where iterated. As much
        again as `unsquared_values` says where W' has a tail.
    """
    D = project(base, update)
    m, n = base.shape
    if m > n:
        mirror = perturbed_triplets(Spectrum(base.V, base.S, base.U, base.algorithm), D.T, count, iterate)
        return Triplets(mirror.Z, mirror.S, mirror.Y, mirror.algorithm, mirror.residual)
    U, S, V, P = base.U, base.S, base.V, D.P
    Z = S[:, None] * D.Q.T + matmul(P, matmul(D.A, D.A.T)) / 2  # (k, r)
    count = min(count, len(S))
    if iterate:
        values, X = _iterated(S * S, P, Z, count)
    else:
        try:
            values, X = _reduced(base, D, Z, count, few=True)
        except LapackError:
            values, X = _reduced(base, D, Z, count, few=False)
        if values[count - 1] <= TAIL * values[0]:
            return _directly(base, D, count)
    Y = matmul(U, X.to(U.dtype)).double()
    image = matmul(V, (S[:, None] * X).to(V.dtype)).double() + matmul(D.A.T, matmul(P.T, X))  # W'^T y_j
    right = torch.where(values[:count] > 0, image / values[:count], 0.0)
    if not iterate:
        return Triplets(Y, values, right, BASE_COORDINATES)
    GX = (S * S)[:, None] * X + matmul(P, matmul(Z.T, X)) + matmul(Z, matmul(P.T, X))
    residual = float(torch.linalg.vector_norm(GX - X * values**2, dim=0).max() / values[0] ** 2)
    return Triplets(Y, values, right, BASE_LANCZOS, residual)


def _reduced(base: Spectrum, D: Projected, Z: Tensor, count: int, few: bool) -> tuple[Tensor, Tensor]:
    """All singular values of W', and the coordinates of y_j, j < count, in U (k x count), for m <= n."""
    reduced = reduce_symmetric(diagonal_plus_product(base.S**2, D.P, Z), few)
    squared = reduced.values()
    values = squared.clamp(min=0).sqrt()
    if values[-1] <= VALUES_TAIL * values[0]:
        values = unsquared_values(_core(base, D)[0], reduced, squared)
    return values, reduced.vectors_between(0, count)[1]


def _core(base: Spectrum, D: Projected) -> tuple[Tensor, Tensor]:
    """K = U^T W' [V, N] = [S + P Q, P R^T], which has the singular values of W', and N (n x r), for m <= n.

    N R = A^T - V Q^T is what of A lies outside the span of V.
    """
    outside = D.A.T - matmul(base.V, D.Q.T.to(base.V.dtype)).double()  # (n, r)
    N, R = torch.linalg.qr(outside)
    return torch.cat([torch.diag(base.S) + matmul(D.P, D.Q), matmul(D.P, R.T)], 1), N  # (k, k + r)


def _directly(base: Spectrum, D: Projected, count: int) -> Triplets:
    """The same without squaring, by a float64 SVD of K: for leading triplets that reach into the tail; 10 k^3 flops."""
    K, N = _core(base, D)
    found = svd(K)
    X, right = found.U[:, :count], found.V[:, :count]  # (k, count), (k + r, count)
    k = len(base.S)
    Y = matmul(base.U, X.to(base.U.dtype)).double()
    Z = matmul(base.V, right[:k].to(base.V.dtype)).double() + matmul(N, right[k:])
    return Triplets(Y, found.S, Z, f"{found.algorithm} in base coordinates")


def _iterated(squares: Tensor, P: Tensor, Z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading eigenpairs of diag(squares) + P Z^T + Z P^T, O(k r) a step; values as square roots."""
    diagonal, left, right = squares.cpu().numpy(), P.cpu().numpy(), Z.cpu().numpy()
    values, X = leading_eigenvectors(
        lambda x: diagonal * x + left @ (right.T @ x) + right @ (left.T @ x), len(diagonal), count, TIGHT
    )
    device = squares.device
    return torch.from_numpy(values).clamp(min=0).sqrt().to(device), torch.from_numpy(X).to(device)

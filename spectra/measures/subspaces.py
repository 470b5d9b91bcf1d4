"""How two subspaces lie to each other: overlap phi and principal angles, each with what random subspaces would show.

Sources: phi from Hu et al., *LoRA* (2021), section 7.2. Angles after Björck and Golub, *Numerical methods for
computing angles between linear subspaces* (1973): large ones from cosines, small ones from sines, since arccos loses
half of all digits near 1. The squared cosines of random subspaces are the eigenvalues of a Jacobi ensemble, drawn here
as in Edelman and Sutton, *The beta-Jacobi matrix model, the CS decomposition, and generalized singular value problems*
(2008); of large subspaces they fill the interval of Wachter, *The limiting empirical measure of multiple discriminant
ratios* (1980).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import acos, sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.lowrank import LowRank
from spectra.linalg.products import matmul
from spectra.linalg.svd import svd
from spectra.linalg.triplets import leading_triplets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

BLOCK = 1 << 20  # entries of an update that are formed in float64 at once
DRAWN = 256  # directions up to which the null of the angles is drawn; at the edges of more it is a hundredth off
DRAWS = 8192  # of a single angle; of i angles the extremes spread less, and an i-th of them does


@dataclass(frozen=True)
class Leading:
    """The leading singular directions of a matrix: Y (m, i), S (i,) and Z (n, i), float64; i is at most its rank."""

    Y: Tensor
    S: Tensor
    Z: Tensor

    @property
    def rank(self) -> int:
        return len(self.S)


def leading(X: Tensor | LowRank, count: int) -> Leading:
    """The `count` leading triplets of a matrix or a low-rank product, without those of zero singular values.

    Cost: one tridiagonal reduction of a dense matrix (see `leading_triplets`); O((m + n) r^2) of a product.
    """
    if isinstance(X, LowRank):
        Q_B, R_B = torch.linalg.qr(X.B.double())  # (m, r), (r, r)
        Q_A, R_A = torch.linalg.qr(X.A.double().T)  # (n, r), (r, r)
        core = svd(X.c * matmul(R_B, R_A.T))
        Y, S, Z = matmul(Q_B, core.U), core.S, matmul(Q_A, core.V)
    else:
        found = leading_triplets(X, count)
        Y, S, Z = found.Y.double(), found.S, found.Z.double()
    if isinstance(X, LowRank) or X.dtype == torch.float64:
        zero = max(X.shape) * torch.finfo(torch.float64).eps * S[0]
    else:  # what storing X in float32 moves its singular values by at the most: ||E||_F <= eps / 2 ||X||_F
        zero = sqrt(min(X.shape)) * torch.finfo(torch.float32).eps * S[0]
    count = min(count, Y.shape[1], int((zero < S).sum()))
    return Leading(Y[:, :count], S[:count], Z[:, :count])


def overlaps(A: Tensor, B: Tensor) -> Array:
    """phi(A, B, i, j) = ||A_i^T B_j||_F^2 / min(i, j) for all leading i and j columns: (i, j) float64, 1 = contained.

    Args: A (d, i), B (d, j) with orthonormal columns.   Cost: 2 d i j flops.

    >>> overlaps(torch.eye(3)[:, :2], torch.eye(3)[:, 1:2])[:, 0].tolist()
    [0.0, 1.0]
    """
    squared = matmul(A.double().T.contiguous(), B.double().contiguous()).square().cpu().numpy()  # (i, j)
    summed = squared.cumsum(0).cumsum(1)
    i, j = (np.arange(1, size + 1) for size in summed.shape)
    phi: Array = summed / np.minimum(i[:, None], j[None, :])
    return phi


def overlap_null(dimension: int, i: int, j: int) -> float:
    """The mean of phi for independent random subspaces of R^d: (i j / d) / min(i, j) = max(i, j) / d."""
    return max(i, j) / dimension


def principal_angles(A: Tensor, B: Tensor) -> Array:
    """The min(i, j) principal angles between the spans of A and B, radians, ascending.

    Args: A (d, i), B (d, j) with orthonormal columns.   Accuracy: about 1e-15 on either end, given exact bases.
    Cost: 4 d i j flops.

    >>> A, B = torch.eye(3)[:, :1], torch.tensor([[1.0], [1e-9], [0.0]])
    >>> f"{principal_angles(A, B)[0]:.1e}"
    '1.0e-09'
    """
    A, B = A.double(), B.double()
    if B.shape[1] > A.shape[1]:
        A, B = B, A
    M = matmul(A.T.contiguous(), B.contiguous())  # (i, j), i >= j
    cosines = np.linalg.svd(M.cpu().numpy(), compute_uv=False).clip(0, 1)  # descending
    outside = torch.linalg.qr(B - matmul(A.contiguous(), M)).R
    sines = np.linalg.svd(outside.cpu().numpy(), compute_uv=False).clip(0, 1)[::-1]  # ascending
    angles: Array = np.where(sines < sqrt(0.5), np.arcsin(sines), np.arccos(cosines))
    return angles


@lru_cache(maxsize=1024)
def angles_null(dimension: int, i: int, j: int) -> tuple[float, float]:
    """The mean smallest and largest principal angle of independent random subspaces of dimensions i and j of R^d.

    Radians, to about a hundredth. Subspaces with i + j > d intersect: their smallest angle is 0, and the others are
    those of their complements. One direction makes one angle with a subspace, which is both.

    >>> smallest, largest = angles_null(64, 1, 1)
    >>> round(smallest, 1), smallest == largest
    (1.5, True)
    """
    if max(i, j) == dimension:
        return 0.0, 0.0
    if i + j > dimension:
        return 0.0, angles_null(dimension, dimension - i, dimension - j)[1]
    i, j = sorted((i, j))
    if i > DRAWN:
        a, b = i / dimension, j / dimension
        largest, least = (abs(sqrt(a * (1 - b)) + sign * sqrt(b * (1 - a))) for sign in (1, -1))  # cosines
        return acos(min(1.0, largest)), acos(least)
    cosines = _random_cosines(dimension, i, j, max(16, DRAWS // i))  # (draws, i), descending
    smallest, largest = np.arccos(cosines[:, [0, -1]]).mean(axis=0)
    return float(smallest), float(largest)


def _random_cosines(dimension: int, i: int, j: int, draws: int) -> Array:
    """Cosines of the principal angles of random subspaces, i <= j, i + j <= d: (draws, i), descending, the same ones
    every time. They are the singular values of a bidiagonal matrix of independent beta variables: O(i^3) a draw.
    """
    generator = np.random.default_rng(0)
    k = np.arange(i, 0, -1)
    c = np.sqrt(generator.beta((j - i + k) / 2, (dimension - j - i + k) / 2, size=(draws, i)))
    inner = np.sqrt(generator.beta(k[1:] / 2, (dimension - 2 * i + 1 + k[1:]) / 2, size=(draws, i - 1)))
    B, at = np.zeros((draws, i, i)), np.arange(i)
    B[:, at, at] = c
    B[:, at[1:], at[1:]] *= np.sqrt(1 - inner**2)
    B[:, at[:-1], at[1:]] = -np.sqrt(1 - c[:, :-1] ** 2) * inner
    cosines: Array = np.linalg.svd(B, compute_uv=False).clip(0, 1)
    return cosines


@dataclass(frozen=True)
class Products:
    """Entry by entry, of two matrices X and Y of one shape.

    Attributes:
        inner: <X, Y>.   norms: ||X||_F and ||Y||_F.
        agreeing: how many entries have the same sign, of the `moved` ones where neither is zero.
    """

    inner: float
    norms: tuple[float, float]
    agreeing: int
    moved: int


def products(X: Tensor | LowRank, Y: Tensor | LowRank) -> Products:
    """Inner product, norms and agreement of signs, in float64, a block of rows at a time; factors are not formed whole.

    Cost: O(m n), and 2 m n r for each pair of factors.
    """
    m, n = X.shape
    inner, squares, agreeing, moved = 0.0, [0.0, 0.0], 0, 0
    step = max(1, BLOCK // n)
    for start in range(0, m, step):
        x, y = (_rows(matrix, start, start + step) for matrix in (X, Y))
        inner += float((x * y).sum())
        for index, rows in enumerate((x, y)):
            squares[index] += float(torch.linalg.vector_norm(rows)) ** 2
        signs = torch.sign(x) * torch.sign(y)
        agreeing += int((signs > 0).sum())
        moved += int((signs != 0).sum())
    return Products(inner, (sqrt(squares[0]), sqrt(squares[1])), agreeing, moved)


def _rows(X: Tensor | LowRank, start: int, stop: int) -> Tensor:
    if isinstance(X, LowRank):
        return X.c * matmul(X.B[start:stop].double().contiguous(), X.A.double().contiguous())
    return X[start:stop].double()

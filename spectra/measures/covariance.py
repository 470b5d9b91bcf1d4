"""The shift of a layer's feature covariance, from its weights and the moments of its inputs.

Features are y = W x + b with W (m x n), and Sigma_X = E[(x - mean)(x - mean)^T] over all positions, so that
Sigma_Y = W Sigma_X W^T. After tuning, W' = W + D sees inputs of covariance Sigma'_X (the base's own where both see
the same). With orthonormal directions Q (m x k) of the base's feature space,

    Delta = Q^T (Sigma'_Y - Sigma_Y) Q,
    Sigma'_Y - Sigma_Y = W' Sigma_X W'^T - W Sigma_X W^T       own: moved by this layer's weights
                       + W' (Sigma'_X - Sigma_X) W'^T          inherited: came in through its inputs

Source: Quercia, Bangun, Assent, Scharr, *Least but not Last* (arXiv 2602.03493), Eq. 11, in our reading. The own part
is formed from D and never as a difference of two covariances, which would lose all digits of a small update.

All tensors are float64 and on one device. `None` in the place of a covariance stands for the identity (white inputs).
Second moments in place of covariances (with W augmented by its bias, x by a one) give the uncentred shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.lapack import LapackError
from spectra.linalg.products import matmul
from spectra.linalg.slices import singular_slice
from spectra.linalg.svd import svd

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


@dataclass(frozen=True)
class Shift:
    """The shift of one layer in the directions Q, and its energies in the whole feature space.

    Attributes:
        own: (k, k) Q^T (W' Sigma_X W'^T - W Sigma_X W^T) Q.
        inherited: (k, k) Q^T W' (Sigma'_X - Sigma_X) W'^T Q; None where the inputs are the same.
        variance: (k,) diagonal of Q^T Sigma_Y Q.
        trace, trace_tuned: of Sigma_Y and Sigma'_Y, all directions.
        norm: ||Sigma_Y||_F.
        own_energy, inherited_energy: squared Frobenius norms of the two parts, all directions.
        product: <own, inherited>, all directions, so that ||total||^2 = own_energy + 2 product + inherited_energy.
    """

    own: Tensor
    inherited: Tensor | None
    variance: Tensor
    trace: float
    trace_tuned: float
    norm: float
    own_energy: float
    inherited_energy: float
    product: float

    @property
    def total(self) -> Tensor:
        """Delta (k, k): the sum of the parts."""
        return self.own if self.inherited is None else self.own + self.inherited

    @property
    def energy(self) -> float:
        """||Sigma'_Y - Sigma_Y||_F^2, in all directions."""
        return max(self.own_energy + 2 * self.product + self.inherited_energy, 0.0)


def shift(W: Tensor, D: Tensor, Q: Tensor, inputs: Tensor | None = None, inputs_tuned: Tensor | None = None) -> Shift:
    """Delta and its two parts, exactly.

    Args:
        W: (m, n) the base weight; D: (m, n) its update W' - W; Q: (m, k) orthonormal columns.
        inputs: (n, n) Sigma_X; None for the identity.   inputs_tuned: (n, n) Sigma'_X; None for the base's own inputs.
    Raises: ValueError where the shapes do not fit.
    Cost: about 4 m n p + 6 m p k flops with p = min(m, n), and 16 n^3 more for m > n; memory 4 p^2, 10 n^2 for m > n.

    >>> W, D = torch.diag(torch.tensor([2.0, 1.0])).double(), torch.diag(torch.tensor([1.0, 0.0])).double()
    >>> shift(W, D, torch.eye(2).double()).total.tolist()
    [[5.0, 0.0], [0.0, 0.0]]
    """
    if W.shape != D.shape or Q.shape[0] != W.shape[0]:
        raise ValueError(f"W is {tuple(W.shape)}, D is {tuple(D.shape)}, Q is {tuple(Q.shape)}")
    change = None
    if inputs_tuned is not None:
        change = inputs_tuned - (_identity(W) if inputs is None else inputs)
    tuned = W + D
    WS = _times(W, inputs)  # (m, n) W Sigma_X
    DS = _times(D, inputs)  # (m, n) D Sigma_X
    trace, own_trace = float((WS * W).sum()), float((DS * (W + tuned)).sum())
    inherited_trace = 0.0 if change is None else float((matmul(tuned, change) * tuned).sum())
    if W.shape[0] <= W.shape[1]:
        features = matmul(WS, W.T)  # (m, m) Sigma_Y
        half = matmul(DS, (W + D / 2).T)
        own = half + half.T  # (m, m)
        inherited = None if change is None else matmul(matmul(tuned, change), tuned.T)
        projected = [None if X is None else _projected(Q, X) for X in (own, inherited)]
        variance = (Q * matmul(features, Q)).sum(0)
        norm, energies = float(torch.linalg.vector_norm(features)), _energies(own, inherited)
    else:
        P, F = matmul(Q.T, W), matmul(Q.T, D)  # (k, n)
        FS = matmul(Q.T, DS)
        half = matmul(FS, (P + F / 2).T)
        T = P + F
        projected = [half + half.T, None if change is None else matmul(matmul(T, change), T.T)]
        variance = (matmul(Q.T, WS) * P).sum(1)
        K = _times(matmul(W.T, W), inputs)  # (n, n), of trace(K K) = ||W Sigma_X W^T||_F^2
        norm, energies = float((K * K.T).sum()) ** 0.5, _energies_inside(tuned, D, inputs, change)
    assert projected[0] is not None
    return Shift(projected[0], projected[1], variance, trace, trace + own_trace + inherited_trace, norm, *energies)


def weight_basis(W: Tensor, k: int) -> Tensor:
    """The first k left singular vectors of W, (m, k) float64: the directions in which `compare` writes an update.

    A float32 W is decomposed through its Gram matrix, at half the cost of a float64 one.
    """
    return singular_slice(W, 0, k).U


def feature_basis(W: Tensor, inputs: Tensor | None, k: int) -> Tensor:
    """The k leading eigenvectors of Sigma_Y = W Sigma_X W^T, (m, k): the base features' principal directions.

    Cost: an eigendecomposition of order m for m <= n; else one of order n and an SVD of m x n.
    """
    if W.shape[0] <= W.shape[1]:
        return _eigen(matmul(_times(W, inputs), W.T))[1].flip(1)[:, :k].contiguous()
    return svd(matmul(W, _root(inputs, W)), torch.float64).U[:, :k]


def data_free(S: Tensor, C: Tensor, E: Tensor | None = None) -> Tensor:
    """Delta (k, k) for white inputs in the weight's own basis, from C and E: S C^T + C S + C C^T + E E^T.

    Args:
        S: (k,) singular values of W.   C: (k, k) U^T D V.
        E: (k, n) U^T D - C V^T where W has more columns than rows; None elsewhere (for m > n, E lies outside of Q).

    >>> data_free(torch.tensor([2.0]), torch.tensor([[1.0]])).tolist()
    [[5.0]]
    """
    CS = C * S  # C diag(S)
    delta = CS + CS.T + matmul(C, C.T)
    return delta if E is None else delta + matmul(E, E.T)


def data_free_diagonal(S: Array, diagonal: Array, row_energy: Array, outside_energy: Array | float = 0.0) -> Array:
    """The diagonal of `data_free` from a `Decomposition`: 2 s_i C_ii + sum_j C_ij^2 + ||E_i||^2.

    `outside_energy` is the decomposition's where n > m, and 0 elsewhere.
    """
    shifted: Array = 2 * S * diagonal + diagonal**2 + row_energy + outside_energy
    return shifted


@dataclass(frozen=True)
class Likeness:
    """How alike two feature distributions are.

    Attributes:
        cka: linear CKA, in [0, 1] (Kornblith et al. 2019, arXiv 1905.00414); NaN without a cross-covariance.
        bures: Bures-Wasserstein distance of the covariances, in the units of the features.
    """

    cka: float
    bures: float


def likeness(
    W: Tensor, tuned: Tensor, inputs: Tensor | None, inputs_tuned: Tensor | None, cross: Tensor | None, largest: int
) -> Likeness:
    """Linear CKA and Bures-Wasserstein distance of y = W x and y' = W' x', from covariances (never second moments).

        CKA = ||Cov(y, y')||_F^2 / (||Sigma_Y||_F ||Sigma'_Y||_F)
        d^2 = tr Sigma_Y + tr Sigma'_Y - 2 tr (Sigma_Y^(1/2) Sigma'_Y Sigma_Y^(1/2))^(1/2)
            = min over orthogonal O of ||A - A' O||_F^2 with Sigma_Y = A A^T, Sigma'_Y = A' A'^T

    The second form of d does not cancel where the two are near (Bhatia, Jain, Lim 2019, arXiv 1712.01504, Theorem 1).

    Args:
        W, tuned: (m, n).   inputs, inputs_tuned: (n, n) Sigma_X and Sigma'_X; None for the identity.
        cross: (n, n) E[(x - mean)(x' - mean')^T]; Sigma_X itself where both see the same inputs. None: CKA is NaN.
        largest: min(m, n) above which the distance, which takes an SVD of that order, is NaN.
    Cost: three eigen- or singular value decompositions of order min(m, n).
    """
    p = min(W.shape)
    cka = _cka(W, tuned, inputs, inputs_tuned, cross) if cross is not None else float("nan")
    if p > largest:
        return Likeness(cka, float("nan"))
    A, A_tuned = _factor(W, inputs), _factor(tuned, inputs_tuned)  # (m, p)
    try:
        left, _, right = torch.linalg.svd(matmul(A_tuned.T, A))
    except RuntimeError as error:
        raise LapackError(str(error)) from error
    nearest = matmul(left, right)  # O
    return Likeness(cka, float(torch.linalg.vector_norm(A - matmul(A_tuned, nearest))))


@dataclass(frozen=True)
class SliceShares:
    """Per slice of neighbouring directions, (slices,) each.

    Attributes:
        bounds: (slices + 1,) first directions.
        block, cross: energy of Delta within the slice, and in its rows and columns outside of that block; over all
            slices sum(block + cross / 2) = ||Delta||_F^2.
        variance: sum of `variance` over the slice.   diagonal: sum of Delta_ii.
    """

    bounds: NDArray[np.intp]
    block: Array
    cross: Array
    variance: Array
    diagonal: Array


def slice_shares(delta: Tensor, variance: Tensor, slices: int) -> SliceShares:
    """Where along the directions the shift lies, in `slices` equal runs of them."""
    k = len(variance)
    bounds = np.linspace(0, k, min(slices, k) + 1).round().astype(np.intp)
    squares = delta.square().cpu().numpy()
    blocks = np.add.reduceat(np.add.reduceat(squares, bounds[:-1], axis=0), bounds[:-1], axis=1)
    within = np.diagonal(blocks).copy()
    pieces = [slice(low, high) for low, high in pairwise(bounds)]
    of_each = [np.array([float(x[piece].sum()) for piece in pieces]) for x in (variance, torch.diagonal(delta))]
    return SliceShares(bounds, within, blocks.sum(0) + blocks.sum(1) - 2 * within, *of_each)


def _times(X: Tensor, inputs: Tensor | None) -> Tensor:
    return X if inputs is None else matmul(X, inputs)


def _identity(W: Tensor) -> Tensor:
    return torch.eye(W.shape[1], dtype=W.dtype, device=W.device)


def _projected(Q: Tensor, X: Tensor) -> Tensor:
    """Q^T X Q, symmetric to the last bit as X is."""
    inside = matmul(Q.T, matmul(X, Q))
    return (inside + inside.T) / 2


def _energies(own: Tensor, inherited: Tensor | None) -> tuple[float, float, float]:
    """<own, own>, <inherited, inherited>, <own, inherited> of two matrices that are there."""
    if inherited is None:
        return float(own.square().sum()), 0.0, 0.0
    return float(own.square().sum()), float(inherited.square().sum()), float((own * inherited).sum())


def _energies_inside(
    tuned: Tensor, D: Tensor, inputs: Tensor | None, change: Tensor | None
) -> tuple[float, float, float]:
    """The same for m > n, without any m x m matrix.

    own = B M B^T and inherited = B N B^T with B = [W' D] (m x 2n), M = [[0, S], [S, -S]] and
    N = [[Sigma'_X - S, 0], [0, 0]], S = Sigma_X, so that <own, inherited> = tr(M G N G) with G = B^T B.
    """
    n = D.shape[1]
    B = torch.cat([tuned, D], dim=1)
    G = matmul(B.T, B)  # (2n, 2n)
    above, below = _times_left(inputs, G[n:]), _times_left(inputs, G[:n] - G[n:])
    H = torch.cat([above, below])  # M G
    own = float((H * H.T).sum())
    if change is None:
        return own, 0.0, 0.0
    K = matmul(change, G[:n])  # (n, 2n), the upper half of N G
    return own, float((K[:, :n] * K[:, :n].T).sum()), float((H[:, :n] * K.T).sum())


def _times_left(inputs: Tensor | None, X: Tensor) -> Tensor:
    return X if inputs is None else matmul(inputs, X)


def _root(inputs: Tensor | None, W: Tensor) -> Tensor:
    """L (n, n) with L L^T = Sigma_X; eigenvalues under zero are rounding."""
    if inputs is None:
        return _identity(W)
    values, vectors = _eigen(inputs)
    return vectors * values.clamp(min=0).sqrt()


def _eigen(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and vectors of a symmetric matrix. Raises: LapackError."""
    try:
        values, vectors = torch.linalg.eigh(X)
    except RuntimeError as error:
        raise LapackError(str(error)) from error
    return values, vectors


def _factor(W: Tensor, inputs: Tensor | None) -> Tensor:
    """A (m, min(m, n)) with A A^T = W Sigma_X W^T."""
    if W.shape[0] > W.shape[1]:
        return W if inputs is None else matmul(W, _root(inputs, W))
    return _root(matmul(_times(W, inputs), W.T), W)


def _cka(W: Tensor, tuned: Tensor, inputs: Tensor | None, inputs_tuned: Tensor | None, cross: Tensor | None) -> float:
    squares = []
    for one, between, other in ((W, cross, tuned), (W, inputs, W), (tuned, inputs_tuned, tuned)):
        if W.shape[0] <= W.shape[1]:
            squares.append(float(matmul(_times(one, between), other.T).square().sum()))
        else:  # tr(W^T W C W'^T W' C^T)
            first, second = matmul(one.T, one), matmul(other.T, other)
            squares.append(float((_times(first, between) * _times_left(between, second)).sum()))
    together, alone, alone_tuned = squares
    product = (alone * alone_tuned) ** 0.5
    return min(together / product, 1.0) if product > 0 else float("nan")

"""The update of a weight in the base's own singular basis: C = U^T D V, reduced to a few numbers per component.

Source: Quercia, Bangun, Assent, Scharr, *Least but not Last* (arXiv 2602.03493), Eqs. 6 and 7, in our reading: the
diagonal of C is how far singular values moved to first order, the rest how far directions turned. What the thin basis
of a rectangular W does not span is E, and is reported, never dropped. The definitions are in `spectra/definitions.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.batched import AnySpectrum, matmul
from spectra.linalg.lowrank import LowRank
from spectra.linalg.projected import Projected, project
from spectra.linalg.svd import Spectrum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

CLUSTER_GAP = 1e-6  # components closer than this (relative to s_0) have no direction of their own
BLOCK = 256  # rows of C that are reduced at once


@dataclass(frozen=True)
class Decomposition:
    """An update D split over the k components of its base. Arrays are (k,) float64 unless said otherwise.

    Of a stack of b updates every array but `slice_bounds` has a leading dimension b, and so have the shares.

    Attributes (symbols as in `spectra/definitions.md`):
        diagonal: C_ii, in the units of the weight.   relative_diagonal: C_ii / s_i.
        row_energy: sum_{j != i} C_ij^2.   column_energy: sum_{j != i} C_ji^2.
        outside_energy: squared norm of component i's row (n > m) or column (m > n) of E; 0 where m = n.
        plasticity: the share of ||D||_F^2 that component i carries; sums to 1 (0 where D = 0).
        left_stability: cos(W' v_i, u_i).   right_stability: cos(W'^T u_i, v_i).   stability: signed geometric mean of
            the two.
        rotation: first-order angle of u_i, radians; NaN inside a cluster of equal singular values.
        gap: (s_i - s_{i+1}) / s_0.
        update_energy: ||D||_F^2, from D itself.   size: max(m, n).
        slice_bounds: (slices + 1,) component indices.   block_energy, cross_energy: (slices,), of the slices' blocks of
            C.
    """

    diagonal: Array
    relative_diagonal: Array
    row_energy: Array
    column_energy: Array
    outside_energy: Array
    plasticity: Array
    left_stability: Array
    right_stability: Array
    stability: Array
    rotation: Array
    gap: Array
    update_energy: Array
    size: int
    slice_bounds: NDArray[np.intp]
    block_energy: Array
    cross_energy: Array

    @property
    def diagonal_share(self) -> Array:
        """sum_i C_ii^2 / ||D||_F^2; 0 where D = 0."""
        return _share((self.diagonal * self.diagonal).sum(-1), self.update_energy)

    @property
    def off_diagonal_share(self) -> Array:
        """sum_{i != j} C_ij^2 / ||D||_F^2; 0 where D = 0."""
        return _share(self.row_energy.sum(-1), self.update_energy)

    @property
    def outside_share(self) -> Array:
        """||E||_F^2 / ||D||_F^2; 0 where D = 0."""
        return _share(self.outside_energy.sum(-1), self.update_energy)

    @property
    def diagonal_enrichment(self) -> Array:
        """diagonal_share x max(m, n): 1 is what independent random entries give."""
        return self.diagonal_share * self.size


def decompose(
    base: AnySpectrum, update: Tensor | LowRank, slices: int = 8, gram: Tensor | None = None, rotation: bool = True
) -> Decomposition:
    """Split an update into singular-value changes and direction changes (LbnL, Eqs. 6-7, in our reading).

    Args:
        base: the spectrum of W (m x n), or of a stack of b such matrices.
        update: D = W' - W (m x n, or b x m x n), of the spectrum's dtype and device; or, for one matrix, its factors:
            then D is never formed.
        slices: into how many slices of neighbouring components the k components are cut for block and cross energies.
        rotation: False leaves it out (NaN) for a low-rank update, which spares the only work that grows with k^2.
        gram: the lower triangle of the Gram matrix of D on the short side where the caller has it; saves 2 p^2 q flops.
    Returns: a `Decomposition`; NaN in relative and cosine columns where s_i = 0.
    Raises: ValueError where the shapes differ.
    Cost: 2 m n k + 2 p k^2 flops dense, O((m + n + k) k r) low rank, with p = min(m, n); memory k^2 dense, O(k) low
        rank.

    >>> from spectra.linalg.svd import svd
    >>> W = torch.diag(torch.tensor([4.0, 2.0]))
    >>> round(float(decompose(svd(W), 0.1 * W).diagonal_share), 9)
    1.0
    """
    if tuple(update.shape[-2:]) != base.shape:
        raise ValueError(f"the update is {tuple(update.shape)}, the base {base.shape}")
    S = base.S.double()
    gap = base.gap
    clustered = _clustered(gap)
    k = S.shape[-1]
    bounds = np.linspace(0, k, min(slices, k) + 1).round().astype(np.intp)
    if isinstance(update, LowRank):
        assert isinstance(base, Spectrum)
        update = project(base, update)
        factored = _factored_core(update)
        sums = _reduce(factored, S, clustered, bounds) if rotation else _reduce_factored(factored, bounds)
        energy = torch.tensor(_factored_energy(update), dtype=torch.float64)
        outside = _factored_outside(base, update)
    else:
        if gram is None:
            energy = torch.linalg.vector_norm(update, dim=(-2, -1), dtype=torch.float64).square()
        else:
            energy = _trace(gram)
        scale = _scale(energy, update.dtype)
        D = update if scale == 1 else (update.double() / scale).to(update.dtype)
        sums = _reduce(_DenseCore(_dense_core(base, D), scale), S, clustered, bounds)
        outside = _dense_outside(base, D, scale, gram, sums)
    return _per_component(base, sums, outside.cpu().numpy(), energy.cpu().numpy()[()], gap, bounds)


class Core(Protocol):
    """C by blocks: rows [start, stop) of C, and of its transpose, as float64 tensors that the caller may overwrite.

    (stop - start, k) of one update, (b, stop - start, k) of a stack.
    """

    def rows(self, start: int, stop: int) -> Tensor: ...

    def columns(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class _DenseCore:
    C: Tensor  # (k, k) or (b, k, k), of D / scale
    scale: float

    def rows(self, start: int, stop: int) -> Tensor:
        return self.C[..., start:stop, :].to(torch.float64, copy=True).mul_(self.scale)

    def columns(self, start: int, stop: int) -> Tensor:
        return self.C[..., start:stop].mT.to(torch.float64, copy=True).mul_(self.scale)


@dataclass(frozen=True)
class _FactoredCore:
    P: Tensor  # (k, r) float64, c U^T B
    Q: Tensor  # (r, k) float64, A V

    def rows(self, start: int, stop: int) -> Tensor:
        return matmul(self.P[start:stop], self.Q)

    def columns(self, start: int, stop: int) -> Tensor:
        return matmul(self.Q[:, start:stop].T, self.P.T)


@dataclass(frozen=True)
class _Sums:
    """What is kept of C: everything else of it is dropped. With a leading dimension b of a stack."""

    diagonal: Array  # C_ii
    rows: Array  # sum_{j != i} C_ij^2
    columns: Array  # sum_{j != i} C_ji^2
    turned: Array  # sum_{j != i} t_ij^2, NaN inside a cluster
    blocks: Array  # (slices, slices) energy of each block of C


def _dense_core(base: AnySpectrum, D: Tensor) -> Tensor:
    """C = U^T D V (k x k), the long side contracted first."""
    m, n = base.shape
    if n >= m:
        return matmul(base.U.mT, matmul(D, base.V))  # (m, m)
    return matmul(matmul(base.U.mT, D), base.V)  # (n, n)


def _dense_outside(base: AnySpectrum, D: Tensor, scale: float, gram: Tensor | None, sums: _Sums) -> Tensor:
    """||E_i||^2 = ||D v_i||^2 - sum_j C_ji^2 (m > n), ||u_i^T D||^2 - sum_j C_ij^2 (n > m). `D` comes over `scale`."""
    m, n = base.shape
    if m == n:
        return torch.zeros(base.S.shape, dtype=torch.float64)
    X = base.V if m > n else base.U  # (p, p): the basis of the short side
    if gram is None:
        image = matmul(D if m > n else D.mT, X)
        total = (image.double() ** 2).sum(-2) * scale**2
    else:
        energy = _trace(gram).clamp(min=1e-300)  # ||D||_F^2: keeps float32 products in range
        total = _quadratic(gram, X, energy) * energy[..., None]
    inside = torch.from_numpy((sums.columns if m > n else sums.rows) + sums.diagonal**2).to(total.device)
    return (total - inside).clamp(min=0)


def _quadratic(lower: Tensor, X: Tensor, unit: Tensor | None = None) -> Tensor:
    """x_i^T G x_i for the columns of X, over `unit`, from the lower triangle of G, a block of its rows at a time."""
    p = lower.shape[-1]
    total = torch.zeros(*lower.shape[:-2], X.shape[-1], dtype=torch.float64, device=X.device)
    for start in range(0, p, BLOCK):
        here, stop = slice(start, start + BLOCK), min(start + BLOCK, p)
        rows = lower[..., here, :stop] if unit is None else lower[..., here, :stop] / unit[..., None, None]
        halved = rows.to(X.dtype, copy=True)  # (block, stop): nothing right of the diagonal
        torch.diagonal(halved, offset=start, dim1=-2, dim2=-1).mul_(0.5)
        total += (matmul(halved, X[..., :stop, :]).double() * X[..., here, :]).sum(-2)
    return 2 * total


def _trace(G: Tensor) -> Tensor:
    return torch.diagonal(G, dim1=-2, dim2=-1).sum(-1)


def _factored_core(D: Projected) -> _FactoredCore:
    return _FactoredCore(D.P, D.Q)


def _factored_outside(base: Spectrum, D: Projected) -> Tensor:
    """E = c (B - U U^T B) Q for m > n and its mirror image for n > m, as squared norms per component."""
    m, n = base.shape
    if m > n:
        left = D.B - matmul(base.U, (D.P / D.c).to(base.U.dtype)).double()  # (m, r)
        return _quadratic(torch.tril(matmul(left.T, left)), D.Q) * D.c**2
    if n > m:
        right = D.A.T - matmul(base.V, D.Q.T.to(base.V.dtype)).double()  # (n, r)
        return _quadratic(torch.tril(matmul(right.T, right)), D.P.T.contiguous())
    return torch.zeros(m, dtype=torch.float64)


def _factored_energy(D: Projected) -> float:
    """||D||_F^2: exact also where two products of factors nearly cancel."""
    return float(torch.linalg.vector_norm(D.values)) ** 2


def _scale(energy: Tensor, dtype: torch.dtype) -> float:
    """A power of two near ||D||_F where float32 products of D would leave the range of float32, else 1.

    Stacks are float64, and have no need of it.
    """
    if dtype == torch.float64:
        return 1.0
    norm = sqrt(float(energy))
    if norm == 0 or 1e-12 < norm < 1e12:
        return 1.0
    return float(2.0 ** np.round(np.log2(norm)))


def _clustered(gap: Array) -> NDArray[np.bool_]:
    """Whether component i lies within CLUSTER_GAP of a neighbour."""
    close = ~(gap >= CLUSTER_GAP)
    close[..., -1] = False  # the last one has no next one
    return close | np.roll(close, 1, axis=-1)


def _reduce(core: Core, S: Tensor, clustered: NDArray[np.bool_], bounds: NDArray[np.intp]) -> _Sums:
    """Row, column and block sums of C_ij^2 and t_ij^2 in float64, a block of rows at a time."""
    k, stack = S.shape[-1], S.shape[:-1]
    in_slice = torch.zeros(*stack, k, len(bounds) - 1, dtype=torch.float64, device=S.device)  # 1: component i is in a
    for index, (low, high) in enumerate(pairwise(bounds)):
        in_slice[..., low:high, index] = 1.0
    diagonal, rows, columns, turned = torch.zeros(4, *stack, k, dtype=torch.float64, device=S.device)
    blocks = torch.zeros(*stack, len(bounds) - 1, len(bounds) - 1, dtype=torch.float64, device=S.device)
    for start in range(0, k, BLOCK):
        here = slice(start, start + BLOCK)
        C, C_transposed = core.rows(start, start + BLOCK), core.columns(start, start + BLOCK)  # (block, k), C_ij, C_ji
        own = torch.diagonal(C, start, -2, -1)
        diagonal[..., here] = own
        own.zero_()
        s_i, s_j = S[..., here, None], S[..., None, :]
        angles = C_transposed.mul_(s_i).addcmul_(C, s_j)  # s_i C_ji + s_j C_ij
        angles /= (s_i - s_j) * (s_i + s_j)
        torch.diagonal(angles, start, -2, -1).zero_()
        turned[..., here] = angles.square_().sum(-1)
        squares = C.square_()
        by_slice = matmul(squares, in_slice)  # (block, slices)
        rows[..., here] = by_slice.sum(-1)
        columns += squares.sum(-2)
        blocks += matmul(in_slice[..., here, :].mT, by_slice)
    within = torch.diagonal(blocks, dim1=-2, dim2=-1)
    within += matmul(in_slice.mT, diagonal[..., None] ** 2)[..., 0]
    sums = (diagonal, rows, columns, turned, blocks)
    result = _Sums(*(each.cpu().numpy() for each in sums))
    result.turned[clustered] = np.nan
    return result


def _reduce_factored(core: _FactoredCore, bounds: NDArray[np.intp]) -> _Sums:
    """The same sums without rotation from r x r Gram matrices of the factors, O(k r^2)."""
    P, Q = core.P.cpu().numpy(), core.Q.cpu().numpy()  # (k, r), (r, k)
    diagonal = np.einsum("ir,ri->i", P, Q)
    rows = np.einsum("ir,rs,is->i", P, Q @ Q.T, P, optimize=True) - diagonal**2
    columns = np.einsum("ri,rs,si->i", Q, P.T @ P, Q, optimize=True) - diagonal**2
    pieces = [slice(low, high) for low, high in pairwise(bounds)]
    of_rows = np.array([P[piece].T @ P[piece] for piece in pieces])
    of_columns = np.array([Q[:, piece] @ Q[:, piece].T for piece in pieces])
    blocks = np.einsum("ars,brs->ab", of_rows, of_columns)
    return _Sums(diagonal, rows.clip(min=0), columns.clip(min=0), np.full(len(diagonal), np.nan), blocks)


def _per_component(
    base: AnySpectrum, sums: _Sums, outside: Array, update_energy: Array, gap: Array, bounds: NDArray[np.intp]
) -> Decomposition:
    m, n = base.shape
    s = base.S.cpu().numpy()
    C_ii, row, column = sums.diagonal, sums.rows, sums.columns
    moved = s + C_ii
    known = s > max(m, n) * np.finfo(np.float64).eps * s[..., :1]  # the directions of zeros are the solver's choice
    energy = np.asarray(update_energy)[..., None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative = np.where(known, C_ii / s, np.nan)
        left = moved / np.sqrt(moved**2 + column + (outside if m > n else 0.0))  # cos(W' v_i, u_i)
        right = moved / np.sqrt(moved**2 + row + (outside if n > m else 0.0))  # cos(W'^T u_i, v_i)
        left, right = np.where(known, left, np.nan), np.where(known, right, np.nan)
        leaving = outside / s**2 if m > n else 0.0
        rotation = np.where(known, np.sqrt(sums.turned + leaving), np.nan)
        share = np.where(energy > 0, (C_ii**2 + (row + column) / 2 + outside) / energy, 0.0)
    within = np.diagonal(sums.blocks, axis1=-2, axis2=-1).copy()
    return Decomposition(
        diagonal=C_ii,
        relative_diagonal=relative,
        row_energy=row,
        column_energy=column,
        outside_energy=outside,
        plasticity=share,
        left_stability=left,
        right_stability=right,
        stability=np.copysign(np.sqrt(left * right), moved),
        rotation=rotation,
        gap=gap,
        update_energy=update_energy,
        size=max(m, n),
        slice_bounds=bounds,
        block_energy=within,
        cross_energy=sums.blocks.sum(-2) + sums.blocks.sum(-1) - 2 * within,
    )


def _share(energy: Array, total: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        share: Array = np.where(total > 0, np.divide(energy, total), 0.0)
    return share[()]

"""Spectra of many equal-shaped matrices at once: attention heads, experts, convolution kernels, and a GPU's share.

Alone, a 64 x 64 matrix costs more in calls than in arithmetic. Here a stack (b, m, n) goes through each step together.
The way is that of `svd` and `triplets`, a float64 Gram matrix on the short side and its eigenvectors, without their
second solution of the tail: matrices that need it are told apart by `sound` and solved in another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spectra.linalg import products
from spectra.linalg.lapack import LapackError
from spectra.linalg.svd import CERTIFICATE, DIVIDE_AND_CONQUER, GRAM, TAIL, Spectrum, svd
from spectra.linalg.triplets import VALUES_TAIL, Triplets, leading_triplets, singular_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHORT_SIDE, ENTRIES = 128, 1 << 16  # up to here, one core is faster with stacks than with one matrix at a time


def is_small(m: int, n: int) -> bool:
    """Whether the CPU measures m x n matrices in stacks: those whose calls would cost as much as their arithmetic."""
    return min(m, n) <= SHORT_SIDE and m * n <= ENTRIES


@dataclass(frozen=True)
class Spectra:
    """W_l = U_l S_l V_l^T, thin, of b matrices m x n; k = min(m, n). All float64, on one device.

    Attributes:
        U: (b, m, k).   S: (b, k), descending.   V: (b, n, k).
        sound: (b,) bool; where False, the matrix needs a solver that does not square it.
        algorithms: which solver gave each of them.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    sound: Tensor
    algorithms: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[-2], self.V.shape[-2]

    @property
    def gap(self) -> NDArray[np.float64]:
        """(b, k) relative gap to the next value, as of `Spectrum`."""
        S = self.S.cpu().numpy()
        with np.errstate(invalid="ignore"):
            gap: NDArray[np.float64] = (S - np.concatenate([S[:, 1:], np.zeros((len(S), 1))], axis=1)) / S[:, :1]
        return gap

    def select(self, index: list[int]) -> Spectra:
        """Those of some of the matrices; a copy, unless it is all of them in order."""
        if index == list(range(len(self.algorithms))):
            return self
        algorithms = tuple(self.algorithms[i] for i in index)
        return Spectra(self.U[index], self.S[index], self.V[index], self.sound[index], algorithms)


@dataclass(frozen=True)
class ManyTriplets:
    """All singular values of b matrices m x n and their j leading triplets. All float64, on one device.

    Attributes:
        Y: (b, m, j).   S: (b, k), descending.   Z: (b, n, j).   sound, algorithms: as of `Spectra`.
    """

    Y: Tensor
    S: Tensor
    Z: Tensor
    sound: Tensor
    algorithms: tuple[str, ...]


AnySpectrum = Spectrum | Spectra
AnyTriplets = Triplets | ManyTriplets


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B for two matrices or two stacks of equally many, of one dtype and device; the bits of a product in a stack do
    not depend on the others.

    Stacks on the CPU always go through numpy: what MKL (torch) rounds to depends on where in memory a matrix starts.
    """
    if A.ndim == B.ndim == 2:
        return products.matmul(A, B)
    return torch.from_numpy(np.matmul(A.numpy(), B.numpy())) if A.device.type == "cpu" else A @ B


def gram_spectra(W: Tensor) -> Spectra:
    """The thin SVDs of a stack from its Gram matrices: |ds_i| <= q u s_0^2 / (2 s_i) as for `svd`, where `sound`.

    `sound` asks for eigenvalues that add up (trace, Frobenius norm) and no value under TAIL s_0, whose vectors on the
    long side squaring would spoil; a zero or rank-deficient matrix is never sound. No step depends on the numbers.

    Args: W (b, m, n), float64, on any device (also `meta`), finite; float32 or narrower in origin, so that squaring
        loses nothing.
    Raises: LapackError where the eigensolver fails for one of the stack.
    Cost: b (2 p^2 q + 9 p^3 + 2 p^2 q) flops, p = min(m, n), q = max(m, n).
    """
    A = _short_side_first(W)  # (b, p, q)
    G = matmul(A, A.mT)  # (b, p, p)
    squares, short = _eigen(G)
    S = squares.clamp(min=0).sqrt()
    long = matmul(A.mT, short) / S[:, None, :]  # (b, q, p)
    sound = _adds_up(squares, G) & (S[:, -1] > TAIL * S[:, 0])
    U, V = (short, long) if W.shape[1] <= W.shape[2] else (long, short)
    return Spectra(U, S, V, sound, (GRAM,) * len(W))


def gram_triplets(W: Tensor, count: int) -> ManyTriplets:
    """All singular values and the `count` leading triplets of a stack; arguments, errors and `sound` as above, but
    values may be as small as VALUES_TAIL s_0 where they are not among the leading ones."""
    A = _short_side_first(W)
    count = min(count, A.shape[1])
    G = matmul(A, A.mT)
    squares, vectors = _eigen(G)
    S, short = squares.clamp(min=0).sqrt(), vectors[:, :, :count].contiguous()  # (b, p, count)
    long = matmul(A.mT, short) / S[:, None, :count]  # (b, q, count)
    sound = _adds_up(squares, G) & (S[:, -1] > VALUES_TAIL * S[:, 0]) & (S[:, count - 1] > TAIL * S[:, 0])
    Y, Z = (short, long) if W.shape[1] <= W.shape[2] else (long, short)
    return ManyTriplets(Y, S, Z, sound, (GRAM,) * len(W))


def gram_values(G: Tensor) -> tuple[Tensor, Tensor]:
    """All singular values of a stack from its Gram matrices G (b, p, p): (b, p), descending, and `sound` (b,)."""
    squares = _eigenvalues(G)
    S = squares.clamp(min=0).sqrt()
    return S, _adds_up(squares, G) & (S[:, -1] > VALUES_TAIL * S[:, 0])


def spectra(W: Tensor, squarable: bool) -> Spectra:
    """The thin SVD of every matrix of a stack, with the accuracy of `svd`: 1e-11 s_0, zeros included.

    Args: W (b, m, n), float64 and finite; squarable: its entries are float32 or narrower in origin.
    Raises: LapackError where a solver fails for one of the stack.

    >>> spectra(torch.diag(torch.tensor([1.0, 3.0])).double()[None], squarable=True).S.tolist()
    [[3.0, 1.0]]
    """
    if not squarable:
        return _direct(W)
    found = gram_spectra(W)
    for index in _unsound(found.sound, W):
        if is_small(*found.shape):
            again = _direct(W[index])
        else:
            one = svd(W[index[0]].float(), torch.float64)
            again = Spectra(one.U[None], one.S[None], one.V[None], found.sound[index], (one.algorithm,))
        for X, Y in ((found.U, again.U), (found.S, again.S), (found.V, again.V)):
            X[index] = Y
        found = replace(found, algorithms=_renamed(found.algorithms, index, again.algorithms))
    return found


def triplets(W: Tensor, count: int, squarable: bool) -> ManyTriplets:
    """All singular values and the leading triplets of every matrix of a stack, with the accuracy of `leading_triplets`.

    Arguments and errors as of `spectra`.
    """
    if not squarable:
        return _leading(_direct(W), count)
    found = gram_triplets(W, count)
    for index in _unsound(found.sound, W):
        if is_small(W.shape[1], W.shape[2]):
            again = _leading(_direct(W[index]), count)
        else:
            one = leading_triplets(W[index[0]].float(), count)
            Y, Z = one.Y.double()[None], one.Z.double()[None]
            again = ManyTriplets(Y, one.S[None], Z, found.sound[index], (one.algorithm,))
        for X, Y in ((found.Y, again.Y), (found.S, again.S), (found.Z, again.Z)):
            X[index] = Y
        found = replace(found, algorithms=_renamed(found.algorithms, index, again.algorithms))
    return found


def values(D: Tensor, G: Tensor, squarable: bool) -> Tensor:
    """All singular values (b, k) of every matrix of a stack D (b, m, n), whose Gram matrices on the short side are G.

    Accuracy, arguments and errors as of `singular_values`.
    """
    if not squarable:
        return _direct_values(D)
    S, sound = gram_values(G)
    for index in _unsound(sound, D):
        small = is_small(D.shape[1], D.shape[2])
        S[index] = _direct_values(D[index]) if small else singular_values(D[index[0]])[None]
    return S


def _short_side_first(W: Tensor) -> Tensor:
    return W if W.shape[1] <= W.shape[2] else W.mT


def _unsound(sound: Tensor, W: Tensor) -> list[list[int]]:
    """The matrices to be solved again, in groups: small ones together, large ones one at a time."""
    again: list[int] = torch.nonzero(~sound).flatten().tolist()
    if is_small(W.shape[1], W.shape[2]):
        return [again] if again else []
    return [[index] for index in again]


def _renamed(names: tuple[str, ...], index: list[int], by: tuple[str, ...]) -> tuple[str, ...]:
    changed = dict(zip(index, by, strict=True))
    return tuple(changed.get(i, name) for i, name in enumerate(names))


def _adds_up(squares: Tensor, G: Tensor) -> Tensor:
    """Whether sum(lambda) = tr G and sum(lambda^2) = ||G||_F^2 to rounding, both finite and no denormal: (b,) bool."""
    trace = torch.diagonal(G, dim1=1, dim2=2).sum(1)
    squared_norm = (G * G).sum((1, 2))
    agrees = (squares.sum(1) - trace).abs() <= CERTIFICATE * trace
    agrees &= ((squares * squares).sum(1) - squared_norm).abs() <= CERTIFICATE * squared_norm
    return agrees & torch.isfinite(squared_norm) & (squared_norm > torch.finfo(torch.float64).tiny / CERTIFICATE)


# On the CPU numpy's LAPACK, which copies each matrix of a stack to the same place first: torch's (MKL) rounds by where
# in memory it starts. Both release the interpreter lock.


@contextmanager
def _refusals() -> Iterator[None]:
    """What a library calls a failure of its solver, as LapackError; memory that ran out stays what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, np.linalg.LinAlgError) as error:
        raise LapackError(str(error)) from error


def _eigen(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (b, p), descending, and their vectors as columns (b, p, p)."""
    with _refusals():
        if G.device.type == "cpu":
            squares, vectors = (torch.from_numpy(X) for X in np.linalg.eigh(G.numpy()))
        else:
            squares, vectors = torch.linalg.eigh(G)
    return squares.flip(1), vectors.flip(2)


def _eigenvalues(G: Tensor) -> Tensor:
    with _refusals():
        found = torch.from_numpy(np.linalg.eigvalsh(G.numpy())) if G.device.type == "cpu" else torch.linalg.eigvalsh(G)
    return found.flip(1)


def _direct(W: Tensor) -> Spectra:
    """Divide and conquer (gesdd) on W itself: exact zeros, full vectors, no digit lost to squaring."""
    with _refusals():
        if W.device.type == "cpu":
            U, S, Vh = (torch.from_numpy(X) for X in np.linalg.svd(W.numpy(), full_matrices=False))
        else:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    sound = torch.ones(len(W), dtype=torch.bool, device=W.device)
    return Spectra(U, S, Vh.mT.contiguous(), sound, (DIVIDE_AND_CONQUER,) * len(W))


def _direct_values(D: Tensor) -> Tensor:
    with _refusals():
        if D.device.type == "cpu":
            return torch.from_numpy(np.linalg.svd(D.numpy(), compute_uv=False))
        found: Tensor = torch.linalg.svdvals(D)
    return found


def _leading(full: Spectra, count: int) -> ManyTriplets:
    Y, Z = (X[:, :, :count].contiguous() for X in (full.U, full.V))
    return ManyTriplets(Y, full.S, Z, full.sound, full.algorithms)

"""Eigenvalues and chosen eigenvectors of a symmetric matrix, from one reduction, on any device."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from spectra.linalg.lapack import LapackError, Tridiagonal, reduce_to_tridiagonal


class Eigen(Protocol):
    """What can be asked of a reduced p x p symmetric matrix; eigenvalues descend, as singular values do."""

    def values(self) -> Tensor: ...

    def vectors(self) -> tuple[Tensor, Tensor]: ...

    def vectors_between(self, start: int, stop: int) -> tuple[Tensor, Tensor]: ...


def reduce_symmetric(G: Tensor) -> Eigen:
    """Reduce a symmetric float64 matrix given by its lower triangle. Overwrites `G` on the CPU.

    On the CPU: Householder tridiagonalisation, after which values cost O(p^2) and r vectors 2 p^2 r flops more.
    Elsewhere the library's own full eigendecomposition, done at the first question.
    """
    if G.device.type == "cpu":
        return _Reduced(reduce_to_tridiagonal(G.numpy()))
    return _Decomposed(G)


class _Reduced:
    def __init__(self, tridiagonal: Tridiagonal) -> None:
        self.tridiagonal = tridiagonal

    def values(self) -> Tensor:
        return torch.from_numpy(self.tridiagonal.eigenvalues())

    def vectors(self) -> tuple[Tensor, Tensor]:
        values, vectors = self.tridiagonal.eigenvectors()
        return torch.from_numpy(values), torch.from_numpy(vectors)

    def vectors_between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        values, vectors = self.tridiagonal.eigenvectors_between(start, stop)
        return torch.from_numpy(values), torch.from_numpy(vectors)


class _Decomposed:
    def __init__(self, G: Tensor) -> None:
        self.G = G

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        try:
            values, vectors = torch.linalg.eigh(self.G)
        except RuntimeError as error:
            raise LapackError(str(error)) from error
        return values.flip(0), vectors.flip(1)

    def values(self) -> Tensor:
        return self._all[0]

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self._all

    def vectors_between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        values, vectors = self._all
        return values[start:stop], vectors[:, start:stop]

"""Eigenvalues and chosen eigenvectors of a symmetric matrix, from one reduction, on any device."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from spectra.linalg.banded import Banded, reduce_to_band
from spectra.linalg.lapack import LapackError, Tridiagonal, reduce_to_tridiagonal

LARGE = 2560  # sides from which the matrix outgrows the processor's cache, and two stages are the faster way to values


class Eigen(Protocol):
    """What can be asked of a reduced p x p symmetric matrix; eigenvalues descend, as singular values do."""

    def values(self) -> Tensor: ...

    def vectors(self) -> tuple[Tensor, Tensor]: ...

    def vectors_between(self, start: int, stop: int) -> tuple[Tensor, Tensor]: ...


def reduce_symmetric(G: Tensor, few: bool = False) -> Eigen:
    """Reduce a symmetric float64 matrix given by its lower triangle. Overwrites `G` on the CPU.

    On the CPU: Householder tridiagonalisation, after which values cost O(p^2) and r vectors 2 p^2 r flops more.
    Elsewhere the library's own full eigendecomposition, done at the first question.

    Args: few: whether values and at most MOST_VECTORS vectors will do, which large matrices have at two thirds of the
        cost; more of them are refused then (LapackError).
    """
    if G.device.type != "cpu":
        return _Decomposed(G)
    if few and len(G) >= LARGE:
        return _Banded(reduce_to_band(G.numpy()))
    return _Reduced(reduce_to_tridiagonal(G.numpy()))


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


class _Banded:
    def __init__(self, banded: Banded) -> None:
        self.banded = banded

    def values(self) -> Tensor:
        return torch.from_numpy(self.banded.eigenvalues)

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.vectors_between(0, len(self.banded.eigenvalues))

    def vectors_between(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        vectors = self.banded.eigenvectors_between(start, stop)
        return self.values()[start:stop], torch.from_numpy(vectors)


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

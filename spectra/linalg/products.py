"""Matrix products on whichever library multiplies faster on this machine, and Gram matrices in float64."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.lapack import add_gram, add_symmetric_product

CLEARLY_FASTER = 1.5
CHUNK = 512  # columns that are upcast to float64 at once, so that no float64 copy of a whole weight is made


@dataclass(frozen=True)
class Difference:
    """A - B of two (p x q) matrices of any real floating dtypes, made in float64 of one block at a time.

    Two float32 numbers that are not 2^29 apart in size differ by a number that float64 holds exactly. Rounded to
    float32, the difference would move its singular values by up to 1e-8 of the largest.

    >>> float(Difference(torch.tensor([1 + 2.0**-20]), torch.tensor([2.0**-30])).double() - 1) == 2.0**-20 - 2.0**-30
    True
    """

    A: Tensor
    B: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.A.shape

    @property
    def device(self) -> torch.device:
        return self.A.device

    @property
    def T(self) -> Difference:
        return Difference(self.A.T, self.B.T)

    def __getitem__(self, index: Any) -> Difference:
        """The difference of what `index` picks of both, not formed."""
        return Difference(self.A[index], self.B[index])

    def double(self) -> Tensor:
        """A - B, formed."""
        return self.A.to(torch.float64, copy=True).sub_(self.B.double())


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B for two matrices of one dtype (float32 or float64) and device.

    On the CPU torch and numpy bring different BLAS libraries, up to 2.3 times apart on one processor; a probe of some
    milliseconds, once a process, decides. Both are IEEE; neither uses TF32 or bfloat16 inside.
    """
    if A.device.type == "cpu" and gemm_library() == "numpy":
        return torch.from_numpy(A.numpy() @ B.numpy())
    return A @ B


@cache
def gemm_library() -> Literal["numpy", "torch"]:
    """The library that float32 and float64 products run on: numpy's, unless torch's was clearly faster just now.

    The margin keeps the choice, and with it the last bits of all results, the same from run to run.
    """
    seconds = {"numpy": float("inf"), "torch": float("inf")}
    pair = [torch.ones(384, 384, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    for _ in range(4):  # the fastest lap counts: the first wakes the library up, others may be disturbed
        start = time.thread_time()
        for a in pair:
            np.matmul(a.numpy(), a.numpy())
        seconds["numpy"] = min(seconds["numpy"], time.thread_time() - start)
        start = time.thread_time()
        for a in pair:
            torch.matmul(a, a)
        seconds["torch"] = min(seconds["torch"], time.thread_time() - start)
    return "torch" if CLEARLY_FASTER * seconds["torch"] < seconds["numpy"] else "numpy"


def gram(A: Tensor | Difference) -> Tensor:
    """The lower triangle of A A^T, in float64, with zeros above it; p^2 q flops.

    Args: A (p x q), any real floating dtype. The products of float32 entries are exact in float64, so that
    ||error|| <= q u ||A||^2 with u = 1.1e-16.   Returns: (p x p) float64 on A's device, in Fortran order on the CPU.
    """
    p, q = A.shape
    if A.device.type != "cpu":
        wide = A.double()
        return torch.tril(wide @ wide.T)
    return gram_of_blocks((A[:, start : start + CHUNK].double() for start in range(0, q, CHUNK)), p, A.device)


def gram_of_blocks(blocks: Iterable[Tensor], p: int, device: torch.device) -> Tensor:
    """`gram` of a matrix that is given by blocks of its columns, each (p x any), float64, on `device`."""
    if device.type != "cpu":
        total = torch.zeros(p, p, dtype=torch.float64, device=device)
        for block in blocks:
            total += torch.tril(block @ block.T)
        return total
    G = np.zeros((p, p), order="F")
    for block in blocks:
        add_gram(_dense(block), G)
    return torch.from_numpy(G)


def diagonal_plus_product(diagonal: Tensor, P: Tensor, Z: Tensor) -> Tensor:
    """The lower triangle of diag(d) + P Z^T + Z P^T, with zeros above it; 2 p^2 r flops.

    Args: d (p,), P and Z (p x r), float64.   Returns: (p x p) on their device, in Fortran order on the CPU.
    """
    if diagonal.device.type != "cpu":
        half = P @ Z.T
        return torch.tril(half + half.T + torch.diag(diagonal))
    G = np.zeros((len(diagonal),) * 2, order="F")
    np.fill_diagonal(G, diagonal.numpy())
    add_symmetric_product(np.asfortranarray(P.numpy()), np.asfortranarray(Z.numpy()), G)
    return torch.from_numpy(G)


def product64(A: Tensor | Difference, X: Tensor) -> Tensor:
    """A X in float64 for A (p x q, any floating dtype) and X (q x r, float64), upcasting A by blocks of rows."""
    result = torch.empty(A.shape[0], X.shape[1], dtype=torch.float64, device=A.device)
    for start in range(0, A.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        result[rows] = matmul(A[rows].double(), X)
    return result


def _dense(block: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The block without gaps in memory, in its own order of rows and columns; a copy only where it has gaps."""
    if block.stride(0) <= block.stride(1):
        return block.T.contiguous().numpy().T
    return block.contiguous().numpy()

"""Matrix products on whichever library multiplies faster on this machine, and Gram matrices in float64."""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.lapack import add_gram, add_symmetric_product

CLEARLY_FASTER = 1.5
CHUNK = 512  # columns that are upcast to float64 at once, so that no float64 copy of a whole weight is made


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


def gram(A: Tensor) -> Tensor:
    """The lower triangle of A A^T, in float64, with zeros above it; p^2 q flops.

    Args: A (p x q), any real floating dtype. The products of float32 entries are exact in float64, so that
    ||error|| <= q u ||A||^2 with u = 1.1e-16.   Returns: (p x p) float64 on A's device, in Fortran order on the CPU.
    """
    p, q = A.shape
    if A.device.type != "cpu":
        wide = A.double()
        return torch.tril(wide @ wide.T)
    G = np.zeros((p, p), order="F")
    for start in range(0, q, CHUNK):
        add_gram(_float64(A[:, start : start + CHUNK]), G)
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


def product64(A: Tensor, X: Tensor) -> Tensor:
    """A X in float64 for A (p x q, any floating dtype) and X (q x r, float64), upcasting A by blocks of rows."""
    result = torch.empty(A.shape[0], X.shape[1], dtype=torch.float64, device=A.device)
    for start in range(0, A.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        result[rows] = matmul(A[rows].double(), X)
    return result


def _float64(block: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A dense float64 copy whose memory order follows the block's own, whichever is cheaper to read."""
    if block.stride(0) <= block.stride(1):
        return block.T.double().contiguous().numpy().T
    return block.double().contiguous().numpy()

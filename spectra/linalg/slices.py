"""A slice [start, start + rank) of singular triplets, without the rest of the decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from spectra.linalg.banded import MOST_VECTORS
from spectra.linalg.lapack import LapackError
from spectra.linalg.products import matmul, product64
from spectra.linalg.svd import GRAM, TAIL, Spectrum, certified_reduction, svd

FEW = 0.4  # above this share of all components the whole decomposition is the cheaper way


def singular_slice(W: Tensor, start: int, rank: int) -> Spectrum:
    """Singular triplets start, ..., start + rank - 1 of W (m x n), as exact as a float64 SVD gives them.

    The vectors come from one tridiagonal reduction of the Gram matrix and are cleaned of what squaring left in them by
    a small SVD of U_r^T W. A slice that reaches into the tail (under 1e-4 s_0), where squares cannot tell components
    apart, and one of a large share of all components, is cut from the whole decomposition.

    Returns: a `Spectrum` with U (m x rank), S (rank,), V (n x rank), all float64.
    Raises: ValueError where [start, start + rank) does not lie in [0, min(m, n)]; NotFiniteError for NaN or infinite
        entries.
    Cost: p^2 q + 4/3 p^3 + 2 p (p + q) rank float64 flops, p = min(m, n), q = max(m, n).

    >>> singular_slice(torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5])), 1, 2).S.tolist()
    [3.0, 2.0]
    """
    m, n = W.shape
    p, stop = min(m, n), start + rank
    if not 0 <= start < stop <= p:
        raise ValueError(f"the slice [{start}, {stop}) does not lie in the {p} components of a {m} x {n} matrix")
    if W.dtype == torch.float64 or rank > FEW * p:
        return _cut(W, start, stop)
    A = (W if m <= n else W.T).float()
    try:
        reduced, squared = certified_reduction(A, few=rank <= MOST_VECTORS)
        if not squared[stop - 1] > TAIL**2 * squared[0]:
            return _cut(W, start, stop)
        rough = reduced.vectors_between(start, stop)[1]  # (p, rank)
    except LapackError:
        return _cut(W, start, stop)
    Q, R = torch.linalg.qr(product64(A.T, rough))  # (q, rank): A^T U_r = Q R
    left, S, right_transposed = torch.linalg.svd(R)
    short, long = matmul(rough, right_transposed.T), matmul(Q, left)
    return Spectrum(short, S, long, GRAM) if m <= n else Spectrum(long, S, short, GRAM)


def _cut(W: Tensor, start: int, stop: int) -> Spectrum:
    whole = svd(W, torch.float64)
    return Spectrum(whole.U[:, start:stop], whole.S[start:stop], whole.V[:, start:stop], whole.algorithm)

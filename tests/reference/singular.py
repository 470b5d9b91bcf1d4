"""The singular value decomposition that the other references stand on.

The modules of this folder are slow float64 definitions that everything fast is checked against: plain numpy and LAPACK,
nothing of it shared with the code under test. They take numpy arrays. LAPACK's `gesvd` (QR iteration) is the most
careful of its singular value decompositions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]


class SVD(NamedTuple):
    """W = U diag(s) V^T, thin: U (m, k), s (k,) descending, V (n, k)."""

    U: Array
    s: Array
    V: Array


def svd(W: Array) -> SVD:
    """Thin SVD of W (m x n) by LAPACK's gesvd in float64.

    W is brought near norm 1 by a power of two first, which is exact and keeps LAPACK away from underflow.
    """
    exponent = scale_exponent(W)
    U, s, Vt = scipy.linalg.svd(np.ldexp(W, -exponent), full_matrices=False, lapack_driver="gesvd")
    return SVD(U, np.ldexp(s, exponent), Vt.T)


def scale_exponent(W: Array) -> int:
    """The power of two of W's largest entry; 0 where W is zero."""
    return int(np.frexp(np.abs(W).max(initial=0.0))[1])


def clusters(s: Array, tolerance: float = 1e-4) -> list[slice]:
    """Runs of neighbouring singular values closer than `tolerance` * s_0: within one, no single vector is defined."""
    edges = [0, *(np.flatnonzero(s[:-1] - s[1:] > tolerance * s[0]) + 1).tolist(), len(s)]
    return [slice(start, stop) for start, stop in pairwise(edges)]

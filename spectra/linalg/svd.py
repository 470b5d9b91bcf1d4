"""The singular value decomposition of one weight matrix, exact where float32 routines are not.

float32 entries are exact in float64, and so are their products: the float64 Gram matrix G = A A^T on the short side
carries an error ||dG|| <= q u s_0^2 with u = 1.1e-16. Its eigenvalues give every singular value to q u s_0^2 / (2 s_i),
which beats a float32 SVD (error about u_32 s_0) for all s_i > 1e-9 s_0, at less than half of its cost. What squaring
does spoil, vectors on the long side and values in the tail, is solved a second time without it (`_tail`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spectra.errors import SpectraError
from spectra.linalg.lapack import LapackError
from spectra.linalg.products import CHUNK, gram, matmul, product64
from spectra.linalg.symmetric import Eigen, reduce_symmetric

if TYPE_CHECKING:
    from numpy.typing import NDArray

TAIL = 1e-4  # singular values under TAIL * s_0 are solved again without squaring
CERTIFICATE = 1e-11  # relative disagreement of trace and Frobenius norm at which an eigensolution is not believed
GRAM, DIVIDE_AND_CONQUER, QR_ITERATION = "gram64", "gesdd64", "gesvd64"


class NotFiniteError(SpectraError):
    """A matrix holds NaN or infinite entries and has no singular values."""


@dataclass(frozen=True)
class Spectrum:
    """W = U S V^T, thin, of an m x n matrix; k = min(m, n).

    Attributes:
        U: (m, k) left singular vectors u_i as columns, float32 (float64 where W or the request is).
        S: (k,) singular values, float64, descending.
        V: (n, k) right singular vectors v_i as columns, of U's dtype.
        algorithm: which solver gave it ("gram64", "gesdd64", "gesvd64").
    """

    U: Tensor
    S: Tensor
    V: Tensor
    algorithm: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.V.shape[0]

    @property
    def gap(self) -> NDArray[np.float64]:
        """(k,) relative gap (s_i - s_{i+1}) / s_0 to the next value, the last one to zero; NaN where s_0 = 0."""
        S = self.S.cpu().numpy()
        with np.errstate(invalid="ignore"):
            gap: NDArray[np.float64] = (S - np.append(S[1:], 0.0)) / S[0]
        return gap


def svd(W: Tensor, dtype: torch.dtype | None = None) -> Spectrum:
    """The thin SVD of W, with |ds_i| <= 1e-11 s_0 and vectors to 1e-6 (1e-8 in float64).

    Args:
        W: (m, n), a real floating dtype; float16 and bfloat16 are upcast first. A float64 W is decomposed directly,
            since squaring it would cost half of its digits.
        dtype: of U and V: float32 by default, float64 for a float64 W.
    Returns: a `Spectrum` on W's device.
    Raises: NotFiniteError where an entry is NaN or infinite.
    Cost: p^2 q + 14/3 p^3 + 2 p^2 q float64 flops, with p = min(m, n), q = max(m, n).

    >>> W = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    >>> svd(W).S.tolist()
    [4.0, 3.0]
    """
    stored = dtype or (torch.float64 if W.dtype == torch.float64 else torch.float32)
    m, n = W.shape
    A = W if m <= n else W.T  # (p, q), p <= q
    if W.dtype == torch.float64:
        short, S, long, algorithm = _direct_or_slow(A)
    else:
        try:
            short, S, long, algorithm = *_by_gram(A.float(), stored), GRAM
        except LapackError:
            short, S, long, algorithm = _direct_or_slow(A)
    short, long = short.to(stored), long.to(stored)
    return Spectrum(short, S, long, algorithm) if m <= n else Spectrum(long, S, short, algorithm)


def gram_certified(A: Tensor) -> tuple[Tensor, float, float]:
    """The Gram matrix of A (p x q), its trace and its squared Frobenius norm: what its eigenvalues must add up to.

    Raises NotFiniteError where A is not finite: squares of float32 do not overflow float64, so the trace tells.
    """
    G = gram(A)
    trace, squared_norm = certificates(G)
    if not np.isfinite(trace):
        raise NotFiniteError(f"{describe_not_finite(A)}: it has no singular values")
    return G, trace, squared_norm


def certificates(G: Tensor) -> tuple[float, float]:
    """The trace and the squared Frobenius norm of a symmetric matrix given by its lower triangle, zeros above."""
    diagonal = torch.diagonal(G)
    squared_norm = 2 * float(torch.linalg.vector_norm(G)) ** 2 - float(torch.linalg.vector_norm(diagonal)) ** 2
    return float(diagonal.sum()), squared_norm


def certified_reduction(A: Tensor, few: bool) -> tuple[Eigen, Tensor]:
    """The reduced Gram matrix of A (p x q), to ask for (`few`) vectors, and its eigenvalues, descending and certified.

    Raises NotFiniteError where A is not finite, LapackError where the eigenvalues do not add up.
    """
    return reduced_gram(*gram_certified(A), few)


def reduced_gram(G: Tensor, trace: float, squared_norm: float, few: bool) -> tuple[Eigen, Tensor]:
    """A Gram matrix reduced, which overwrites it, and its eigenvalues, held against its trace and norm."""
    reduced = reduce_symmetric(G, few)
    values = reduced.values()
    certify(values, trace, squared_norm)
    return reduced, values


def certify(eigenvalues: Tensor, trace: float, squared_norm: float) -> None:
    """Raise LapackError unless sum(lambda) = tr G and sum(lambda^2) = ||G||_F^2 to rounding."""
    found, found_squared = float(eigenvalues.sum()), float((eigenvalues * eigenvalues).sum())
    if not (
        abs(found - trace) <= CERTIFICATE * trace and abs(found_squared - squared_norm) <= CERTIFICATE * squared_norm
    ):
        raise LapackError(f"eigenvalues sum to {found!r}, the trace is {trace!r}")


def describe_not_finite(A: Tensor) -> str:
    """'3 NaN and 1 infinite among its 64 entries'."""
    nan, infinite = int(torch.isnan(A).sum()), int(torch.isinf(A).sum())
    parts = [f"{count} {word}" for count, word in ((nan, "NaN"), (infinite, "infinite")) if count]
    return f"{' and '.join(parts)} among its {A.numel()} entries"


def _by_gram(A: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """U (p x p), S (p) and V (q x p, as `stored`) of A (p x q, p <= q) from the eigenvectors of its Gram matrix."""
    G, trace, squared_norm = gram_certified(A)
    values, U = reduce_symmetric(G).vectors()
    certify(values, trace, squared_norm)
    del G
    S = values.clamp(min=0).sqrt()
    V = torch.empty(A.shape[1], A.shape[0], dtype=stored, device=A.device)
    head = int((TAIL * S[0] < S).sum())
    if head < len(S):
        U[:, head:], S[head:], V[:, head:] = _tail(A, U, S, head)
    bulk = min(head, _float32_columns(S)) if stored == torch.float32 else 0
    for start in range(0, A.shape[1], CHUNK):
        block = slice(start, start + CHUNK)
        V[block, :bulk] = matmul(A[:, block].T, U[:, :bulk].float()) / S[:bulk].float()
        V[block, bulk:head] = (matmul(A[:, block].T.double(), U[:, bulk:head]) / S[bulk:head]).to(stored)
    return U, S, V


def _float32_columns(S: Tensor) -> int:
    """How many leading columns of A^T U / S a float32 product gives to 1e-6: those with s_i >= s_rms / 4.

    Its rounding errors are as large as those of the whole of A, 5 u_32 s_rms, whatever column they fall on.
    """
    if not 1e-25 < S[0] < 1e25:  # out of float32's range
        return 0
    return int((S.square().mean().sqrt() <= 4 * S).sum())


def _tail(A: Tensor, U: Tensor, S: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Components from `head` on, without squaring: the SVD of A^T U_t, t = p - head columns, off the span of the head.

    V_i = A^T u_i / s_i loses orthogonality as u s_0^2 / (s_i s_j), and is 0/0 where A is rank deficient. Here the
    columns of A^T U_t are orthonormalised, and zero singular values come out as zeros with full vectors.
    """
    U_head, U_tail = U[:, :head], U[:, head:]

    def off_head(X: Tensor) -> Tensor:
        """X - V_h V_h^T X with V_h = A^T U_h S_h^-1, which is not stored in float64."""
        within = matmul(U_head, matmul(U_head.T, product64(A, X)) / S[:head, None] ** 2)  # (p, r)
        return X - product64(A.T, within)

    Q, R = torch.linalg.qr(off_head(product64(A.T, U_tail)))  # (q, t), (t, t)
    left, values, right_transposed = torch.linalg.svd(R)
    V_tail = matmul(Q, left)
    rank = int((values > A.shape[1] * torch.finfo(torch.float64).eps * S[0]).sum())
    if rank < len(values):
        # The directions of zero singular values are rounding noise, and may lie in the span of the others.
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(A.shape[1], len(values) - rank, generator=generator, dtype=torch.float64).to(A.device)
        for _ in range(2):  # twice is enough (Giraud, Langou, Rozloznik 2005)
            X = off_head(X)
            X = torch.linalg.qr(X - matmul(V_tail[:, :rank], matmul(V_tail[:, :rank].T, X))).Q
        V_tail[:, rank:] = X
    return matmul(U_tail, right_transposed.T), values, V_tail


def _direct(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide and conquer in float64 (gesdd)."""
    wide = A.double()
    if not bool(torch.isfinite(wide).all()):
        raise NotFiniteError(f"{describe_not_finite(A)}: it has no singular values")
    try:
        # A wide matrix takes LAPACK up to three times as long as its transpose.
        long, S, short_transposed = torch.linalg.svd(wide.T, full_matrices=False)
    except RuntimeError as error:
        raise LapackError(str(error)) from error
    return short_transposed.T, S, long


def direct_values(A: Tensor) -> Tensor:
    """All singular values of a float64 matrix without squaring it, descending, to u s_0: QR, then values of R alone.

    Raises NotFiniteError where an entry is NaN or infinite.
    """
    if not bool(torch.isfinite(A).all()):
        raise NotFiniteError(f"{describe_not_finite(A)}: it has no singular values")
    tall = A if A.shape[0] >= A.shape[1] else A.T
    try:
        values: Tensor = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    except RuntimeError:
        return svd(A).S
    return values


def _direct_or_slow(A: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
    """gesdd, and where even that does not converge gesvd, both in float64."""
    try:
        return *_direct(A), DIVIDE_AND_CONQUER
    except LapackError:
        import scipy.linalg

        factors = scipy.linalg.svd(A.double().cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        U, S, Vh = (torch.from_numpy(factor).to(A.device) for factor in factors)
        return U, S, Vh.T, QR_ITERATION

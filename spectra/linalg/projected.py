"""A low-rank update seen from the base: its factors in the base's singular bases, computed once for all who ask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.linalg.lowrank import LowRank
from spectra.linalg.products import matmul
from spectra.linalg.svd import Spectrum, svd


@dataclass(frozen=True, kw_only=True)
class Projected(LowRank):
    """D = c B A, with orthonormal rows in A and orthogonal columns in B, and with C = U^T D V = P Q. All float64.

    The thin SVD of D is (c B / values, values, A^T): factors that nearly cancel in their product, as the two halves of
    [B, -B_0] [A; A_0] do, were multiplied once in float64 and cost no digits afterwards. c = ||D||_2, so that B and A
    may be rounded to float32 whatever the size of D.

    Attributes:
        values: (r,) the singular values of D, descending; those beyond r are zero.
        P: (k, r) c U^T B.   Q: (r, k) A V.
    """

    values: Tensor
    P: Tensor
    Q: Tensor

    @property
    def T(self) -> Projected:
        """D^T = c A^T B^T as seen from W^T, at no cost; there the columns of the left factor are orthonormal."""
        return Projected(self.A.T, self.B.T, self.c, values=self.values, P=self.c * self.Q.T, Q=self.P.T / self.c)


def project(base: Spectrum, D: LowRank) -> Projected:
    """D in the base's coordinates; D itself where it has been projected already.

    Args: base: spectrum of W (m x n); D of the same shape and device.
    Cost: 2 (m + n) k r flops in the precision of the base's vectors, O((m + n) r^2) in float64.
    """
    if isinstance(D, Projected):
        return D
    Q_B, R_B = torch.linalg.qr(D.B.double())  # (m, r), (r, r)
    Q_A, R_A = torch.linalg.qr(D.A.double().T)  # (n, r), (r, r)
    core = svd(D.c * matmul(R_B, R_A.T))
    c = float(core.S[0]) or 1.0
    B, A = matmul(Q_B, core.U * (core.S / c)), matmul(core.V.T, Q_A.T)
    # Few rows times a row-major matrix: the order that BLAS libraries are quickest at.
    P = c * matmul(B.T.to(base.U.dtype), base.U).double().T  # (k, r)
    Q = matmul(A.to(base.V.dtype), base.V).double()  # (r, k)
    return Projected(B, A, c, values=core.S, P=P, Q=Q)

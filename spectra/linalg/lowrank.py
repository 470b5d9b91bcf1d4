"""A low-rank product as a value: c B A, never multiplied out unless asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """D = c B A with B (m x r) and A (r x n): a LoRA update of scaling c.

    The factors keep their own dtype and device. Operations keep the factors; only `dense` forms the m x n product.
    """

    B: Tensor  # (m, r)
    A: Tensor  # (r, n)
    c: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors B {tuple(self.B.shape)} and A {tuple(self.A.shape)} do not multiply")

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """The number r of columns of B: an upper bound on the rank of D."""
        return self.B.shape[1]

    @property
    def T(self) -> LowRank:
        """D^T = c A^T B^T, at no cost."""
        return LowRank(self.A.T, self.B.T, self.c)

    def rows(self, start: int, stop: int) -> LowRank:
        """Rows [start, stop) of D, at no cost."""
        return LowRank(self.B[start:stop], self.A, self.c)

    def columns(self, start: int, stop: int) -> LowRank:
        """Columns [start, stop) of D, at no cost."""
        return LowRank(self.B, self.A[:, start:stop], self.c)

    def core(self) -> Tensor:
        """c R_B R_A^T, where B = Q_B R_B and A^T = Q_A R_A: it has D's singular values. float64, O((m + n) r^2)."""
        R_B, R_A = torch.linalg.qr(self.B.double()).R, torch.linalg.qr(self.A.T.double()).R
        product: Tensor = R_B @ R_A.T
        return self.c * product

    def dense(self) -> Tensor:
        """D (m x n), in 2 m n r flops."""
        return self.c * (self.B @ self.A)

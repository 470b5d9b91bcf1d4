"""Intruder dimensions: leading directions of the tuned weight that no direction of the base resembles.

Source: Shuttleworth, Andreas, Torralba, Sharma, *LoRA vs Full Fine-tuning: An Illusion of Equivalence* (arXiv
2410.21228): the left singular vector y_j, j < k, of W' is an intruder where max_i |<u_i, y_j>| < epsilon.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from spectra.linalg.products import matmul
from spectra.linalg.svd import Spectrum
from spectra.linalg.triplets import Triplets

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Intruders:
    """The leading directions of W' held against every direction of its base, one side at a time.

    Attributes:
        index: (q,) which of the leading triplets are intruders.   singular_value: (q,) their s'_j.
        best_cosine: (j,) max_i |<u_i, y_j>| of every leading triplet, intruder or not.   partner: (j,) the i that
            attains it.
        null: the best cosine that a random direction would have, about sqrt(2 ln p / d).
    """

    index: NDArray[np.intp]
    singular_value: NDArray[np.float64]
    best_cosine: NDArray[np.float64]
    partner: NDArray[np.intp]
    null: float

    @property
    def count(self) -> int:
        return len(self.index)


def intruders(
    base: Spectrum, tuned: Triplets, k: int = 10, epsilon: float = 0.5, side: Literal["left", "right"] = "left"
) -> Intruders:
    """The intruder dimensions among the top k triplets of the tuned weight (published: left, k = 10, epsilon = 0.5).

    Args: the spectrum of W, the leading triplets of W' (of the same dtype and device), the threshold and the side.
    Triplets whose singular value is zero to rounding have no direction and are not counted.
    Cost: 2 d k p flops, d the length of a vector, p = min(m, n).
    """
    basis, vectors = (base.U, tuned.Y) if side == "left" else (base.V, tuned.Z)
    s = tuned.S.cpu().numpy()
    k = min(k, vectors.shape[1])
    k = int((s[:k] > max(base.shape) * np.finfo(np.float32).eps * s[0]).sum())
    cosines = matmul(basis.T, vectors[:, :k].to(basis.dtype)).abs()  # (p, k)
    best = cosines.max(0) if k else torch.zeros(2, 0, dtype=torch.int64)
    best_cosine, partner = best[0].double().cpu().numpy(), best[1].cpu().numpy()
    index = np.flatnonzero(best_cosine < epsilon)
    return Intruders(index, s[index], best_cosine, partner, random_cosine(basis.shape[0], basis.shape[1]))


def random_cosine(dimension: int, count: int) -> float:
    """About the best |cosine| of a random unit vector of R^d against `count` orthonormal ones: sqrt(2 ln count / d).

    Against a full basis of R^d it is never under 1 / sqrt(d).
    """
    least = 1 / sqrt(dimension) if count == dimension else 0.0
    return min(1.0, max(sqrt(2 * log(count) / dimension), least))

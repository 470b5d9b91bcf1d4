"""Intruder dimensions: leading directions of the tuned weight that no direction of the base resembles.

Source: Shuttleworth, Andreas, Torralba, Sharma, *LoRA vs Full Fine-tuning: An Illusion of Equivalence* (arXiv
2410.21228): the left singular vector y_j, j < k, of W' is an intruder where max_i |<u_i, y_j>| < epsilon. The
projection on a cluster is ours: inside (nearly) equal singular values the base has a subspace and no directions, and a
tuned vector may spread over it without being new.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from spectra.linalg.batched import AnySpectrum, AnyTriplets, matmul
from spectra.linalg.svd import Spectrum
from spectra.linalg.triplets import Triplets

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLUSTER_GAP = 0.01  # base components whose singular values differ by a hundredth count as one cluster


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
    best, partner = best_cosines(base, tuned, k, side)
    known = ~np.isnan(best)
    best, partner, s = best[known], partner[known], tuned.S.cpu().numpy()
    index = np.flatnonzero(best < epsilon)
    basis = base.U if side == "left" else base.V
    return Intruders(index, s[index], best, partner, random_cosine(basis.shape[0], basis.shape[1]))


def best_cosines(
    base: AnySpectrum, tuned: AnyTriplets, k: int, side: Literal["left", "right"] = "left"
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """max_i |<u_i, y_j>| of the top k triplets, and the i that attains it: (k,) each, (b, k) of a stack.

    NaN for triplets whose singular value is zero to rounding, at the end.
    """
    basis, vectors = (base.U, tuned.Y) if side == "left" else (base.V, tuned.Z)
    s = tuned.S[..., : min(k, vectors.shape[-1])]
    # What storing W' in float32 moves its singular values by at the most: ||E||_F <= eps / 2 ||W'||_F.
    rounding = sqrt(min(base.shape)) * torch.finfo(torch.float32).eps
    has_direction = s > rounding * s[..., :1]
    Y = vectors[..., : s.shape[-1]].to(basis.dtype).contiguous()
    best, partner = matmul(basis.mT, Y).abs().max(-2)  # (p, k), its maximum over p
    return torch.where(has_direction, best.double(), torch.nan).cpu().numpy(), partner.cpu().numpy()


def cluster_cosines(
    base: AnySpectrum,
    tuned: AnyTriplets,
    partner: NDArray[np.intp],
    side: Literal["left", "right"] = "left",
    gap: float = CLUSTER_GAP,
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Norms of the projections of y_j on the base components near its partner i, |s_l - s_i| <= gap s_i, and how many
    those are: (k,) each, (b, k) of a stack.

    Args: partner: (k,) or (b, k), as `best_cosines` gives it.   Cost: 2 d k p flops.
    """
    basis, vectors = (base.U, tuned.Y) if side == "left" else (base.V, tuned.Z)
    Y = vectors[..., : partner.shape[-1]].to(basis.dtype).contiguous()
    squared = matmul(basis.mT, Y).double().square()  # (p, k)
    S = base.S
    s_i = torch.take_along_dim(S, torch.from_numpy(partner).to(S.device), -1)[..., None, :]  # (1, k)
    rounding = max(base.shape) * torch.finfo(torch.float64).eps * S[..., :1, None]
    is_member = (S[..., None] - s_i).abs() <= gap * s_i + rounding  # (p, k)
    return (squared * is_member).sum(-2).sqrt().cpu().numpy(), is_member.sum(-2).cpu().numpy()


def random_cosine(dimension: int, count: int) -> float:
    """About the best |cosine| of a random unit vector of R^d against `count` orthonormal ones: sqrt(2 ln count / d).

    Against a full basis of R^d it is never under 1 / sqrt(d).
    """
    least = 1 / sqrt(dimension) if count == dimension else 0.0
    return min(1.0, max(sqrt(2 * log(count) / dimension), least))

"""Intruder dimensions: leading directions of the tuned weight that no direction of the base resembles.

Source: Shuttleworth, Andreas, Torralba, Sharma, *LoRA vs Full Fine-tuning: An Illusion of Equivalence* (arXiv
2410.21228): the left singular vector y_j, j < k, of W' is an intruder where max_i |<u_i, y_j>| < epsilon. The
projection on a cluster is ours: inside (nearly) equal singular values the base has a subspace and no directions, and a
tuned vector may spread over it without being new.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, log, sqrt
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from spectra.linalg.batched import AnySpectrum, AnyTriplets, matmul
from spectra.linalg.svd import GRAM, Spectrum
from spectra.linalg.triplets import Triplets

if TYPE_CHECKING:
    from numpy.typing import NDArray

SQUARED = 1e-11  # of s_0: how well the singular values of a squared matrix are known
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
    best, partner = best_cosines(base, tuned, k, side, zero_to_rounding(base, tuned))
    known = ~np.isnan(best)
    best, partner, s = best[known], partner[known], tuned.S.cpu().numpy()
    index = np.flatnonzero(best < epsilon)
    basis = base.U if side == "left" else base.V
    return Intruders(index, s[index], best, partner, random_cosine(basis.shape[0], basis.shape[1]))


def zero_to_rounding(base: AnySpectrum, tuned: AnyTriplets, digits: torch.dtype = torch.float32) -> float:
    """The share of s'_0 up to which a singular value of W' is zero to rounding, so that its vectors mean nothing.

    Args: the spectrum of W, the leading triplets of W'. The dtype of their vectors tells how many digits W' has, and in
        a stack, whose vectors are float64 always, `digits` does: the dtype in which W' is stored.
    Returns: with vectors in float32 on either side, and for triplets that were iterated, what storing W' in float32
        does, sqrt(p) eps; with float64 throughout, max(m, n) eps, and SQUARED for factors upon a base that was squared.
    """
    if isinstance(base, Spectrum) and isinstance(tuned, Triplets):
        is_wide = base.U.dtype == tuned.Y.dtype == torch.float64 and isnan(tuned.residual)
        squared = base.algorithm == GRAM
    else:
        is_wide, squared = digits == torch.float64, False
    if is_wide:
        return SQUARED if squared else max(base.shape) * torch.finfo(torch.float64).eps
    return _stored_in_float32(base.shape)


def best_cosines(
    base: AnySpectrum,
    tuned: AnyTriplets,
    k: int,
    side: Literal["left", "right"] = "left",
    zero: float | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """max_i |<u_i, y_j>| of the top k triplets, and the i that attains it: (k,) each, (b, k) of a stack.

    NaN for triplets whose singular value is zero to rounding, at the end.

    Args: zero: the share of s'_0 up to which that is so (see `zero_to_rounding`); None: as of weights in float32.
    """
    basis, vectors = (base.U, tuned.Y) if side == "left" else (base.V, tuned.Z)
    s = tuned.S[..., : min(k, vectors.shape[-1])]
    has_direction = s > (_stored_in_float32(base.shape) if zero is None else zero) * s[..., :1]
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


def _stored_in_float32(shape: tuple[int, int]) -> float:
    """What storing W' moves its singular values by at the most, relative to s'_0: ||E||_F <= eps / 2 ||W'||_F."""
    return sqrt(min(shape)) * torch.finfo(torch.float32).eps


def random_cosine(dimension: int, count: int) -> float:
    """About the best |cosine| of a random unit vector of R^d against `count` orthonormal ones: sqrt(2 ln count / d).

    Against a full basis of R^d it is never under 1 / sqrt(d).
    """
    least = 1 / sqrt(dimension) if count == dimension else 0.0
    return min(1.0, max(sqrt(2 * log(count) / dimension), least))

"""Updates of exactly low rank, told from dense ones by what storage rounding leaves of them.

A LoRA that was merged and stored is W' = W + c B A + N, where N is the rounding of the storage. N is known well enough
in advance, in norm and in spectrum, to ask whether D = W' - W is anything else than r directions and N.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, inf, sqrt

import torch
from torch import Tensor

from spectra.linalg.lowrank import LowRank
from spectra.linalg.triplets import leading_triplets, singular_values

RESIDUAL_MARGIN = 1.3  # the rounding model predicts the norm of what is left of a merged adapter within a tenth
EDGE_MARGIN = 2.0  # rows of unequal scale make noise matrices of larger spectral norm than equal ones
GAP = 1.25  # neighbouring singular values of a dense update, and of noise, are closer than that


@dataclass(frozen=True)
class Recognised:
    """An update of exactly low rank.

    Attributes:
        rank: r.
        residual: ||D - D_r||_F, of the best approximation of that rank.
        noise: the expected ||N||_F that it was held against.
    """

    rank: int
    residual: float
    noise: float


def low_rank(
    D: Tensor, noise: float, singular_values_of_d: Tensor | None = None, most: int | None = None
) -> Recognised | None:
    """Whether D is of exactly low rank up to storage rounding; None where it is not, or where nothing can be said.

    What lies under the rounding cannot be seen: a dense update whose spectrum falls into it within a few directions, by
    steps of a quarter and more, is low rank as far as its storage can tell.

    Args:
        D: (m, n), float32 or float64.
        noise: the expected Frobenius norm of storage rounding in D (rounding_floor x ||W||_F); 0 where there is none.
        singular_values_of_d: all of them, descending, where the caller has them already: then nothing is decomposed.
        most: the largest rank that is still called low; see `explained_by_rounding`.
    Raises: NotFiniteError where an entry is NaN or infinite.
    Cost: that of `singular_values`, p^2 q + 4/3 p^3 flops, where they are not given.

    >>> D = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 7.0))
    >>> low_rank(D, noise=1e-3).rank
    1
    >>> low_rank(D + torch.eye(8, 6), noise=1e-3) is None
    True
    """
    values = singular_values(D) if singular_values_of_d is None else singular_values_of_d
    m, n = D.shape
    return explained_by_rounding(values, (m, n), noise, D.dtype, most)


def explained_by_rounding(
    values: Tensor, shape: tuple[int, int], noise: float, dtype: torch.dtype, most: int | None = None
) -> Recognised | None:
    """The rank r that leaves nothing of D but rounding, from D's singular values alone; None without one.

    With N's entries independent, ||N||_2 is about e = noise (1/sqrt m + 1/sqrt n). A rank r is possible if s_{r-1} > e
    and s_r <= 2 e; of those the one with the largest gap s_{r-1} / s_r is taken, and D is of exactly that rank if

        s_{r-1} >= 1.25 s_r,  ||D - D_r||_F <= 1.3 noise sqrt((1 - r/m) (1 - r/n))  and  noise < ||D||_F / 2.

    The gap tells r directions from a spectrum that decays into the noise, as a small dense fine-tune's does. The root
    is what is left of N beside r directions on either side: without it, half of the directions of a dense random update
    a little larger than the noise would pass.

    Args:
        values: (min(m, n),) all singular values of D (m x n), descending.
        dtype: of D; its own digits are added to the noise (W' - W and B A are rounded too).
        most: less than min(m, n), by default half of it. Near the full rank, factors of r (m + n) numbers are no
            smaller than the matrix, and too little of the noise is left to be recognised.
    """
    m, n = shape
    norm = float(torch.linalg.vector_norm(values.double()))
    # float32: products B A and differences are off by about eps an entry. float64: what LAPACK promises of the values.
    noise = hypot(noise, torch.finfo(dtype).eps * norm * (max(m, n) if dtype == torch.float64 else 1))
    if not 2 * noise < norm:
        return None
    edge = noise * (1 / sqrt(m) + 1 / sqrt(n))
    first, last = (int((values > bound).sum()) for bound in (EDGE_MARGIN * edge, edge))
    last = min(last, min(m, n) // 2 if most is None else most, min(m, n) - 1)
    candidates = range(max(first, 1), last + 1)
    rank = max(candidates, key=lambda r: float(values[r - 1] / values[r]) if values[r] > 0 else inf, default=0)
    if rank == 0 or values[rank - 1] < GAP * values[rank]:
        return None
    residual = float(torch.linalg.vector_norm(values[rank:].double()))
    is_rounding = residual <= RESIDUAL_MARGIN * noise * sqrt((1 - rank / m) * (1 - rank / n))
    return Recognised(rank, residual, noise) if is_rounding else None


def truncated(D: Tensor, rank: int) -> LowRank:
    """The best approximation of D (m x n) of a rank, as balanced factors B = Y sqrt(S) and A = sqrt(S) Z^T, c = 1.

    Returns: factors in float32 (float64 for a float64 D); B^T B = A A^T, so that neither side's rounding to a narrower
        dtype costs more than the other's.
    Raises: NotFiniteError where an entry is NaN or infinite.
    Cost: that of `leading_triplets`.
    """
    triplets = leading_triplets(D, rank)
    root = triplets.S[: triplets.Y.shape[1]].sqrt().to(triplets.Y.dtype)
    return LowRank((triplets.Y * root).contiguous(), (triplets.Z * root).T.contiguous())

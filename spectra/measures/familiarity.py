"""How familiar the leading directions of a tuned weight are to its base: the measure behind intruder dimensions.

Source: Shuttleworth, Andreas, Torralba, Sharma, *LoRA vs Full Fine-tuning: An Illusion of Equivalence* (arXiv
2410.21228), for the best cosine of single vectors. The projection on a cluster is ours: inside (nearly) equal singular
values the base has a subspace and no directions, and a tuned vector may spread over it without being new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.iterative import lanczos_triplets
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.perturbed import perturbed_triplets
from spectra.linalg.products import matmul
from spectra.linalg.svd import Spectrum, svd
from spectra.linalg.triplets import Triplets, leading_triplets
from spectra.measures.intruders import best_cosines, random_cosine

if TYPE_CHECKING:
    from numpy.typing import NDArray

Side = Literal["left", "right"]
CLUSTER_GAP = 0.01  # base components whose singular values differ by a hundredth count as one cluster
FELL_BACK = "of W', for its leading triplets did not converge"


@dataclass(frozen=True)
class Familiarity:
    """The leading directions of W' held against all directions of its base, one side. Arrays are (j,).

    Triplets whose singular value is zero to rounding have no direction, and are left out.

    Attributes:
        singular_value: s'_j, descending.
        best_cosine: max_i |<u_i, y_j>|.   partner: the i that attains it.
        cluster_cosine: norm of the projection of y_j on the span of the base components near its partner: those with
            |s_l - s_i| <= gap s_i.   cluster_members: how many there are, the partner among them.
        null: the best cosine of a random direction.
    """

    singular_value: NDArray[np.float64]
    best_cosine: NDArray[np.float64]
    partner: NDArray[np.int64]
    cluster_cosine: NDArray[np.float64]
    cluster_members: NDArray[np.int64]
    null: float

    def intruders(self, epsilon: float) -> NDArray[np.intp]:
        """The j with best_cosine < epsilon: the published definition."""
        return np.flatnonzero(self.best_cosine < epsilon)

    def new_directions(self, epsilon: float) -> NDArray[np.intp]:
        """The intruders that did not merely spread over their partner's cluster: its projection is < epsilon, too."""
        return np.flatnonzero((self.best_cosine < epsilon) & (self.cluster_cosine < epsilon))


def familiarity(base: Spectrum, tuned: Triplets, k: int, side: Side, gap: float = CLUSTER_GAP) -> Familiarity:
    """Hold the top k triplets of W' against the base, one side.

    Args: the spectrum of W (m x n), the leading triplets of W' on its device; side "left" (output directions y_j
        against u_i) or "right" (z_j against v_i); gap: relative, of singular values that count as one cluster.
    Cost: 4 d k p flops, d the length of a vector, p = min(m, n).

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> tuned = leading_triplets(W + 100 * torch.ones(3, 3), 1)  # nearly (1, 1, 1) / sqrt(3)
    >>> familiarity(svd(W), tuned, 1, "left").best_cosine.round(2)
    array([0.58])
    """
    best, partner = best_cosines(base, tuned, k, side)
    known = ~np.isnan(best)
    count = int(known.sum())
    basis, vectors = (base.U, tuned.Y) if side == "left" else (base.V, tuned.Z)
    squared = matmul(basis.T, vectors[:, :count].to(basis.dtype).contiguous()).double().square()  # (p, j)
    S = base.S
    s_i = S[torch.from_numpy(partner[:count]).to(S.device)]  # (j,)
    rounding = max(base.shape) * torch.finfo(torch.float64).eps * S[0]
    is_member = (S[:, None] - s_i).abs() <= gap * s_i + rounding  # (p, j)
    return Familiarity(
        singular_value=tuned.S[:count].cpu().numpy(),
        best_cosine=best[known],
        partner=partner[known],
        cluster_cosine=(squared * is_member).sum(0).sqrt().cpu().numpy(),
        cluster_members=is_member.sum(0).cpu().numpy(),
        null=random_cosine(basis.shape[0], basis.shape[1]),
    )


def tuned_triplets(weight: Tensor, base: Spectrum, tuned: Tensor | LowRank, count: int, fast: bool = False) -> Triplets:
    """The `count` leading triplets of W', without a full SVD of it where they converge.

    Args:
        weight: W (m x n) and `base`, its spectrum, with float64 vectors where `tuned` is an update.
        tuned: W', or the update D = W' - W as factors: then W' is not formed (see `perturbed_triplets`).
        fast: iterate those triplets alone by Lanczos: cosines are good to 1e-5 for a dense W', and a direction may be
            missed where several singular values are equal. Otherwise they come from one tridiagonal reduction.
    Returns: `Triplets`; where neither way converged, of a full float64 SVD of W', and `algorithm` says so.
    Raises: NotFiniteError where W' is not finite; LapackError where no solver converges.
    """
    if isinstance(tuned, LowRank):
        for iterate in (True, False) if fast else (False,):
            try:
                return perturbed_triplets(base, tuned, count, iterate=iterate)
            except LapackError:
                continue
        full = svd(weight.double() + tuned.c * matmul(tuned.B.double(), tuned.A.double()))
        return Triplets(full.U[:, :count], full.S, full.V[:, :count], f"{full.algorithm} {FELL_BACK}")
    if fast and tuned.dtype == torch.float32 and tuned.device.type == "cpu":
        try:
            return lanczos_triplets(tuned, count)
        except LapackError:
            pass  # small, clustered or out of float32's range: the direct way copes
    found = leading_triplets(tuned, count)
    is_direct = found.algorithm.startswith("ges") and tuned.dtype != torch.float64
    return found if not is_direct else Triplets(found.Y, found.S, found.Z, f"{found.algorithm} {FELL_BACK}")

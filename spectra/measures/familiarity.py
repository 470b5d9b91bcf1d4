"""How familiar the leading directions of a tuned weight are to its base: the measure behind intruder dimensions.

Source: Shuttleworth, Andreas, Torralba, Sharma, *LoRA vs Full Fine-tuning: An Illusion of Equivalence* (arXiv
2410.21228), for the best cosine of single vectors; that with a cluster is ours (`cluster_cosines`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.iterative import lanczos_triplets
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.perturbed import perturbed_triplets
from spectra.linalg.products import matmul
from spectra.linalg.svd import TAIL, Spectrum, svd
from spectra.linalg.triplets import Triplets, leading_triplets
from spectra.measures.intruders import CLUSTER_GAP, best_cosines, cluster_cosines, random_cosine

if TYPE_CHECKING:
    from numpy.typing import NDArray

Side = Literal["left", "right"]
# Why leading triplets were taken from a full SVD of W'; `Triplets.algorithm` ends in it then.
NOT_CONVERGED = "for its leading triplets did not converge"
SPOILED = "for squaring would spoil its leading triplets"  # those under TAIL s'_0


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
    basis = base.U if side == "left" else base.V
    cluster, members = cluster_cosines(base, tuned, partner[:count], side, gap)
    return Familiarity(
        singular_value=tuned.S[:count].cpu().numpy(),
        best_cosine=best[known],
        partner=partner[known],
        cluster_cosine=cluster,
        cluster_members=members,
        null=random_cosine(basis.shape[0], basis.shape[1]),
    )


def tuned_triplets(weight: Tensor, base: Spectrum, tuned: Tensor | LowRank, count: int, fast: bool = False) -> Triplets:
    """The `count` leading triplets of W', without a full SVD of it where they converge.

    They come from the base's spectrum and the update where the update comes as factors; of a dense W', whose update has
    no small rank, from one reduction of its float64 Gram matrix. A float64 W' is decomposed in full: squaring it would
    cost half of its digits.

    Args:
        weight: W (m x n) and `base`, its spectrum, with float64 vectors where `tuned` is an update.
        tuned: W', or the update D = W' - W as factors: then W' is not formed (see `perturbed_triplets`).
        fast: iterate those triplets alone by Lanczos: cosines are good to 1e-5 for a dense W', and a direction may be
            missed where several singular values are equal.
    Returns: `Triplets`; where no other way converged, or squaring would spoil the last of them, of a full float64 SVD
        of W', and `algorithm` says so.
    Raises: NotFiniteError where W' is not finite; LapackError where no solver converges.
    """
    if isinstance(tuned, LowRank):
        for iterate in (True, False) if fast else (False,):
            try:
                return perturbed_triplets(base, tuned, count, iterate=iterate)
            except LapackError:
                continue
        full = svd(weight.double() + tuned.c * matmul(tuned.B.double(), tuned.A.double()))
        return _in_full(Triplets(full.U[:, :count], full.S, full.V[:, :count], full.algorithm), NOT_CONVERGED)
    if fast and tuned.dtype == torch.float32 and tuned.device.type == "cpu":
        try:
            return lanczos_triplets(tuned, count)
        except LapackError:
            pass  # small, clustered or out of float32's range: the direct way copes
    found = leading_triplets(tuned, count)
    if tuned.dtype == torch.float64:
        return found
    if found.S[found.Y.shape[1] - 1] <= TAIL * found.S[0]:
        return _in_full(found, SPOILED)
    return _in_full(found, NOT_CONVERGED) if found.algorithm.startswith("ges") else found


def _in_full(found: Triplets, why: str) -> Triplets:
    return replace(found, algorithm=f"{found.algorithm} of all of W', {why}")

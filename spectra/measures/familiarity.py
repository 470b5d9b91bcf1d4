"""How familiar the leading directions of a tuned weight are to its base: the measure behind intruder dimensions.

Source: Shuttleworth, Andreas, Torralba, Sharma, *LoRA vs Full Fine-tuning: An Illusion of Equivalence* (arXiv
2410.21228), for the best cosine of single vectors; that with a cluster is ours (`cluster_cosines`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from spectra.linalg.svd import Spectrum
from spectra.linalg.triplets import Triplets
from spectra.measures.intruders import CLUSTER_GAP, best_cosines, cluster_cosines, random_cosine, zero_to_rounding

if TYPE_CHECKING:
    from numpy.typing import NDArray

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Familiarity:
    """The leading directions of W' held against all directions of its base, one side. Arrays are (j,).

    Triplets whose singular value is zero to rounding (`zero_to_rounding`) have no direction, and are left out.

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

    >>> import torch
    >>> from spectra.linalg.svd import svd
    >>> from spectra.linalg.triplets import leading_triplets
    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> tuned = leading_triplets(W + 100 * torch.ones(3, 3), 1)  # nearly (1, 1, 1) / sqrt(3)
    >>> familiarity(svd(W), tuned, 1, "left").best_cosine.round(2)
    array([0.58])
    """
    best, partner = best_cosines(base, tuned, k, side, zero_to_rounding(base, tuned))
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

"""Intruder dimensions by their published definition (Shuttleworth et al., arXiv 2410.21228)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tests.reference.singular import Array, svd


@dataclass(frozen=True)
class Match:
    """Component `index` of the tuned matrix and the base vector that it is closest to."""

    index: int
    singular_value: float
    best_cosine: float
    partner: int


def best_matches(W: Array, tuned: Array, k: int = 10, side: Literal["left", "right"] = "left") -> list[Match]:
    """For each of the k leading tuned singular vectors, the largest |cosine| with any vector of W's thin basis."""
    base, after = svd(W), svd(tuned)
    vectors, others = (base.U, after.U) if side == "left" else (base.V, after.V)
    matches = []
    for j in range(min(k, len(after.s))):
        cosines = [abs(float(vectors[:, i] @ others[:, j])) for i in range(vectors.shape[1])]
        best = max(cosines)
        matches.append(Match(j, float(after.s[j]), best, cosines.index(best)))
    return matches


def intruders(W: Array, tuned: Array, k: int = 10, epsilon: float = 0.5) -> list[Match]:
    """Those of the k leading left singular vectors of W' that no left singular vector of W comes within epsilon of."""
    return [match for match in best_matches(W, tuned, k) if match.best_cosine < epsilon]

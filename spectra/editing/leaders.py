"""The leading directions of a tuned weight under an edit: which are intruders, before it and after it."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch

from spectra.linalg.lowrank import LowRank
from spectra.linalg.products import matmul
from spectra.linalg.triplets import Triplets
from spectra.loading import BaseMatrix
from spectra.measures.familiarity import Familiarity, familiarity
from spectra.measures.intruders import zero_to_rounding
from spectra.measures.tuned import tuned_triplets, why_in_full, without_directions

Sides = Literal["left", "right", "both"]
SAME = 0.5  # |cosine| from which on a direction counts as one that was there before


@dataclass(frozen=True)
class Leaders:
    """The leading triplets of a tuned weight and how familiar they are, on the sides that are looked at.

    Attributes:
        rounding: the share of s'_0 up to which a singular value is zero to rounding, as `find_intruders` has it.
        zero: why there are no directions, in words; then no triplet is an intruder, as there.
    """

    triplets: Triplets
    sides: tuple[Familiarity, ...]
    rounding: float = 0.0
    zero: str = ""

    def intruders(self, epsilon: float, without_spread: bool, above: float = 0.0) -> list[int]:
        """The j of singular values over `above` that are intruders on one of the sides, ascending."""
        found = [f.new_directions(epsilon) if without_spread else f.intruders(epsilon) for f in self.sides]
        return sorted({int(j) for js in found for j in js if self.triplets.S[j] > above})

    @property
    def fallback(self) -> str:
        """Why the triplets are from a full SVD, where a quicker way did not do; "" otherwise."""
        return "" if self.zero else why_in_full(self.triplets)


def leaders_of(base: BaseMatrix, tuned: torch.Tensor | LowRank, k: int, side: Sides) -> Leaders:
    """The k leading triplets of a tuned weight (W', or D as factors), held against the base."""
    spectrum = base.spectrum_beside(tuned)
    triplets = tuned_triplets(base.weight, spectrum, tuned, k)
    if zero := without_directions(spectrum, triplets):
        return Leaders(triplets, (), zero=zero)
    sides: tuple[Literal["left", "right"], ...] = ("left", "right") if side == "both" else (side,)
    found = tuple(familiarity(spectrum, triplets, k, side) for side in sides)
    return Leaders(triplets, found, zero_to_rounding(spectrum, triplets))


def counted(before: Leaders, after: Leaders, epsilon: float, stored: torch.dtype) -> dict[str, int]:
    """Intruders before and after an edit, and those after it that resemble none before.

    What rounding leaves of directions that were taken out is none, up to sqrt(p) eps s'_0 of the weight before (or up
    to where that weight's own begin; p its short side): where nothing else is left, it would all be intruders.

    Args: stored: the dtype in which the edit is stored.
    """
    shortest = min(before.triplets.Y.shape[0], before.triplets.Z.shape[0])
    digits = torch.float64 if stored == torch.float64 else torch.float32  # coarser ones round the remainder itself
    rounding = max(before.rounding, sqrt(shortest) * torch.finfo(digits).eps)
    noise = rounding * float(before.triplets.S[0])
    was = before.intruders(epsilon, without_spread=False)
    now = after.intruders(epsilon, without_spread=False, above=noise)
    same = matmul(before.triplets.Y[:, was].double().T.contiguous(), after.triplets.Y[:, now].double())
    known = (same.abs() >= SAME).any(0) if was else torch.zeros(len(now), dtype=torch.bool)
    return {
        "intruders_before": len(was),
        "intruders_after": len(now),
        "intruders_appeared": len(now) - int(known.sum()),
    }

"""The edits that can be asked for, as values: each says what becomes of one update D = W' - W."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from spectra.editing.arguments import number, whole, wholes
from spectra.editing.heads import head_entries
from spectra.editing.operations import (
    Keep,
    Update,
    nearest_components,
    rewound_components,
    rewound_entries,
    scaled,
    scaled_triplets,
    truncated,
)
from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.svd import Spectrum
from spectra.linalg.triplets import Triplets
from spectra.loading import BaseMatrix
from spectra.measures.familiarity import Familiarity, familiarity
from spectra.measures.tuned import tuned_triplets
from spectra.pairing import Pair

Sides = Literal["left", "right", "both"]


@dataclass(frozen=True)
class Subject:
    """One matrix under the knife.

    Attributes:
        pair: which one.   base: W, and its spectrum on request.
        tuned: W' as the numerics take it, or the factors of D.   D: the update, dense in float64 or as factors.
        config: the model's config.json; empty where there is none.
    """

    pair: Pair
    base: BaseMatrix
    tuned: torch.Tensor | LowRank
    D: Update
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Applied:
    """The new update (the subject's own D, the same object, where nothing changes), and what is to be said of it.

    Attributes:
        scaled, before: of a mitigation, the intruders that it scaled, and the leading triplets before it.
        stands_for: of its control, ||change||_F of the scaling of intruders that it stands in the place of.
    """

    D: Update
    note: str = ""
    scaled: tuple[int, ...] = ()
    before: Leaders | None = None
    stands_for: float | None = None


class Edit(Protocol):
    """An edit of any matrix.

    of_vectors: what the change of biases, norms and the like is multiplied by; None leaves them as they are.
    """

    @property
    def of_vectors(self) -> float | None: ...

    def apply(self, subject: Subject) -> Applied: ...


@dataclass(frozen=True)
class Leaders:
    """The leading triplets of a tuned weight and how familiar they are, on the sides that are looked at."""

    triplets: Triplets
    sides: tuple[Familiarity, ...]

    def intruders(self, epsilon: float, without_spread: bool) -> list[int]:
        """The j that are intruders on one of the sides, ascending."""
        found = [f.new_directions(epsilon) if without_spread else f.intruders(epsilon) for f in self.sides]
        return sorted({int(j) for js in found for j in js})


@dataclass(frozen=True)
class Mitigation:
    """Scale the intruder dimensions: W'(lambda) = W' + (lambda - 1) sum s'_j y_j z_j^T over them.

    Source: Shuttleworth et al., arXiv 2410.21228, whose intervention takes the first intruder of each matrix.

    Attributes:
        factor: lambda. 1 leaves the tuned model as it is, 0 takes the intruders out, more than 1 strengthens them.
        which: "top", the first intruder of each matrix alone, or "all".
        k, epsilon, side: what an intruder is, as in `find_intruders`; with both sides, a triplet is one on either.
        keep_spread: leave those alone that only spread over a cluster of base directions.
        control: scale as many base directions in their place, u_i s_i v_i^T of the nearest singular values. Intruders
            stronger than s_0 have no equal in the base: then lambda moves the control less, and the result says how
            much each moves.
    """

    factor: float = 0.7
    which: Literal["top", "all"] = "top"
    k: int = 10
    epsilon: float = 0.5
    side: Sides = "left"
    keep_spread: bool = False
    control: bool = False
    of_vectors: ClassVar[None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", number(self.factor, "lambda", "0.7"))
        object.__setattr__(self, "k", whole(self.k, "k"))
        object.__setattr__(self, "epsilon", number(self.epsilon, "epsilon"))
        if self.which not in ("top", "all") or self.side not in ("left", "right", "both"):
            raise SpectraError("intruders are scaled 'top' or 'all', and found on side 'left', 'right' or 'both'")
        if self.k < 1 or not 0 <= self.epsilon <= 1:
            raise SpectraError("k must be at least 1, and epsilon between 0 and 1")

    def apply(self, subject: Subject) -> Applied:
        leaders = self.leaders(subject.base, subject.tuned)
        found = leaders.intruders(self.epsilon, self.keep_spread)
        chosen = found[:1] if self.which == "top" else found
        triplets = leaders.triplets
        stands_for = None
        if self.control:
            stands_for = abs(self.factor - 1) * float(torch.linalg.vector_norm(triplets.S[chosen]))
            spectrum = self._spectrum(subject.base, subject.tuned)
            near = nearest_components(spectrum, triplets.S[chosen])
            D = scaled_triplets(
                subject.D, spectrum.U[:, near], spectrum.S[near], spectrum.V[:, near], self.factor
            )  # fmt: skip
        else:
            D = scaled_triplets(
                subject.D, triplets.Y[:, chosen], triplets.S[chosen], triplets.Z[:, chosen], self.factor
            )  # fmt: skip
        return Applied(D, scaled=tuple(chosen) if D is not subject.D else (), before=leaders, stands_for=stands_for)

    def leaders(self, base: BaseMatrix, tuned: torch.Tensor | LowRank) -> Leaders:
        """The leading triplets of a tuned weight, held against the base."""
        spectrum = self._spectrum(base, tuned)
        triplets = tuned_triplets(base.weight, spectrum, tuned, self.k)
        sides: tuple[Literal["left", "right"], ...] = ("left", "right") if self.side == "both" else (self.side,)
        return Leaders(triplets, tuple(familiarity(spectrum, triplets, self.k, side) for side in sides))

    def _spectrum(self, base: BaseMatrix, tuned: torch.Tensor | LowRank) -> Spectrum:
        """In float64 for factors, as `find_intruders` takes it: so both count the same, and share a cache."""
        wide = isinstance(tuned, LowRank) or torch.float64 in (base.weight.dtype, tuned.dtype)
        return base.spectrum(torch.float64 if wide else torch.float32)


@dataclass(frozen=True)
class Scaling:
    """factor D in the place of D: the tuned model moved along the line through it and its base, vectors too."""

    factor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", number(self.factor, "the factor"))

    @property
    def of_vectors(self) -> float:
        """Biases and norms lie on the same line."""
        return self.factor

    def apply(self, subject: Subject) -> Applied:
        return Applied(scaled(subject.D, self.factor))


@dataclass(frozen=True)
class Truncation:
    """D cut to `rank` of its singular components, or to those that hold a share `energy` of ||D||_F^2.

    Attributes: keep: "top", or as many from the "bottom" or at "random" (by `seed`) as controls.
    """

    rank: int | None = None
    energy: float | None = None
    keep: Keep = "top"
    seed: int = 0
    of_vectors: ClassVar[None] = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise SpectraError("an update is cut to a rank or to a share of its energy; give one of the two")
        if self.rank is not None:
            object.__setattr__(self, "rank", whole(self.rank, "the rank"))
        if self.energy is not None:
            object.__setattr__(self, "energy", number(self.energy, "the share of energy", "0.9"))
        object.__setattr__(self, "seed", whole(self.seed, "the seed"))
        if self.rank is not None and self.rank < 1:
            raise SpectraError(f"the rank is {self.rank}, and at least 1 is needed; to take all back, rewind")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise SpectraError(f"{self.energy:g} is no share of energy; give one above 0 and up to 1, such as 0.9")
        if self.keep not in ("top", "bottom", "random"):
            raise SpectraError(f"{self.keep!r} components cannot be kept; give top, bottom or random")

    def apply(self, subject: Subject) -> Applied:
        stored = subject.pair.base_dtype, subject.pair.tuned_dtype
        digits = torch.float64 if torch.float64 in stored else torch.float32  # D holds the rounding of its storage
        seed = _seed_for(subject.pair.matrix.name, self.seed)
        return Applied(truncated(subject.D, self.rank, self.energy, self.keep, seed, digits))


@dataclass(frozen=True)
class Rewinding:
    """The base again: for whole matrices, for components [start, stop) of the base, or for attention heads.

    Attributes:
        components: the slice; its end may lie beyond the smallest matrices, which lose what they have of it.
        heads: of an attention head, the rows of query, key and value with their biases, and the columns of the output
            projection, whose bias is no single head's; a key and value that several heads share are rewound where all
            of those are. None: whole matrices; an empty list is refused.
        head_size: d; None: as config.json says.
    """

    components: tuple[int, int] | None = None
    heads: Sequence[int] | None = None
    head_size: int | None = None

    def __post_init__(self) -> None:
        if self.components is not None and self.heads is not None:
            raise SpectraError("components and heads cannot be rewound in one edit; do one after the other")
        if self.components is not None:
            ends = wholes(self.components, "components")
            if len(ends) != 2 or not 0 <= ends[0] < ends[1]:
                raise SpectraError("a slice of components runs from 0 or more to a larger number, such as 0:64")
            object.__setattr__(self, "components", ends)
        if self.heads is not None:
            object.__setattr__(self, "heads", wholes(self.heads, "heads"))
        if self.head_size is not None:
            object.__setattr__(self, "head_size", whole(self.head_size, "the size of the heads"))
            if self.heads is None:
                raise SpectraError("a size of heads is given and no heads; name the heads, or leave their size out")
        if min(self.heads or (0,)) < 0 or (self.head_size is not None and self.head_size < 1):
            raise SpectraError("heads are counted from 0, and their size is at least 1")

    @property
    def of_vectors(self) -> float | None:
        """Where matrices go back altogether, so do the vectors beside them."""
        return None if self.components is not None or self.heads is not None else 0.0

    def apply(self, subject: Subject) -> Applied:
        if self.components is not None:
            spectrum = subject.base.spectrum(torch.float64)
            start, stop = (min(bound, len(spectrum.S)) for bound in self.components)
            note = f"has no component from {self.components[0]} on" if start == stop else ""
            return Applied(rewound_components(subject.D, spectrum, start, stop), note)
        if self.heads is None:
            return Applied(scaled(subject.D, 0.0))
        entries = head_entries(subject.pair.matrix, subject.config, self.heads, self.head_size)
        if isinstance(entries, str):
            return Applied(subject.D, entries)
        return Applied(rewound_entries(subject.D, *entries))


def _seed_for(name: str, seed: int) -> int:
    """A seed for one matrix that does not depend on which others are edited."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")

"""The edits that can be asked for, as values: each says what becomes of one update D = W' - W."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from spectra.editing.arguments import number, whole, wholes
from spectra.editing.heads import SHARED, UNKNOWN, head_entries, shared_heads
from spectra.editing.leaders import Leaders, Sides, leaders_of
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
from spectra.loading import BaseMatrix
from spectra.pairing import Pair


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
        kept: what was asked for and stays as it was, or why nothing was to be done, in words for all such matrices.
        scaled, before: of a mitigation, how many directions it scaled, and the leading triplets before it.
        stands_for: of its control, ||change||_F of the scaling of intruders that it stands in the place of.
        control_lambda: what the control multiplies base singular values by.
    """

    D: Update
    note: str = ""
    kept: str = ""
    scaled: int = 0
    before: Leaders | None = None
    stands_for: float | None = None
    control_lambda: float | None = None


class Edit(Protocol):
    """An edit of any matrix.

    of_vectors: what the change of biases, norms and the like is multiplied by; None leaves them as they are.
    """

    @property
    def of_vectors(self) -> float | None: ...

    def apply(self, subject: Subject) -> Applied: ...


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
        equal_change: of the control, lambda chosen for each matrix so that it moves as much as scaling the intruders
            by `factor` would: 1 - (1 - factor) sqrt(sum s'_j^2 / sum s_i^2), which may be negative.
    """

    factor: float = 0.7
    which: Literal["top", "all"] = "top"
    k: int = 10
    epsilon: float = 0.5
    side: Sides = "left"
    keep_spread: bool = False
    control: bool = False
    equal_change: bool = False
    of_vectors: ClassVar[None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", number(self.factor, "lambda", "0.7"))
        object.__setattr__(self, "k", whole(self.k, "k"))
        object.__setattr__(self, "epsilon", number(self.epsilon, "epsilon"))
        if self.which not in ("top", "all") or self.side not in ("left", "right", "both"):
            raise SpectraError("intruders are scaled 'top' or 'all', and found on side 'left', 'right' or 'both'")
        if self.k < 1 or not 0 <= self.epsilon <= 1:
            raise SpectraError("k must be at least 1, and epsilon between 0 and 1")
        if self.equal_change and not self.control:
            raise SpectraError("the control is what can be made to change as much; ask for the control, too")

    def apply(self, subject: Subject) -> Applied:
        leaders = self.leaders(subject.base, subject.tuned)
        if leaders.zero:
            return Applied(subject.D, kept=leaders.zero, before=leaders)
        found = leaders.intruders(self.epsilon, self.keep_spread)
        chosen = found[:1] if self.which == "top" else found
        if self.control:
            return self._control(subject, leaders, chosen)
        Y, S, Z = (X[..., chosen] for X in (leaders.triplets.Y, leaders.triplets.S, leaders.triplets.Z))
        D = scaled_triplets(subject.D, Y, S, Z, self.factor)
        return Applied(D, scaled=len(chosen) if D is not subject.D else 0, before=leaders)

    def _control(self, subject: Subject, leaders: Leaders, chosen: list[int]) -> Applied:
        """What `apply` does to base directions in the place of the chosen intruders."""
        spectrum = subject.base.spectrum_beside(subject.tuned)
        near = nearest_components(spectrum, leaders.triplets.S[chosen])
        U, S, V = (X[..., near] for X in (spectrum.U, spectrum.S, spectrum.V))
        strength, own = (float(torch.linalg.vector_norm(s.double())) for s in (leaders.triplets.S[chosen], S))
        factor = self.factor
        if self.equal_change and chosen:
            if own <= torch.finfo(torch.float32).eps * float(spectrum.S[0]):
                return Applied(subject.D, kept="the base directions nearest in strength are zero", before=leaders)
            factor = 1 - (1 - factor) * strength / own
        D = scaled_triplets(subject.D, U, S, V, factor)
        return Applied(
            D,
            scaled=len(near) if D is not subject.D else 0,
            before=leaders,
            stands_for=abs(self.factor - 1) * strength,
            control_lambda=factor if chosen else None,
        )

    def leaders(self, base: BaseMatrix, tuned: torch.Tensor | LowRank) -> Leaders:
        """The leading triplets of a tuned weight, held against the base."""
        return leaders_of(base, tuned, self.k, self.side)


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
        matrix = subject.pair.matrix
        entries = head_entries(matrix, subject.config, self.heads, self.head_size)
        if isinstance(entries, str):
            return Applied(subject.D, kept=entries) if entries == UNKNOWN else Applied(subject.D, entries)
        shared = shared_heads(matrix, subject.config, self.heads, self.head_size)
        return Applied(rewound_entries(subject.D, *entries), kept=SHARED if shared else "")


def _seed_for(name: str, seed: int) -> int:
    """A seed for one matrix that does not depend on which others are edited."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")

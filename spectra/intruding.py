"""Intruder dimensions of any pair: which leading directions of the tuned weights resemble none of the base's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from spectra.engines.studying import Progress, opened, places, study
from spectra.errors import SpectraError
from spectra.intrusion import SIDES, Intrusion
from spectra.jobs import CAN_FAIL, failed
from spectra.labels import labelled
from spectra.loading import BaseMatrix, Group
from spectra.measures.familiarity import Familiarity, Side, familiarity
from spectra.measures.intruders import CLUSTER_GAP
from spectra.measures.tuned import tuned_triplets, why_in_full, without_directions
from spectra.numeric import is_share, is_whole
from spectra.pairing import Pair
from spectra.report import wording
from spectra.report.intruder_tables import tables

if TYPE_CHECKING:
    from spectra.cache import SpectrumCache

Source = Any  # a path, a hub id, a state dict, an nn.Module, or an open Checkpoint


def find_intruders(
    base: Source,
    tuned: Source | Sequence[Source] | Mapping[str, Source],
    *,
    k: int = 10,
    epsilon: float = 0.5,
    side: Literal["left", "right", "both"] = "left",
    cluster_gap: float = CLUSTER_GAP,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    transposed: Sequence[str] | None = None,
    device: str | Sequence[str] = "auto",
    dtype: torch.dtype | None = None,
    fast: bool = False,
    workers: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_limit: int = 20 * 2**30,
    progress: Progress | None = None,
) -> Intrusion:
    """Find the intruder dimensions of tuned models: leading directions that resemble none of the base's.

    Direction y_j, j < k, of a tuned weight W' is an intruder where max_i |<u_i, y_j>| < epsilon. Published: left
    vectors, k = 10, epsilon = 0.5.

    Args:
        base, tuned: as for `compare`; adapters are taken as their factors, and W' is not formed.
        side: output directions (left), input directions (right), or both.
        cluster_gap: relative distance of singular values within which base components count as one cluster.
        include, exclude, transposed, device, dtype, workers, cache, cache_limit, progress: as for `compare`.
        fast: iterate the leading triplets alone (see `tuned_triplets`).
    Returns: an `Intrusion`. A matrix that cannot be read has status "failed" and the reason; one that is the base's to
        the last bit has status "unchanged" and no triplets; one that is all zero, before or after, has no directions,
        and its counts are missing. The notes of the provenance say how many needed a full SVD of W', and how many
        leading triplets are zero to rounding and so have no direction.
    Raises: SpectraError for input that cannot be read or matched.

    >>> base = {"fc.weight": torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))}
    >>> tuned = {"fc.weight": base["fc.weight"] + 5 * torch.ones(4, 4) / 4}
    >>> find_intruders(base, tuned, k=1, epsilon=0.9).intruders[["index", "partner"]].values.tolist()
    [[0, 0]]
    """
    if not is_whole(k) or k < 1:
        raise SpectraError(f"k must be a whole number of directions, at least 1, not {k!r}")
    if not is_share(epsilon) or not is_share(cluster_gap) or cluster_gap == 1:
        raise SpectraError(
            f"epsilon must be a number between 0 and 1, and cluster_gap one from 0 to below 1, not {epsilon!r} and "
            f"{cluster_gap!r}"
        )
    if side not in SIDES:
        raise SpectraError(f"{side!r} is no side; give left, right or both")
    if dtype not in (None, torch.float32, torch.float64):
        raise SpectraError(f"dtype is {dtype!r}, which the products cannot have; give torch.float32 or torch.float64")
    where = places(device, workers, cache, cache_limit)
    pairs = opened(base, labelled(tuned), include, exclude, transposed)
    search = _Search(k, SIDES[side], cluster_gap, dtype, fast, where.cache)
    found = study(search.run, pairs.pairings, where, progress)
    options = {"k": k, "epsilon": epsilon, "side": side, "cluster_gap": cluster_gap, "fast": fast,
               "include": list(include), "exclude": list(exclude)}  # fmt: skip
    provenance = pairs.provenance(options, where)
    provenance["notes"] += [*wording.in_full([one.fallback] for one in found), *_without_direction(found)]
    unmatched = [
        (label, item.name, item.side, item.reason)
        for label, pairing in pairs.pairings.items()
        for item in pairing.unmatched
    ]
    return _tabulated(found, unmatched, epsilon, provenance)


@dataclass(frozen=True)
class _Finding:
    """What was found of one pair."""

    tuned: str
    pair: Pair
    status: str  # compared | unchanged | failed
    note: str
    sides: Mapping[Side, Familiarity] = field(default_factory=dict)
    solvers: tuple[str, str, float] = ("", "", float("nan"))
    fallback: str = ""  # why the triplets are from a full SVD
    zeros: int = 0  # how many of the leading triplets are zero to rounding


@dataclass(frozen=True)
class _Search:
    """What is looked for, in every group of pairs."""

    k: int
    sides: tuple[Side, ...]
    gap: float
    dtype: torch.dtype | None
    fast: bool
    cache: SpectrumCache | None

    def run(self, group: Group, device: torch.device) -> list[_Finding]:
        try:
            base = BaseMatrix(group.pairs[0][1], device, self.cache)
        except CAN_FAIL as error:
            return [_failed(error, label, pair, "base") for label, pair in group.pairs]
        return [self._found(base, label, pair) for label, pair in group.pairs]

    def _found(self, base: BaseMatrix, label: str, pair: Pair) -> _Finding:
        try:
            tuned = base.tuned(pair)
            if tuned is None:
                return _Finding(label, pair, "unchanged", pair.note)
            spectrum = base.spectrum_beside(tuned, self.dtype)
            triplets = tuned_triplets(base.weight, spectrum, tuned, self.k, self.fast)
            if zero := without_directions(spectrum, triplets):
                return _Finding(label, pair, "compared", "; ".join(filter(None, (pair.note, zero))))
            sides = {side: familiarity(spectrum, triplets, self.k, side, self.gap) for side in self.sides}
            shown = min(self.k, *spectrum.shape)
            zeros = shown - len(sides[self.sides[0]].best_cosine)
        except CAN_FAIL as error:
            return _failed(error, label, pair)
        solvers = spectrum.algorithm, triplets.algorithm, triplets.residual
        note = _zero(zeros, f"{zeros} of {wording.counted(shown, 'leading triplet')}") if zeros else ""
        note = "; ".join(filter(None, (pair.note, note)))
        return _Finding(label, pair, "compared", note, sides, solvers, why_in_full(triplets), zeros)


def _failed(error: BaseException, label: str, pair: Pair, side: str | None = None) -> _Finding:
    return _Finding(label, pair, "failed", failed(error, label, pair, side).note)


def _without_direction(found: Sequence[_Finding]) -> list[str]:
    """How many leading triplets are zero to rounding, in how many matrices."""
    zeros = [one.zeros for one in found if one.zeros]
    if not zeros:
        return []
    return [_zero(sum(zeros), f"{wording.counted(sum(zeros), 'leading triplet')} of {wording.matrices(len(zeros))}")]


def _zero(count: int, subject: str) -> str:
    words = ("is", "has") if count == 1 else ("are", "have")
    return f"{subject} {words[0]} zero to rounding and {words[1]} no direction"


def _tabulated(
    found: Sequence[_Finding],
    unmatched: Sequence[tuple[str, str, str, str]],
    epsilon: float,
    provenance: Mapping[str, Any],
) -> Intrusion:
    import pandas as pd

    triplets: list[tuple[Any, ...]] = []
    matrices: list[tuple[Any, ...]] = []
    for one in found:
        matrix, counts = one.pair.matrix, {side: len(f.intruders(epsilon)) for side, f in one.sides.items()}
        zero = 0 if one.status == "unchanged" else None
        matrices.append((
            one.tuned, matrix.name, matrix.role, matrix.layer, matrix.rows, matrix.columns, one.status, one.note,
            counts.get("left", zero), counts.get("right", zero), *one.solvers,
        ))  # fmt: skip
        for side, f in one.sides.items():
            columns = (f.singular_value, f.best_cosine, f.partner, f.cluster_cosine, f.cluster_members)
            triplets += [
                (one.tuned, matrix.name, side, j, *values, f.null)
                for j, values in enumerate(zip(*columns, strict=True))
            ]
    by_triplet, by_matrix = tables(triplets, matrices)
    return Intrusion(
        triplets=by_triplet,
        matrices=by_matrix,
        unmatched=pd.DataFrame(list(unmatched), columns=["tuned", "name", "side", "reason"]).astype("str"),
        provenance=provenance,
    )

"""An edit of one weight matrix: loaded, edited, rounded to its storage, and measured as it will be stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from spectra.cache import SpectrumCache
from spectra.editing.adapter_files import rounded
from spectra.editing.edits import Applied, Edit, Mitigation, Subject
from spectra.editing.leaders import Leaders, counted
from spectra.editing.operations import change_norm, norm
from spectra.errors import SpectraError
from spectra.jobs import CAN_FAIL, failed
from spectra.linalg.lowrank import LowRank
from spectra.loading import BaseMatrix, Group
from spectra.pairing import Pair

ABOUT = 0.2  # changes that differ by less are said to be about the same


@dataclass(frozen=True)
class Task:
    """An edit, and what it needs to know besides the matrix: the configs of both models, the cache of base spectra."""

    edit: Edit
    config: Mapping[str, Any]
    base_config: Mapping[str, Any]
    cache: SpectrumCache | None


@dataclass(frozen=True)
class Treated:
    """What became of a matrix.

    Attributes:
        status: edited | unchanged | failed.   note: why, or what was decided.
        numbers: the columns of its row that hold numbers.
        stored: the edited W' (m x n) in its storage dtype, or the edited update; None where nothing changed.
        kept, stands_for: see `Applied`.   fallbacks: why leading triplets were taken from a full SVD.
    """

    pair: Pair
    status: str
    note: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    stored: Tensor | LowRank | None = None
    kept: str = ""
    stands_for: float | None = None
    fallbacks: tuple[str, ...] = ()

    def without_weights(self) -> Treated:
        return replace(self, stored=None)


def treat(task: Task, group: Group, device: torch.device) -> list[Treated]:
    """Apply the edit to the matrices of a group; what fails, fails alone and stays as it was."""
    ((label, pair),) = group.pairs
    try:
        base = BaseMatrix(pair, device, task.cache)
        tuned = base.tuned(pair)
        if tuned is None:
            return [Treated(pair, "unchanged", pair.note)]
        return [_treated(task, pair, base, tuned)]
    except CAN_FAIL as error:
        return [Treated(pair, "failed", failed(error, label, pair).note)]


def _treated(task: Task, pair: Pair, base: BaseMatrix, tuned: Tensor | LowRank) -> Treated:
    W = base.weight.double()
    D = tuned if isinstance(tuned, LowRank) else tuned.double() - W
    config = task.base_config if isinstance(tuned, LowRank) else task.config
    applied = task.edit.apply(Subject(pair, base, tuned, D, config))
    note = "; ".join(filter(None, (pair.note, applied.note, applied.kept)))
    before = norm(D)
    numbers: dict[str, Any] = {"update_norm": before, "change_norm": 0.0, "energy_ratio": 1.0 if before else None}
    if isinstance(D, LowRank):
        numbers |= {"rank_before": D.rank, "rank_after": D.rank}
    if applied.D is D:
        numbers |= _counted(task.edit, applied, applied.before, pair)
        return Treated(pair, "unchanged", note, numbers, kept=applied.kept, fallbacks=_fallbacks(applied.before))
    stored, D_after = _as_stored(pair, W, applied.D)
    numbers |= {
        "change_norm": change_norm(D, D_after),
        "energy_ratio": (norm(D_after) / before) ** 2 if before else None,
    }
    if isinstance(D_after, LowRank):
        numbers["rank_after"] = D_after.rank
    after = None
    if isinstance(task.edit, Mitigation):
        after = task.edit.leaders(base, D_after if isinstance(D_after, LowRank) else (W + D_after).to(base.weight))
    meant = applied.stands_for
    if meant is not None and is_unlike(numbers["change_norm"], meant):
        note = "; ".join(filter(None, (note, f"the scaling of intruders changes it by {meant:.3g}")))
    numbers |= _counted(task.edit, applied, after, pair)
    return Treated(pair, "edited", note, numbers, stored, applied.kept, meant, _fallbacks(applied.before, after))


def is_unlike(made: float, meant: float) -> bool:
    """Whether the change that a control made is not about that which it stands in the place of."""
    return abs(made - meant) > ABOUT * max(made, meant)


def _as_stored(pair: Pair, W: Tensor, D: Tensor | LowRank) -> tuple[Tensor | LowRank, Tensor | LowRank]:
    """What is written, on the CPU in its storage dtype, and the update that it makes."""
    if isinstance(D, LowRank):
        factors = rounded(D, pair.tuned_dtype)
        return LowRank(factors.B.cpu(), factors.A.cpu(), factors.c), factors
    stored = (W + D).to(pair.tuned_dtype)
    if not bool(torch.isfinite(stored.double()).all()):
        raise SpectraError(
            f"the edited {pair.matrix.name!r} overflows {str(pair.tuned_dtype).removeprefix('torch.')}; "
            "it is kept as it was"
        )
    return stored.cpu(), stored.double() - W


def _counted(edit: Edit, applied: Applied, after: Leaders | None, pair: Pair) -> dict[str, Any]:
    """The columns of a mitigation; missing where a weight has no directions."""
    before = applied.before
    if not isinstance(edit, Mitigation) or before is None or before.zero or after is None:
        return {}
    numbers = counted(before, after, edit.epsilon, pair.tuned_dtype)
    return numbers | {"intruders_scaled": applied.scaled, "control_lambda": applied.control_lambda}


def _fallbacks(*leaders: Leaders | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.fallback for one in leaders if one is not None and one.fallback))

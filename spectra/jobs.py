"""One base matrix and every update of it: the unit of work that an engine runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spectra.cache import key_of
from spectra.errors import SpectraError
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.svd import NotFiniteError
from spectra.loading import BaseMatrix, Group, identical, narrow, not_finite, refused
from spectra.measures.matrix import measure
from spectra.measures.rows import UNCHANGED, Measured

if TYPE_CHECKING:
    from spectra.cache import SpectrumCache
    from spectra.pairing import Pair


# What makes a row fail alone, with a sentence.
CAN_FAIL = (SpectraError, LapackError, OSError, MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Settings:
    """What the caller chose. dtype None: float32, and float64 where a checkpoint or an adapter's factors deserve it."""

    dtype: torch.dtype | None
    slices: int
    top: int
    epsilon: float
    fast: bool
    cache: SpectrumCache | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one (tuned, matrix). same_as: the tuned model whose bit-identical matrix was measured for both."""

    tuned: str
    pair: Pair
    status: str  # compared | unchanged | failed
    note: str
    measured: Measured | None
    trivial: Mapping[str, Any] = field(default_factory=dict)
    same_as: str = ""

    @property
    def layer(self) -> Mapping[str, Any]:
        """The row of `layers`; measures are absent where there is nothing to measure."""
        return self.measured.layer if self.measured else self.trivial


@dataclass(frozen=True)
class Job(Group):
    """A base matrix with the pairs that share it, one per tuned model, as work to be done."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (self,)

    def run(self, settings: Settings, device: torch.device) -> list[Outcome]:
        """Load, decompose the base once, measure every update. What fails here fails alone and says why."""
        try:
            base = BaseMatrix(self.pairs[0][1], device, settings.cache)
        except CAN_FAIL as error:
            return [failed(error, label, pair, "base") for label, pair in self.pairs]
        return list(self._outcomes(base, settings))

    def _outcomes(self, base: BaseMatrix, settings: Settings) -> Iterator[Outcome]:
        seen: dict[str, Outcome] = {}  # by the bits of W', where several models are compared
        for label, pair in self.pairs:
            try:
                found = self._one(label, pair, base, settings, seen)
            except CAN_FAIL as error:
                found = failed(error, label, pair)
            yield found

    def _one(self, label: str, pair: Pair, base: BaseMatrix, settings: Settings, seen: dict[str, Outcome]) -> Outcome:
        """What became of one pair. A call of its own lets go of its W' before the next one is loaded."""
        tuned = base.stored if pair.is_untouched else pair.load_tuned()
        if isinstance(tuned, Tensor) and identical(tuned, base.stored):
            return unchanged(label, pair, base.stored)
        key = bits(tuned, self) if isinstance(tuned, Tensor) else ""
        if key in seen:
            return shared(seen[key], label, pair)
        found = _outcome(label, pair, tuned, base, settings)
        if key:
            seen[key] = found
        return found


def _precision(pair: Pair, settings: Settings) -> torch.dtype:
    """The dtype of a pair's products: float64 for float64 weights, and for factors, whose path costs little."""
    wide = torch.float64 in (pair.base_dtype, pair.tuned_dtype) or (pair.is_low_rank and not settings.fast)
    return settings.dtype or (torch.float64 if wide else torch.float32)


def _outcome(label: str, pair: Pair, tuned: Tensor | LowRank, base: BaseMatrix, settings: Settings) -> Outcome:
    dtype = _precision(pair, settings)
    spectrum = base.spectrum(dtype)
    weight: Tensor | LowRank
    if isinstance(tuned, LowRank):
        weight, is_ours = LowRank(tuned.B.to(base.device), tuned.A.to(base.device), tuned.c), False
        for factor in (weight.A, weight.B):
            if not bool(torch.isfinite(factor).all()):
                raise refused(factor, f"factors for {pair.tuned_tensor}", pair.tuned.source)
    else:
        weight = narrow(tuned, base.device)
        # What was read from files, or copied, nobody else looks at; a state dict in memory is the caller's.
        is_ours = bool(pair.tuned.files) or weight.data_ptr() != tuned.data_ptr()
    try:
        measured = measure(
            base.narrow_weight,
            spectrum,
            weight,
            base_dtype=pair.base_dtype,
            tuned_dtype=pair.tuned_dtype,
            slices=settings.slices,
            top=settings.top,
            epsilon=settings.epsilon,
            fast=settings.fast,
            overwrite=is_ours,
        )
    except NotFiniteError as error:
        assert isinstance(tuned, Tensor)
        raise not_finite(tuned, pair, "tuned") from error
    return compared(label, pair, measured)


def compared(label: str, pair: Pair, measured: Measured) -> Outcome:
    """What was measured, with a note where a side is zero; failed where norms overflow."""
    if not all(isfinite(measured.layer[name]) for name in ("base_norm", "update_norm")):
        overflow = f"the squares of {pair.matrix.name!r} leave the range of float64; scale both models down"
        return failed(SpectraError(overflow), label, pair)
    zero = [side for side in ("base", "tuned") if measured.layer[f"spectral_norm_{side}"] == 0]
    note = "; ".join(filter(None, (pair.note, *(f"the {side} weight is all zero" for side in zero))))
    return Outcome(label, pair, "compared", note, measured)


def shared(found: Outcome, label: str, pair: Pair) -> Outcome:
    """The outcome of another model's matrix for one with the same bits; label, pair and note are its own."""
    assert found.measured
    return replace(compared(label, pair, found.measured), same_as=found.tuned)


def unchanged(label: str, pair: Pair, stored: Tensor) -> Outcome:
    """The outcome of a matrix that is the base's own. SpectraError where it is not finite."""
    norm = float(torch.linalg.vector_norm(stored.double()))
    if not isfinite(norm):  # equal infinities are no weights
        raise not_finite(stored, pair, "base")
    return Outcome(label, pair, "unchanged", pair.note, None, {**UNCHANGED, "base_norm": norm})


def bits(stored: Tensor, job: Job) -> str:
    """What identifies the bits of a matrix among the tuned models of a job; nothing where there is only one."""
    return key_of(stored, stored.dtype) if len(job.pairs) > 1 else ""


def failed(error: BaseException, label: str, pair: Pair, side: str | None = None) -> Outcome:
    """The outcome of a pair that could not be measured, with the reason; side: "base" where that could not be read."""
    return Outcome(label, pair, "failed", _reason(error, side or label, pair), None)


def _reason(error: BaseException, side: str, pair: Pair) -> str:
    """One sentence for the `note` of a failed row."""
    if isinstance(error, SpectraError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return (
            f"{pair.matrix.rows} x {pair.matrix.columns} did not fit into memory; use fewer workers or another device"
        )
    if isinstance(error, OSError):
        return f"{side}: {error.strerror or error}"
    return f"no singular value decomposition converged for {pair.matrix.name!r}: {error}"

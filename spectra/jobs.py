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
from spectra.linalg.svd import NotFiniteError, Spectrum, describe_not_finite, svd
from spectra.measures.matrix import measure
from spectra.measures.rows import UNCHANGED, Measured

if TYPE_CHECKING:
    from spectra.cache import SpectrumCache
    from spectra.matrices import Matrix
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
class Job:
    """A base matrix with the pairs that share it, one per tuned model."""

    pairs: tuple[tuple[str, Pair], ...]

    @property
    def matrix(self) -> Matrix:
        return self.pairs[0][1].matrix

    @property
    def cost(self) -> int:
        """Flops, roughly: what orders the jobs and moves the progress bar."""
        short, long = sorted((self.matrix.rows, self.matrix.columns))
        updates = sum(not pair.is_untouched for _, pair in self.pairs)
        return (short * short * (long + 4 * short) * (1 + updates) if updates else short * long) + 10_000

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (self,)

    def run(self, settings: Settings, device: torch.device) -> list[Outcome]:
        """Load, decompose the base once, measure every update. What fails here fails alone and says why."""
        try:
            base = _Base(self, settings, device)
        except CAN_FAIL as error:
            return [failed(error, label, pair, "base") for label, pair in self.pairs]
        return list(self._outcomes(base, settings))

    def _outcomes(self, base: _Base, settings: Settings) -> Iterator[Outcome]:
        seen: dict[str, Outcome] = {}  # by the bits of W', where several models are compared
        for label, pair in self.pairs:
            try:
                found = self._one(label, pair, base, settings, seen)
            except CAN_FAIL as error:
                found = failed(error, label, pair)
            yield found

    def _one(self, label: str, pair: Pair, base: _Base, settings: Settings, seen: dict[str, Outcome]) -> Outcome:
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


class _Base:
    """The base weight, and its spectrum from the first time that it is asked for."""

    def __init__(self, job: Job, settings: Settings, device: torch.device) -> None:
        self.pair = job.pairs[0][1]
        self.device, self.cache = device, settings.cache
        self.stored: Tensor = self.pair.load_base()
        self._spectra: dict[torch.dtype, Spectrum] = {}

    @property
    def weight(self) -> Tensor:
        """W as the numerics take it: no wider than stored."""
        return _on(self.device, self.stored)

    def spectrum(self, dtype: torch.dtype) -> Spectrum:
        """The spectrum with vectors of `dtype`, decomposed once for each: no row depends on what else is compared."""
        if dtype not in self._spectra:
            try:
                self._spectra[dtype] = self._decomposed(dtype)
            except NotFiniteError as error:
                raise not_finite(self.stored, self.pair, "base") from error
        return self._spectra[dtype]

    def _decomposed(self, dtype: torch.dtype) -> Spectrum:
        if self.cache is None:
            return svd(self.weight, dtype)
        found = self.cache.spectrum(self.stored.cpu(), dtype, lambda: svd(self.weight, dtype))
        U, S, V = (X.to(self.device) for X in (found.U, found.S, found.V))
        return Spectrum(U, S, V, found.algorithm)


def _outcome(label: str, pair: Pair, tuned: Tensor | LowRank, base: _Base, settings: Settings) -> Outcome:
    dtype = _precision(pair, settings)
    spectrum = base.spectrum(dtype)
    weight: Tensor | LowRank
    if isinstance(tuned, LowRank):
        weight, is_ours = LowRank(tuned.B.to(base.device), tuned.A.to(base.device), tuned.c), False
        for factor in (weight.A, weight.B):
            if not bool(torch.isfinite(factor).all()):
                raise _refused(factor, f"factors for {pair.tuned_tensor}", pair.tuned.source)
    else:
        weight = _on(base.device, tuned)
        # What was read from files, or copied, nobody else looks at; a state dict in memory is the caller's.
        is_ours = bool(pair.tuned.files) or weight.data_ptr() != tuned.data_ptr()
    try:
        measured = measure(
            base.weight,
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


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two weights of one shape are the same, stored in the same dtype."""
    if one.dtype != other.dtype:
        return False
    if one.dtype.itemsize == 1:  # torch compares no float8 tensor with itself
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)


def _on(device: torch.device, weight: Tensor) -> Tensor:
    """A stored weight on the device: as it is in a dtype that torch computes with, else in float32."""
    return weight.to(device, torch.float32 if weight.dtype.itemsize == 1 else weight.dtype)


def not_finite(weight: Tensor, pair: Pair, side: str) -> SpectraError:
    """The sentence for a weight that holds NaN or infinite entries; side: "base" or "tuned"."""
    if side == "base":
        return _refused(weight, pair.matrix.tensor, pair.base.source)
    return _refused(weight, pair.tuned_tensor, pair.tuned.source)


def _refused(weight: Tensor, tensor: str, source: str) -> SpectraError:
    return SpectraError(f"{tensor!r} in {source} holds {describe_not_finite(weight)}; save it again from a sound run")


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

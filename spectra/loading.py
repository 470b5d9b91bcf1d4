"""A base weight and what is held against it, on the device where the arithmetic happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.cache import SpectrumCache
from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.svd import NotFiniteError, Spectrum, describe_not_finite, svd
from spectra.matrices import Matrix
from spectra.pairing import Pair, Pairing


@dataclass(frozen=True)
class Group:
    """The pairs of several tuned models that share a base matrix, and so its decomposition."""

    pairs: tuple[tuple[str, Pair], ...]

    @property
    def matrix(self) -> Matrix:
        return self.pairs[0][1].matrix

    @property
    def cost(self) -> int:
        """Flops, roughly: what orders the work and moves the progress bar."""
        short, long = sorted((self.matrix.rows, self.matrix.columns))
        touched = sum(not pair.is_untouched for _, pair in self.pairs)
        return (short * short * (long + 4 * short) * (1 + touched) if touched else short * long) + 10_000


def grouped(pairings: Mapping[str, Pairing]) -> list[Group]:
    """The pairs by base matrix (cut to the same common part), the costliest first, which fills the cores best."""
    found: dict[tuple[str, int, int], list[tuple[str, Pair]]] = {}
    for label, pairing in pairings.items():
        for pair in pairing.pairs:
            found.setdefault((pair.matrix.name, pair.matrix.rows, pair.matrix.columns), []).append((label, pair))
    return sorted((Group(tuple(pairs)) for pairs in found.values()), key=lambda group: -group.cost)


class BaseMatrix:
    """W of a pair on a device, and its spectrum from the first time that it is asked for.

    Raises, when made or asked: SpectraError for weights that cannot be read or are not finite, LapackError where no
    decomposition converges.
    """

    def __init__(self, pair: Pair, device: torch.device, cache: SpectrumCache | None = None) -> None:
        self.pair, self.device, self.cache = pair, device, cache
        self.stored: Tensor = pair.load_base()  # (m, n)
        self._spectra: dict[torch.dtype, Spectrum] = {}

    @property
    def weight(self) -> Tensor:
        """W (m x n) as the numerics take it: float32, or float64 where it is stored so."""
        return self._placed(self.stored)

    @property
    def narrow_weight(self) -> Tensor:
        """W (m x n) no wider than it is stored."""
        return narrow(self.stored, self.device)

    def spectrum(self, dtype: torch.dtype) -> Spectrum:
        """The spectrum of W with vectors of `dtype`, decomposed once for each: no row depends on what else is asked."""
        if dtype not in self._spectra:
            try:
                self._spectra[dtype] = self._decomposed(dtype)
            except NotFiniteError as error:
                raise not_finite(self.stored, self.pair, "base") from error
        return self._spectra[dtype]

    def spectrum_beside(self, tuned: Tensor | LowRank, dtype: torch.dtype | None = None) -> Spectrum:
        """The spectrum of W that W' (or D as factors, as `tuned` gives them) is held against.

        Without a dtype asked for, its vectors are float64 for factors and beside a float64 weight, else float32.
        """
        wide = isinstance(tuned, LowRank) or torch.float64 in (self.stored.dtype, tuned.dtype)
        return self.spectrum(dtype or (torch.float64 if wide else torch.float32))

    def tuned(self, pair: Pair) -> Tensor | LowRank | None:
        """W' (m x n) as the numerics take it, or the update D as its factors; None where W' is W, to the last bit."""
        stored = None if pair.is_untouched else pair.load_tuned()
        if stored is None or (isinstance(stored, Tensor) and identical(stored, self.stored)):
            return None
        if isinstance(stored, LowRank):
            for factor in (stored.A, stored.B):
                if not bool(torch.isfinite(factor).all()):
                    raise SpectraError(
                        f"the factors for {pair.tuned_tensor!r} in {pair.tuned.source} hold "
                        f"{describe_not_finite(factor)}; save them again from a sound run"
                    )
            return LowRank(stored.B.to(self.device), stored.A.to(self.device), stored.c)
        placed = self._placed(stored)
        if not bool(torch.isfinite(placed).all()):
            raise not_finite(stored, pair, "tuned")
        return placed

    def _decomposed(self, dtype: torch.dtype) -> Spectrum:
        if self.cache is None:
            return svd(self.narrow_weight, dtype)
        found = self.cache.spectrum(self.stored.cpu(), dtype, lambda: svd(self.narrow_weight, dtype))
        U, S, V = (X.to(self.device) for X in (found.U, found.S, found.V))
        return Spectrum(U, S, V, found.algorithm)

    def _placed(self, stored: Tensor) -> Tensor:
        return stored.to(self.device, torch.float64 if stored.dtype == torch.float64 else torch.float32)


def in_reading_order(groups: Sequence[Group], pairings: Mapping[str, Pairing]) -> list[tuple[int, int]]:
    """Where the pairs stand among the groups, as (group, place in it): by tuned model, then as the base is read."""
    places = {
        (label, pair.matrix.name): (at, index)
        for at, group in enumerate(groups)
        for index, (label, pair) in enumerate(group.pairs)
    }
    return [places[label, pair.matrix.name] for label, pairing in pairings.items() for pair in pairing.pairs]


def identical(one: Tensor, other: Tensor) -> bool:
    """Whether two weights of one shape are the same, stored in the same dtype."""
    if one.dtype != other.dtype:
        return False
    if one.dtype.itemsize == 1:  # torch compares no float8 tensor with itself
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    return torch.equal(one, other)


def narrow(weight: Tensor, device: torch.device) -> Tensor:
    """A stored weight on the device: as it is in a dtype that torch computes with, else in float32."""
    return weight.to(device, torch.float32 if weight.dtype.itemsize == 1 else weight.dtype)


def not_finite(weight: Tensor, pair: Pair, side: str) -> SpectraError:
    """The sentence for a weight that holds NaN or infinite entries; side: "base" or "tuned"."""
    if side == "base":
        return refused(weight, pair.matrix.tensor, pair.base.source)
    return refused(weight, pair.tuned_tensor, pair.tuned.source)


def refused(weight: Tensor, tensor: str, source: str) -> SpectraError:
    """The sentence for a tensor of a source that holds NaN or infinite entries."""
    return SpectraError(f"{tensor!r} in {source} holds {describe_not_finite(weight)}; save it again from a sound run")

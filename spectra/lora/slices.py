"""LoRA factors that hold a slice [start, start + r) of a weight's singular triplets, and the residual that is left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from spectra.errors import SpectraError
from spectra.linalg.slices import singular_slice
from spectra.linalg.svd import Spectrum
from spectra.numeric import is_number, is_share, is_whole

Scale = Literal["sqrt_sigma", "orthonormal"]

FOREIGN = 1e-5  # ||W V - U S||_F above FOREIGN s_0 sqrt(r): the triplets are those of another weight


@dataclass(frozen=True)
class SliceInit:
    """The start of a LoRA of a weight W (m x n): W = W_frozen + c B0 A0.

    Attributes:
        A0: (r, n), and B0: (m, r): float32, float64 where W is.
        scaling: c of D = c (B A - B0 A0).
        start: first component of the slice; None where the factors are no slice of W.
        singular_values: (r,) float64, s_i of the slice; None where the factors are none.
        weight: (m, n) the W that was given, not a copy.
    """

    A0: Tensor
    B0: Tensor
    scaling: float
    weight: Tensor = field(repr=False)
    start: int | None = None
    singular_values: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A0.shape[0]

    @property
    def W_frozen(self) -> Tensor:
        """W - c B0 A0 (m, n), of A0's dtype: 2 m n r flops and a copy of W, each time that it is asked for."""
        return torch.addmm(self.weight.to(self.A0.dtype), self.B0, self.A0, alpha=-self.scaling)


def slice_init(
    weight: Tensor,
    *,
    start: int | None = None,
    position: float | None = None,
    rank: int,
    scaling: float = 1.0,
    scale: Scale = "sqrt_sigma",
    spectrum: Spectrum | None = None,
) -> SliceInit:
    """Factors of the slice [start, start + rank) of a weight (slice-LoRA; Quercia et al., arXiv 2602.03493).

        scale="sqrt_sigma":   B0 = U_r S_r^(1/2) / sqrt(c)   A0 = S_r^(1/2) V_r^T / sqrt(c)
        scale="orthonormal":  B0 = U_r / sqrt(c)             A0 = V_r^T / sqrt(c)

    start 0 is PiSSA (Meng et al., arXiv 2404.02948), start k - r MiLoRA (Wang et al., arXiv 2406.09044). The sign of
    each triplet is chosen so that the largest entry of v_i is positive. Components whose singular value is zero have
    zero factors with sqrt_sigma, and no gradient ever moves them.

    Args:
        weight: (m, n), a real floating dtype.
        start, position: exactly one of them; a position p in [0, 1] is start = round(p (k - rank)), k = min(m, n).
        rank: r, from 1 to k.   scaling: c > 0.
        spectrum: the whole `Spectrum` of this weight, where the caller has it: then nothing is decomposed.
    Returns: `SliceInit` on the weight's device.
    Raises: SpectraError for a slice that does not lie in the weight, for a spectrum of another weight, and for NaN or
        infinite entries.
    Cost: that of `singular_slice`; with `spectrum` 2 m n r flops, which check that it is this weight's.

    >>> init = slice_init(torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0])), start=1, rank=2, scaling=2.0)
    >>> torch.diagonal(init.W_frozen).abs().round(decimals=4).tolist(), init.singular_values.tolist()
    ([5.0, 0.0, 0.0, 1.0], [3.0, 2.0])
    """
    first = slice_start(weight, rank, start=start, position=position)
    if not is_number(scaling) or not scaling > 0:
        raise SpectraError(f"a scaling of {scaling!r} cannot be divided among two factors; give a number above 0")
    if scale not in ("sqrt_sigma", "orthonormal"):
        raise SpectraError(f"{scale!r} is no scale of a slice; give sqrt_sigma or orthonormal")
    W = with_float64(weight.detach())
    if spectrum is None:
        triplets = singular_slice(W, first, rank)
    else:
        cut = slice(first, first + rank)
        _check_origin(W, spectrum, cut)
        triplets = Spectrum(spectrum.U[:, cut], spectrum.S[cut], spectrum.V[:, cut], spectrum.algorithm)
    U, S, V = (X.to(W.device).double() for X in (triplets.U, triplets.S, triplets.V))  # (m, r), (r,), (n, r)
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))  # (1, r)
    signs = torch.where(largest < 0, -1.0, 1.0)
    sizes = (S.sqrt() if scale == "sqrt_sigma" else torch.ones_like(S)) / scaling**0.5
    dtype = factor_dtype(weight)
    B0, A0 = (U * signs * sizes).to(dtype), (V * signs * sizes).T.contiguous().to(dtype)
    return SliceInit(A0.to(weight.device), B0.to(weight.device), scaling, weight.detach(), first, S.cpu())


def slice_start(weight: Tensor, rank: int, *, start: int | None = None, position: float | None = None) -> int:
    """The first component of the slice that a start or a position names; SpectraError where there is none such."""
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        kind = str(weight.dtype).removeprefix("torch.")
        raise SpectraError(
            f"a tensor of shape {tuple(weight.shape)} and dtype {kind} has no singular slices; give a real matrix"
        )
    m, n = weight.shape
    k = min(m, n)
    if not is_whole(rank):
        raise SpectraError(f"the rank of a slice is {rank!r}; give a whole number from 1 to {k}")
    if not 1 <= rank <= k:
        raise SpectraError(
            f"a {m} x {n} weight has {k} components and no slice of rank {rank}; give a rank of 1 to {k}"
        )
    if (start is None) == (position is None):
        raise SpectraError("a slice is named by its start or by its position; give exactly one of them")
    if position is not None:
        check_position("position", position)
        return round(position * (k - rank))
    if not is_whole(start):
        raise SpectraError(f"the start of a slice is {start!r}; give a whole number from 0 to {k - rank}")
    if not 0 <= start <= k - rank:
        raise SpectraError(
            f"the slice [{start}, {start + rank}) does not lie in the {k} components of a {m} x {n} weight; "
            f"give a start of 0 to {k - rank}"
        )
    return int(start)


def check_position(name: str, position: object) -> None:
    """Raise `SpectraError`, with the name of what was given, for a position that is none."""
    if not is_share(position):
        raise SpectraError(f"{name} is {position!r}; give a number from 0, the top of the spectrum, to 1, its end")


def factor_dtype(weight: Tensor) -> torch.dtype:
    """What the factors of a weight are kept in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def with_float64(weight: Tensor) -> Tensor:
    """The tensor where float64 arithmetic is: MPS has none."""
    return weight.cpu() if weight.device.type == "mps" else weight


def _check_origin(W: Tensor, spectrum: Spectrum, cut: slice) -> None:
    """Raise SpectraError unless these triplets satisfy W V = U S: after training, a kept spectrum is of another W."""
    if spectrum.shape != tuple(W.shape) or len(spectrum.S) != min(W.shape):
        raise SpectraError(
            f"a spectrum of a {spectrum.shape[0]} x {spectrum.shape[1]} weight with {len(spectrum.S)} components was "
            f"given for a {W.shape[0]} x {W.shape[1]} weight; give the whole spectrum of this weight"
        )
    dtype = factor_dtype(W)
    U, S, V = (X.to(W.device, dtype) for X in (spectrum.U[:, cut], spectrum.S[cut], spectrum.V[:, cut]))
    rest = float(torch.linalg.vector_norm(W.to(dtype) @ V - U * S))
    if not rest <= FOREIGN * float(spectrum.S[0]) * len(S) ** 0.5:
        raise SpectraError(
            "the spectrum that was given is not of this weight, which has changed since or holds NaN; "
            "leave it out, or start with an empty mapping of spectra"
        )

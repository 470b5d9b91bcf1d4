"""Where the factors of a LoRA start: one function each, and the table of their names.

Every initialisation gives factors A0, B0 of a weight W (m x n) with W = W_frozen + c B0 A0, so that none of them
changes the function at step 0. Another one is one more function and one more line of `METHODS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.errors import SpectraError
from spectra.linalg.slices import singular_slice
from spectra.linalg.svd import Spectrum
from spectra.lora.slices import Scale, SliceInit, factor_dtype, slice_init, with_float64


def random_init(
    weight: Tensor, *, rank: int, scaling: float = 1.0, seed: int = 0, singular_values: Tensor | None = None
) -> SliceInit:
    """Factors on random orthonormal directions: the control of a slice, which differs from it in directions alone.

        B0 = Q_m diag(s)^(1/2) / sqrt(c)    A0 = diag(s)^(1/2) Q_n^T / sqrt(c)

    with Q_m (m x r) and Q_n (n x r) uniformly distributed among matrices of orthonormal columns (QR of Gaussians).

    Args: weight (m, n); singular_values (r,): s, those of the slice that this is the control of; ones by default.
    Returns: `SliceInit` without start.   Raises: SpectraError where rank exceeds min(m, n).
    Cost: 2 (m + n) r^2 flops.

    >>> init = random_init(torch.ones(5, 4), rank=2, seed=1)
    >>> torch.allclose(init.A0 @ init.A0.T, torch.eye(2), atol=1e-6)
    True
    """
    _check(weight, rank, scaling)
    generator = torch.Generator().manual_seed(seed)
    m, n = weight.shape
    Q_m, Q_n = (
        torch.linalg.qr(torch.randn(length, rank, generator=generator, dtype=torch.float64)).Q for length in (m, n)
    )
    s = torch.ones(rank, dtype=torch.float64) if singular_values is None else singular_values.cpu().double()
    sizes = (s / scaling).sqrt()
    return _of(weight, (Q_n * sizes).T, Q_m * sizes, scaling)


def lora_init(weight: Tensor, *, rank: int, scaling: float = 1.0, seed: int = 0) -> SliceInit:
    """Entries of A0 uniform in [-1/sqrt(n), 1/sqrt(n)], B0 = 0 (Hu et al. 2021, arXiv 2106.09685, as in their code).

    Args: weight (m, n).   Returns: `SliceInit` without start.   Raises: SpectraError where rank exceeds min(m, n).

    >>> float(lora_init(torch.ones(5, 4), rank=2).B0.abs().sum())
    0.0
    """
    _check(weight, rank, scaling)
    generator = torch.Generator().manual_seed(seed)
    m, n = weight.shape
    A0 = (2 * torch.rand(rank, n, generator=generator, dtype=torch.float64) - 1) / math.sqrt(n)  # (r, n)
    return _of(weight, A0, torch.zeros(m, rank), scaling)


def lora_ga_init(weight: Tensor, gradient: Tensor, *, rank: int, scaling: float, gamma: float = 16.0) -> SliceInit:
    """LoRA-GA of Wang, Yu and Li 2024 (arXiv 2407.05000): factors from the mean gradient G = U S V^T of the weight.

        A0 = t V[:, :r]^T    B0 = t U[:, r:2r]    t = m^(1/4) / sqrt(gamma)

    To first order in the step size eta, the first step of gradient descent moves the weight by
    D = -eta c^2 t^2 G_2r, with G_2r the best approximation of G of rank 2r: B0 dA gives its components r to 2r - 1, and
    dB A0 the first r; what is left, c dB dA, is of order eta^2. No scale is taken from S: the `lora_ga` of `peft`,
    which multiplies B0 by the singular values of G and scales B0 alone, is another method (here `peft:lora_ga`).

    Args:
        weight: (m, n).   gradient: (m, n) of the loss by the weight, any real dtype.
        scaling: c; the paper has alpha / sqrt(r).   gamma: the paper's stable-output constant.
    Raises: SpectraError where 2 r > min(m, n), and where the gradient is zero, of another shape or not finite.
    Cost: of 2r singular triplets of G.

    >>> G = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    >>> init = lora_ga_init(torch.zeros(4, 4), G, rank=1, scaling=1.0)
    >>> int(init.A0.abs().argmax()), int(init.B0.abs().argmax()), round(float(init.B0.norm()), 4)
    (0, 1, 0.3536)
    """
    _check(weight, rank, scaling)
    m, n = weight.shape
    if gradient.shape != weight.shape:
        raise SpectraError(
            f"a gradient of shape {tuple(gradient.shape)} was given for a weight of shape {tuple(weight.shape)}; "
            "give the gradient of this weight"
        )
    if 2 * rank > min(m, n):
        raise SpectraError(
            f"LoRA-GA of rank {rank} takes {2 * rank} directions, and a {m} x {n} weight has {min(m, n)}; "
            f"give a rank of at most {min(m, n) // 2}"
        )
    G = singular_slice(with_float64(gradient.detach()), 0, 2 * rank)
    if not G.S[0] > 0:
        raise SpectraError("LoRA-GA starts from a gradient, and this one is zero; give batches that move the weight")
    t = m**0.25 / math.sqrt(gamma)
    return _of(weight, t * G.V[:, :rank].T, t * G.U[:, rank:], scaling)


@dataclass(frozen=True)
class Request:
    """What an initialisation may need to know of one weight. `spectrum` and `gradient` are asked for only where used.

    `spectrum` gives the whole `Spectrum` of the weight where one is kept, None where a slice is better taken alone;
    `gradient` gives the mean gradient (m, n), or raises SpectraError.
    """

    weight: Tensor
    rank: int
    scaling: float
    scale: Scale
    start: int | None
    position: float | None
    seed: int
    gamma: float
    spectrum: Callable[[], Spectrum | None]
    gradient: Callable[[], Tensor]


def _slice(request: Request) -> SliceInit:
    return slice_init(
        request.weight,
        start=request.start,
        position=request.position,
        rank=request.rank,
        scaling=request.scaling,
        scale=request.scale,
        spectrum=request.spectrum(),
    )


def _random(request: Request) -> SliceInit:
    """Of the sizes of the slice that a start or a position names; without, of the weight's root mean square s_i."""
    sizes: Tensor | None = None
    if request.scale == "sqrt_sigma" and request.start is None and request.position is None:
        norm = float(torch.linalg.vector_norm(request.weight.to(factor_dtype(request.weight))))
        sizes = torch.full((request.rank,), norm / math.sqrt(min(request.weight.shape)), dtype=torch.float64)
    elif request.scale == "sqrt_sigma":
        sizes = _slice(request).singular_values
    return random_init(
        request.weight, rank=request.rank, scaling=request.scaling, seed=request.seed, singular_values=sizes
    )


def _lora(request: Request) -> SliceInit:
    return lora_init(request.weight, rank=request.rank, scaling=request.scaling, seed=request.seed)


def _lora_ga(request: Request) -> SliceInit:
    return lora_ga_init(
        request.weight, request.gradient(), rank=request.rank, scaling=request.scaling, gamma=request.gamma
    )


METHODS: Mapping[str, Callable[[Request], SliceInit]] = {
    "slice": _slice,
    "pissa": _slice,  # of start 0, and
    "milora": _slice,  # of position 1, as `SliceConfig.slice_of` has it
    "random": _random,
    "lora": _lora,
    "lora_ga": _lora_ga,
}


def _check(weight: Tensor, rank: int, scaling: float) -> None:
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise SpectraError(
            f"a weight of shape {tuple(weight.shape)} has no factors of rank {rank}; "
            "give a matrix, and a rank of at most its smaller side"
        )
    if not scaling > 0:
        raise SpectraError(f"a scaling of {scaling:g} is no scaling of a LoRA; give one above 0")


def _of(weight: Tensor, A0: Tensor, B0: Tensor, scaling: float) -> SliceInit:
    A0, B0 = (factor.to(factor_dtype(weight)).contiguous().to(weight.device) for factor in (A0, B0))
    return SliceInit(A0, B0, scaling, weight.detach())

"""How much of an update is storage rounding: the noise that two storage dtypes leave in D = W' - W."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

BLOCK = 1 << 16  # entries at a time: what is made of them stays in the processor's cache
FLOOR_FACTOR = 3.0  # an update under this many floors is mostly rounding


@dataclass(frozen=True)
class Rounding:
    """What storage does to one pair.

    Attributes:
        floor: the expected norm of the rounding noise in D, relative to ||W||_F.
        tuned_floor: the same of the tuned side alone: what there is where training started from the stored base.
        unmoved_share: the share of entries with |D_ij| <= ulp(W_ij), in the coarser of the two dtypes.
    """

    floor: float
    tuned_floor: float
    unmoved_share: float


def rounding(W: Tensor, D: Tensor, base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> Rounding:
    """The rounding floor of a pair, and how many of its entries moved beyond the spacing of their dtype.

    An entry w stored with spacing ulp(w) is off by a uniform error of variance ulp(w)^2 / 12; base and tuned add up.
    For Gaussian weights the floor is 1.7e-3 for one bfloat16 side, 2.1e-4 for float16, 2.5e-8 for float32.

    Args: W and D = W' - W, both (m, n) in float32 or float64; the dtypes as stored.   A zero W has floor 0.
    """
    coarse = base_dtype if torch.finfo(base_dtype).eps >= torch.finfo(tuned_dtype).eps else tuned_dtype
    fine = tuned_dtype if coarse == base_dtype else base_dtype
    unmoved, noise_energy, tuned_energy, energy = 0, 0.0, 0.0, 0.0
    step = max(1, BLOCK // W.shape[1])
    for start in range(0, W.shape[0], step):
        W_rows, D_rows = W[start : start + step], D[start : start + step]
        power = _power_of_two(W_rows)
        spacing = _spacing(W_rows, power, coarse)
        unmoved += int(torch.count_nonzero(D_rows.abs() <= spacing))
        coarse_noise = _energy(spacing)
        fine_noise = coarse_noise if fine == coarse else _energy(_spacing(W_rows, power, fine))
        noise_energy += coarse_noise + fine_noise
        tuned_energy += coarse_noise if tuned_dtype == coarse else fine_noise
        energy += _energy(W_rows)
    both, tuned = (sqrt(noise / 12 / energy) if energy > 0 else 0.0 for noise in (noise_energy, tuned_energy))
    return Rounding(both, tuned, unmoved / D.numel())


def _power_of_two(W: Tensor) -> Tensor:
    """2^floor(log2 |w|), from the exponent bits alone; 0 for zeros and subnormals."""
    if W.dtype == torch.float64:
        return (W.contiguous().view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (W.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)


def _spacing(W: Tensor, power: Tensor, dtype: torch.dtype) -> Tensor:
    """ulp(w) in `dtype`: eps 2^floor(log2 |w|), not under that of its subnormals; 0 for w = 0, which is exact."""
    kind, own = torch.finfo(dtype), torch.finfo(W.dtype)
    if kind.tiny > own.tiny:
        power = torch.where(W == 0, 0.0, power.clamp(min=kind.tiny))
    return power * kind.eps


def _energy(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X, dtype=torch.float64)) ** 2

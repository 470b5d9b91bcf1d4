"""How much of an update is storage rounding: the noise that two storage dtypes leave in D = W' - W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

BLOCK = 1 << 16  # entries at a time: what is made of them stays in the processor's cache
FLOOR_FACTOR = 3.0  # an update under this many floors is mostly rounding


@dataclass(frozen=True)
class Rounding:
    """What storage does to a pair; () of one pair, (b,) of a stack.

    Attributes:
        floor: the expected norm of the rounding noise in D, relative to ||W||_F.
        tuned_floor: the same of the tuned side alone: what there is where training started from the stored base.
        unmoved_share: the share of entries with |D_ij| <= ulp(W_ij), in the coarser of the two dtypes.
    """

    floor: Array
    tuned_floor: Array
    unmoved_share: Array


def rounding(W: Tensor, D: Tensor, base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> Rounding:
    """The rounding floor of a pair, and how many of its entries moved beyond the spacing of their dtype.

    An entry w stored with spacing ulp(w) is off by a uniform error of variance ulp(w)^2 / 12; base and tuned add up.
    For Gaussian weights the floor is 1.7e-3 for one bfloat16 side, 2.1e-4 for float16, 2.5e-8 for float32.

    Args: W in any real floating dtype and D = W' - W in float32 or float64, both (m, n) or (b, m, n); the dtypes as
        stored. A zero W has floor 0.
    """
    coarse = base_dtype if torch.finfo(base_dtype).eps >= torch.finfo(tuned_dtype).eps else tuned_dtype
    fine = tuned_dtype if coarse == base_dtype else base_dtype
    m, n = W.shape[-2:]
    unmoved, noise_energy, tuned_energy, energy = torch.zeros(4, *W.shape[:-2], dtype=torch.float64, device=W.device)
    step = max(1, BLOCK // n)
    for start in range(0, m, step):
        D_rows = D[..., start : start + step, :]
        W_rows = W[..., start : start + step, :].to(D.dtype)
        power = _power_of_two(W_rows)
        spacing = _spacing(W_rows, power, coarse)
        unmoved += torch.count_nonzero(D_rows.abs() <= spacing, dim=(-2, -1))
        coarse_noise = _energy(spacing)
        fine_noise = coarse_noise if fine == coarse else _energy(_spacing(W_rows, power, fine))
        noise_energy += coarse_noise + fine_noise
        tuned_energy += coarse_noise if tuned_dtype == coarse else fine_noise
        energy += _energy(W_rows)
    both, tuned = (_relative(noise, energy) for noise in (noise_energy, tuned_energy))
    return Rounding(both, tuned, (unmoved / (m * n)).cpu().numpy()[()])


def _relative(noise: Tensor, energy: Tensor) -> Array:
    """sqrt(noise / 12 / energy), 0 where there is no energy."""
    floor: Array = torch.where(energy > 0, noise / 12 / energy, 0.0).sqrt().cpu().numpy()
    return floor[()]


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


def _energy(X: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), dtype=torch.float64)
    return norm.square()

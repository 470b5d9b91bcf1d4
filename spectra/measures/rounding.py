"""How much of an update is storage rounding: the noise that two storage dtypes leave in D = W' - W."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

FLOOR_FACTOR = 3.0  # an update under this many floors is mostly rounding


def rounding_floor(W: Tensor, base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> float:
    """The expected norm of the rounding noise in D, relative to ||W||_F.

    An entry w stored with spacing ulp(w) is off by a uniform error of variance ulp(w)^2 / 12; base and tuned add up.
    For Gaussian weights this is 1.7e-3 for one bfloat16 side, 2.1e-4 for float16, 2.5e-8 for float32.

    Args: W (m, n), the base's values in any floating dtype; the dtypes as stored.   Returns: a float, 0 for a zero W.
    """
    norm = float(torch.linalg.vector_norm(W, dtype=torch.float64))
    if norm == 0:
        return 0.0
    base = _noise_energy(W, base_dtype)
    tuned = base if tuned_dtype == base_dtype else _noise_energy(W, tuned_dtype)
    return sqrt(base + tuned) / norm


def unmoved_share(W: Tensor, D: Tensor, dtype: torch.dtype) -> float:
    """The share of entries with |D_ij| <= ulp(W_ij): those that did not move beyond the spacing of `dtype`."""
    return float((D.abs() <= _spacing(W, dtype).to(D.dtype)).double().mean())


def coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The dtype with the wider spacing of the two."""
    return one if torch.finfo(one).eps >= torch.finfo(other).eps else other


def _noise_energy(W: Tensor, dtype: torch.dtype) -> float:
    """sum_ij ulp(w_ij)^2 / 12."""
    return float(torch.linalg.vector_norm(_spacing(W, dtype), dtype=torch.float64)) ** 2 / 12


def _spacing(W: Tensor, dtype: torch.dtype) -> Tensor:
    """ulp(w) in `dtype`: eps 2^floor(log2 |w|), not under that of its subnormals; 0 for w = 0, which is exact."""
    format = torch.finfo(dtype)
    if W.dtype == torch.float64:
        power = torch.exp2(torch.floor(torch.log2(W.abs().clamp(min=torch.finfo(torch.float64).tiny))))
    else:
        power = (W.float().contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent bits alone
    if format.tiny > torch.finfo(torch.float32).tiny or W.dtype == torch.float64:
        power = torch.where(W == 0, 0.0, power.clamp(min=format.tiny))
    return power * format.eps

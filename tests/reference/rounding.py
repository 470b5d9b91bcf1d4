"""What storing two checkpoints does to their difference, by storing them."""

from __future__ import annotations

import numpy as np
import torch

from tests.reference.singular import Array


def storage_noise(W: Array, D: Array, base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> float:
    """||(stored W' - stored W) - D||_F / ||W||_F for a true base W and a true update D, both in float64."""
    measured = store(W + D, tuned_dtype) - store(W, base_dtype)
    return float(np.sqrt(np.sum((measured - D) ** 2) / np.sum(W**2)))


def store(values: Array, dtype: torch.dtype) -> Array:
    """Round to `dtype` and back."""
    stored: Array = torch.from_numpy(values).to(dtype).double().numpy()
    return stored

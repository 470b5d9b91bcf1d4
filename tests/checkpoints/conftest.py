"""What the tests of checkpoints share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def state() -> dict[str, Tensor]:
    """A small state dict with several dtypes, a vector, a scalar and a transposed matrix."""
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.0.weight": torch.randn(6, 4, generator=generator),
        "encoder.0.bias": torch.randn(6, generator=generator),
        "encoder.1.weight": torch.randn(5, 6, generator=generator).to(torch.bfloat16),
        "head.weight": torch.randn(3, 5, generator=generator).to(torch.float64).T,
        "scale": torch.tensor(2.5, dtype=torch.float16),
        "position_ids": torch.arange(7),
    }

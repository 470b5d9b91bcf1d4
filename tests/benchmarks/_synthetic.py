"""One weight, a dense fine-tuning of it and a LoRA update of it, from a seed, with the spectrum of a language model's.

The bulk is Gaussian noise with unequal rows and columns (a smeared Marchenko-Pastur law); 5 % of the directions are
heavy-tailed spikes above it. Both updates have 5 % of the weight's norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.linalg.lowrank import LowRank

SPIKES = 0.05  # share of the directions that stand out of the bulk
RELATIVE_UPDATE = 0.05
RANK = 16
ENTRY = 0.02  # typical size of an entry


@dataclass(frozen=True)
class Weights:
    """All float32, in C order, as a safetensors file gives them."""

    base: Tensor  # (m, n)
    tuned: Tensor  # (m, n), base plus a dense update
    adapter: LowRank  # B (m, RANK), A (RANK, n)


def weights(m: int, n: int, seed: int = 0) -> Weights:
    """The weights of shape (m, n); the same seed gives the same ones on the same torch."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = ENTRY * (0.3 * normal(m, 1)).exp() * normal(m, n) * (0.3 * normal(1, n)).exp()
    count = max(1, int(SPIKES * min(m, n)))
    edge = ENTRY * (m**0.5 + n**0.5)  # the upper edge of the bulk of equal rows and columns
    # Pareto with exponent 2: some stand far out; the limit keeps one draw from owning the norm.
    heights = edge * torch.rand(count, generator=generator).clamp(min=1e-3) ** -0.5
    left, right = (torch.linalg.qr(normal(size, count)).Q for size in (m, n))
    base += (left * heights) @ right.T
    norm = RELATIVE_UPDATE * torch.linalg.vector_norm(base)
    dense = normal(m, n)
    dense *= norm / torch.linalg.vector_norm(dense)
    B, A = normal(m, RANK), normal(RANK, n)
    scale = float(norm / torch.linalg.vector_norm(B @ A))
    return Weights(base, base + dense, LowRank(B, A, scale))

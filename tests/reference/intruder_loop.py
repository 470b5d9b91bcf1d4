"""The published count of intruder dimensions, as its plain loop: two SVDs a matrix, left vectors, every cosine."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def count_intruders(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], k: int = 10, epsilon: float = 0.5
) -> dict[str, int]:
    """How many of the top k left singular vectors of each tuned matrix stay under epsilon with all of the base's."""
    counts = {}
    for name, W in base.items():
        before = torch.linalg.svd(W.double(), full_matrices=False).U
        after = torch.linalg.svd(tuned[name].double(), full_matrices=False).U
        count = 0
        for j in range(min(k, after.shape[1])):
            similarity = torch.abs(before.T @ after[:, j])
            if similarity.max() < epsilon:
                count += 1
        counts[name] = count
    return counts

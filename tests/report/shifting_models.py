"""Small models whose features shift, and batches for them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

BLOCKS, WIDTH, CLASSES = 4, 24, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.relu(self.up_proj(torch.tanh(self.q_proj(x)))))


class Net(nn.Module):
    """Blocks with matrices of three roles, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.classifier(x)


def tuned_of(base: Net, size: float = 0.03, only: str = "") -> Net:
    """The base with noise on its parameters, or on those whose name holds `only`."""
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            step = size * torch.randn(parameter.shape, generator=generator)
            if only in name:
                parameter += step
    return tuned


def labelled_batches(count: int = 4, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, WIDTH, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator))
        for _ in range(count)
    ]

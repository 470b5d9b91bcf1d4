"""Small state dicts, and ways to change them."""

from __future__ import annotations

from collections.abc import Callable

import torch

Change = Callable[[str, torch.Tensor], torch.Tensor]
ROLES = ("attention.self.query", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
LAYERS = 4


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A small BERT-like state dict: square, tall and wide matrices, an embedding and a pooler."""
    generator = torch.Generator().manual_seed(seed)
    state = {"bert.embeddings.word_embeddings.weight": torch.randn(50, 24, generator=generator)}
    for layer in range(LAYERS):
        for role in ROLES:
            shape = (48, 24) if role == "intermediate.dense" else (24, 48) if role == "output.dense" else (24, 24)
            state[f"bert.encoder.layer.{layer}.{role}.weight"] = torch.randn(*shape, generator=generator)
    state["bert.pooler.dense.weight"] = torch.randn(24, 24, generator=generator)
    return state


def changed(base: dict[str, torch.Tensor], change: Change) -> dict[str, torch.Tensor]:
    """Every weight after `change(name, weight)`."""
    return {name: change(name, weight) for name, weight in base.items()}


def noise(size: float, seed: int = 1) -> Change:
    """Adds noise of about `size` times the weight."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _, weight: weight + size * torch.randn(weight.shape, generator=generator)

"""Write a base and a tuned checkpoint in the shape of ViT-B/16: 12 blocks of width 768, mlp 3072; 73 matrices, 346 MB
each.

Spectra follow a power law, as trained weights' do; the tuned one is the base plus a dense update of 5 % of each
weight's norm (`--rank 16`: of that rank).

    python tests/benchmarks/_vit_pair.py FOLDER [--rank 16] [--depth 12]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, MLP, CLASSES, RELATIVE_UPDATE = 768, 3072, 1000, 0.05


def shapes(depth: int) -> dict[str, tuple[int, int]]:
    """Tensor name -> (out, in), named as in transformers."""
    block = {
        "attention.attention.query.weight": (WIDTH, WIDTH),
        "attention.attention.key.weight": (WIDTH, WIDTH),
        "attention.attention.value.weight": (WIDTH, WIDTH),
        "attention.output.dense.weight": (WIDTH, WIDTH),
        "intermediate.dense.weight": (MLP, WIDTH),
        "output.dense.weight": (WIDTH, MLP),
    }
    named = {f"vit.encoder.layer.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    return {**named, "classifier.weight": (CLASSES, WIDTH)}


def weight(m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """U diag(6 (i + 1)^-0.6) V^T with random orthonormal U and V."""
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    return (U * (6.0 * torch.arange(1, k + 1) ** -0.6)) @ V.T


def update(m: int, n: int, rank: int | None, generator: torch.Generator) -> torch.Tensor:
    """A random direction of Frobenius norm 1."""
    if rank is None:
        D = torch.randn(m, n, generator=generator)
    else:
        D = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    return D / D.norm()


def write_pair(folder: Path, depth: int = 12, rank: int | None = None) -> tuple[Path, Path]:
    """Write `base.safetensors` and `tuned.safetensors`; returns their paths."""
    generator = torch.Generator().manual_seed(0)
    base = {name: weight(m, n, generator) for name, (m, n) in shapes(depth).items()}
    tuned = {name: W + RELATIVE_UPDATE * W.norm() * update(*W.shape, rank, generator) for name, W in base.items()}
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_file(tensors, path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rank", type=int)
    arguments = parser.parse_args()
    print(*write_pair(arguments.folder, arguments.depth, arguments.rank))

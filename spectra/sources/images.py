"""A folder of images, a sub-folder per class -> batches of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectra.checkpoints.wording import listed
from spectra.errors import SpectraError
from spectra.sources.batches import Batch, Batches
from spectra.sources.labels import class_numbers
from spectra.sources.libraries import first_line, library, quietly

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def image_batches(
    folder: str | PathLike[str],
    processor: Any,
    *,
    config: Any = None,
    batch_size: int = 16,
    limit: int | None = None,
) -> Batches:
    """Batches of the images below a folder, in the order of their paths.

    Args:
        folder: with images in it, or in one sub-folder per class.   processor: as `load_image_processor` gives it.
        config: of the model; where its classes are those of the sub-folders, batches have `labels` (N,) int64.
        batch_size: images a batch.   limit: so many images in all, spread evenly over the list of them.
    Returns: `Batches` with `pixel_values` (N, channels, height, width). Images are opened when their batch is made.
    Raises: SpectraError where there are no images; and, when its batch is made, for an image that cannot be read.
    """
    root = Path(folder)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise SpectraError("the batch size and the limit must be at least 1; give larger ones")
    files = image_files(root)
    if limit is not None and limit < len(files):
        files = [files[at * len(files) // limit] for at in range(limit)]  # the first ones would be of one class
    labels, notes = _labels(root, files, config)

    def collate(chosen: Sequence[int]) -> Batch:
        with quietly():
            pixels = processor(images=[_opened(files[at]) for at in chosen], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels} | ({} if labels is None else {"labels": labels[list(chosen)]})

    return Batches(collate, tuple(range(len(files))), batch_size, notes)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and in its sub-folders, by path. Raises: SpectraError where there are none."""
    if not folder.is_dir():
        raise SpectraError(f"{folder} is no folder; give one with images, or with a sub-folder of images per class")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise SpectraError(f"there are no images ({', '.join(ENDINGS)}) in {folder} or below; give a folder with some")
    return found


def _labels(root: Path, files: Sequence[Path], config: Any) -> tuple[Tensor | None, tuple[str, ...]]:
    """Class numbers by the names of the sub-folders; none, and why, where these are not the model's classes."""
    folders = sorted({file.relative_to(root).parts[0] for file in files if len(file.relative_to(root).parts) > 1})
    if config is None or not folders:
        return None, ()
    numbers = class_numbers(config)
    unnamed = all(name == f"LABEL_{number}" for name, number in numbers.items())
    notes: tuple[str, ...] = ()
    if unnamed and len(folders) == len(numbers):
        numbers = {name: at for at, name in enumerate(folders)}
        notes = (f"the model's classes have no names: the sub-folders of {root} were numbered in their order",)
    lone = [file for file in files if len(file.relative_to(root).parts) == 1]
    foreign = [name for name in folders if name not in numbers]
    if lone or foreign:
        why = f"{listed(foreign)} are no classes of the model" if foreign else f"{lone[0].name!r} lies in no class"
        return None, (f"no losses: {why} ({listed(numbers) or 'it has none'})",)
    return torch.tensor([numbers[file.relative_to(root).parts[0]] for file in files]), notes


def _opened(file: Path) -> Any:
    image_module = library("PIL.Image", "to read images")
    try:
        with image_module.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises what it likes
        raise SpectraError(f"{file} is no readable image: {first_line(error)}; replace it or take it away") from error

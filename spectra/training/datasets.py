"""Files of examples, as the settings name them, put together for a task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from spectra.errors import SpectraError
from spectra.report.wording import counted
from spectra.sources.batches import Batches
from spectra.sources.examples import text_batches
from spectra.sources.images import image_batches, image_files
from spectra.sources.tables import read_columns
from spectra.training.examples import Batch
from spectra.training.settings import DataSettings, RetainSettings
from spectra.training.tasks import IGNORED

MASKED_SHARE = 0.15


@dataclass(frozen=True)
class FileExamples:
    """Examples read from a file or folder, by their number in `batches.order`."""

    batches: Batches

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided in reading them, a sentence each."""
        return self.batches.notes

    def __len__(self) -> int:
        return self.batches.samples

    def batch(self, indices: Sequence[int]) -> Batch:
        """Tokens padded to the longest text of the batch, or pixels; and labels."""
        return self.batches.collate([self.batches.order[index] for index in indices])


@dataclass(frozen=True)
class MaskedTokens:
    """Texts with 15 % of their tokens masked, the same ones each time; labels are the tokens that were there."""

    examples: FileExamples
    tokenizer: Any

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided in reading them, a sentence each."""
        return self.examples.notes

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int]) -> Batch:
        """At least one token of every text is masked; special tokens never are."""
        batch = dict(self.examples.batch(indices))
        ids: torch.Tensor = batch["input_ids"]
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids)) | (batch["attention_mask"] == 0)
        chance = np.stack([np.random.default_rng(index).random(ids.shape[1]) for index in indices])
        drawn = torch.from_numpy(chance).masked_fill(special, 2.0)
        masked = ((drawn < MASKED_SHARE) | (drawn == drawn.amin(1, keepdim=True))) & ~special
        labels = torch.where(masked, ids, IGNORED)
        return {**batch, "input_ids": ids.masked_fill(masked, self.tokenizer.mask_token_id), "labels": labels}


def classes_of_column(train: str, test: str | None, data: DataSettings) -> tuple[str, ...]:
    """The names of the classes in a column of labels: sorted, or "0", "1", ... where they are numbered from 0.

    Raises `SpectraError` that names the file and row of a label that names no class, and of a label of the test that no
    training example has.
    """
    found = {label for _, label in _labels(train, data)}
    for row, label in _labels(test, data) if test is not None else ():
        if label not in found:
            raise SpectraError(
                f"row {row} of {test} has the label {label!r}, which no row of {train} has, so that it cannot be "
                "learnt; mend that row, or add examples of it"
            )
    names = sorted(name for name in found if isinstance(name, str))
    numbers = sorted(number for number in found if isinstance(number, int))
    if names and numbers:
        raise SpectraError(
            f"the column {data.label_column!r} holds names ({names[0]!r}) and numbers ({numbers[0]}); use one of them"
        )
    if numbers and (numbers[0] < 0 or numbers[-1] > 10 * len(numbers)):
        raise SpectraError(
            f"the column {data.label_column!r} holds numbers from {numbers[0]} to {numbers[-1]}, which number no "
            "classes from 0; number them 0, 1, 2, ..., or give them names"
        )
    return tuple(names) if names else tuple(str(number) for number in range(numbers[-1] + 1))


def _labels(file: str, data: DataSettings) -> list[tuple[int, str | int]]:
    """Row, counted from 1, and label of every row."""
    labels: list[tuple[int, str | int]] = []
    values = read_columns(file, [data.label_column], limit=data.limit)[data.label_column]
    for row, value in enumerate(values, 1):
        number = int(value) if isinstance(value, bool | int | float) and float(value).is_integer() else None
        if number is None and not isinstance(value, str):
            raise SpectraError(
                f"row {row} of {file} has {value!r} in the column {data.label_column!r}, which names no class; "
                "mend that row"
            )
        labels.append((row, value if number is None else number))
    return labels


def classes_of_folder(folder: str) -> tuple[str, ...]:
    """The names of the subfolders that hold images."""
    root = Path(folder)
    parts = [file.relative_to(root).parts for file in image_files(root)]
    names = sorted({part[0] for part in parts if len(part) > 1})
    if not names:
        raise SpectraError(f"{folder} has no subfolder of images for each class; sort the images into some")
    return tuple(names)


def config_of_classes(classes: Sequence[str]) -> Any:
    """What `spectra.sources` asks of a model's configuration to number labels."""
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(classes)}
    return SimpleNamespace(num_labels=max(len(classes), 2), label2id=numbers, problem_type=None)


def read_texts(file: str, data: DataSettings | RetainSettings, tokenizer: Any, config: Any = None) -> Batches:
    """Tokenised texts; with `config` (of the model, or of classes) also their labels."""
    return text_batches(
        file,
        tokenizer,
        text_column=data.text_column,
        label_column=data.label_column if config is not None else None,
        config=config,
        task="classification" if config is not None else None,
        max_length=data.max_length,
        limit=data.limit,
    )


def read_images(folder: str, data: DataSettings | RetainSettings, processor: Any, config: Any) -> Batches:
    """Images and their classes. Raises `SpectraError` where the subfolders are not the model's classes."""
    batches = image_batches(folder, processor, config=config, limit=data.limit)
    if "labels" not in batches.collate(batches.order[:1]):
        raise SpectraError(f"the images in {folder} have no labels: {'; '.join(batches.notes) or 'no subfolders'}")
    return batches


def fingerprint_of(source: str) -> str:
    """SHA-256 of a file; of a folder of images, of their paths and sizes, for reading them all would take long."""
    path = Path(source)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for image in image_files(path):
        digest.update(f"{image.relative_to(path)}\0{image.stat().st_size}\0".encode())
    return digest.hexdigest()


def parted(batches: Batches, holdout: float, seed: int, source: str) -> tuple[Batches, Batches]:
    """The examples in two parts, the second with a share of `holdout`, drawn with the seed; both keep their order."""
    kept = round(holdout * batches.samples)
    if not 0 < kept < batches.samples:
        raise SpectraError(
            f"{source} has {counted(batches.samples, 'example')}, of which data.holdout = {holdout:g} leaves none for "
            "training or for the test; give data.test"
        )
    chosen = set(np.random.default_rng((seed, 1)).permutation(batches.samples)[:kept].tolist())
    first = tuple(row for place, row in enumerate(batches.order) if place not in chosen)
    second = tuple(row for place, row in enumerate(batches.order) if place in chosen)
    return replace(batches, order=first), replace(batches, order=second)

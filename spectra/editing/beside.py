"""The files of a model folder beside the model's own: what an edit copies with it, and what it must leave out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from spectra.checkpoints.foreign import HEAD_BYTES, foreign_file
from spectra.checkpoints.huggingface_folder import INDEX, NOT_WEIGHTS, WEIGHT_ENDINGS, is_usual_name
from spectra.checkpoints.weights_file import SHARD, open_weights_file
from spectra.checkpoints.wording import listed
from spectra.errors import SpectraError

OTHER_FORMATS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf", ".tflite", ".pb")

Described = set[tuple[str, tuple[int, ...]]]
"""Tensors by name and shape."""


def files_beside(root: Path, files: Sequence[Path], weights: Sequence[Path]) -> tuple[list[Path], tuple[str, ...]]:
    """The other files of a model folder that an edit copies, relative to `root`; and in words what it leaves out, or
    copies although it looks like weights.

    Left out is what holds the same model again and would not follow the edit: in another format, or a subfolder with
    another of its checkpoints. Subfolders with weights of their own (the dense layer of a sentence encoder) are copied.

    Args: files: those of the model.   weights: those of them that hold tensors.
    """
    model, known = _Model(root, weights), set(files)
    found: list[Path] = []
    same: list[str] = []
    skipped: list[str] = []
    broken: list[str] = []
    weights_of_others: list[str] = []
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        own = [name for name in sorted(names) if here / name not in known]
        again = [name for name in own if model.is_in(here / name)]
        if again and here != Path():
            same.append(str(here))
            folders.clear()
            continue
        hidden = [name for name in folders if name.startswith(".") or Path(folder, name).is_symlink()]
        skipped += [str(here / name) for name in sorted(hidden)]
        folders[:] = sorted(set(folders) - set(hidden))
        same += again
        broken += [str(here / name) for name in own if not Path(folder, name).is_file()]
        copied = [here / name for name in own if name not in again and Path(folder, name).is_file()]
        weights_of_others += [str(path) for path in copied if _is_named_like_weights(path.name)]
        found += copied
    return found, (
        *_said(weights_of_others, "copied as they are, for they hold nothing of the edited model"),
        *_said(same, "not copied, for their weights are not edited"),
        *_said(skipped, "not copied, for they are hidden folders or links to folders"),
        *_said(broken, "not copied, for they are links to files that are not there"),
    )


def _said(names: Sequence[str], what: str) -> Iterable[str]:
    return (f"{what}: {listed(names)}",) if names else ()


def _is_named_like_weights(name: str) -> bool:
    return name.endswith(WEIGHT_ENDINGS) and not NOT_WEIGHTS.fullmatch(name)


class _Model:
    """The tensors of the edited model, by which files that hold it again are known."""

    def __init__(self, root: Path, weights: Sequence[Path]) -> None:
        self.root, self.weights = root, weights
        self._tensors: Described | None = None

    def is_in(self, path: Path) -> bool:
        """Whether a file (relative to the root) holds the model again, or weights that cannot be read to tell."""
        name, file = path.name, self.root / path
        is_beside = path.parent == Path()
        if name.lower().endswith(OTHER_FORMATS) or (is_beside and INDEX.fullmatch(name)):
            return True
        if not _is_named_like_weights(name) or not file.is_file():
            return False
        if is_beside and (is_usual_name(name) or SHARD.fullmatch(name)):
            return True
        try:
            tensors = _described(file)
        except SpectraError:
            return _may_be_weights(file)
        return 2 * len(tensors & self._own()) >= len(tensors)

    def _own(self) -> Described:
        if self._tensors is None:
            self._tensors = set().union(*(_described(self.root / path) for path in self.weights))
        return self._tensors


def _described(file: Path) -> Described:
    return {(name, info.shape) for name, info in open_weights_file(file).tensors.items()}


def _may_be_weights(file: Path) -> bool:
    """Of a file that is not read as weights: whether it is likely to hold some. A `.bin` may be anything."""
    if file.suffix != ".bin" or file.with_suffix(".xml").exists():  # a torch file; an OpenVINO model
        return True
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    return head.startswith(b"PK") or foreign_file(file, head) is not None

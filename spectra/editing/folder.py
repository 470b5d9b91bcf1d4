"""The folder that an edited checkpoint is written into: its files, checked before the work, and put there at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spectra.atomic import replacing_folder
from spectra.checkpoints import Checkpoint
from spectra.checkpoints.huggingface_folder import INDEX, NOT_WEIGHTS, WEIGHT_ENDINGS
from spectra.checkpoints.wording import listed, shown
from spectra.errors import SpectraError

RECORD = "spectra_edit.json"  # what was done, beside what came of it
OTHER_FORMATS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf", ".tflite", ".pb")


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint, relative to `root`.

    Attributes:
        weights: those that hold tensors.   others: copied as they are.
        notes: what is left out, for it holds weights that would not follow the edit.
    """

    root: Path
    weights: tuple[Path, ...]
    others: tuple[Path, ...]
    notes: tuple[str, ...]


def layout_of(checkpoint: Checkpoint, without: Sequence[str] = ()) -> Layout:
    """What is to be written for an edit of `checkpoint`; all of its folder where that was given, not only its files.

    Args: without: names of files that an edit makes wrong.
    Raises: SpectraError where it has no files.
    """
    if not checkpoint.files:
        raise SpectraError(
            f"{checkpoint.source} has no files whose format an edit could be written in; "
            "leave the folder out and take the tensors from the result, or save the model first"
        )
    given = Path(checkpoint.source).expanduser()
    is_folder = given.is_dir()
    root = given if is_folder else Path(os.path.commonpath([path.parent for path in checkpoint.files]))
    files = [path.relative_to(root) for path in checkpoint.files]
    weights = tuple(path for path in files if path.suffix != ".json")
    others = [path for path in files if path.suffix == ".json"]
    left: list[str] = []
    if is_folder:
        beside, left = _beside(root, set(files), set(without))
        others += beside
    notes = (f"not copied, for their weights are not edited: {listed(left)}",) if left else ()
    return Layout(root, weights, tuple(others), notes)


def _beside(root: Path, known: set[Path], without: set[str]) -> tuple[list[Path], list[str]]:
    """The other files of a model folder, and the names of what holds weights of its own."""
    found: list[Path] = []
    left: list[str] = []
    for folder, folders, names in os.walk(root):
        here = Path(folder).relative_to(root)
        own = [name for name in names if here / name not in known]
        weights = [name for name in own if _is_weights(name)]
        if weights and folder != str(root):
            left.append(str(here))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left += weights
        found += [here / name for name in sorted(own) if name not in weights and name not in without]
    return found, left


def _is_weights(name: str) -> bool:
    if INDEX.fullmatch(name) or name.lower().endswith(OTHER_FORMATS):
        return True
    return name.endswith(WEIGHT_ENDINGS) and not NOT_WEIGHTS.fullmatch(name)


def check_target(target: Path, layout: Layout, inputs: Sequence[Checkpoint], force: bool) -> None:
    """Raise `SpectraError` where the edit must not or cannot be put into `target`; makes its parents.

    With `force` the folder of an earlier edit is replaced, and never one that holds anything else, or an input.
    """
    place = target.resolve()
    for checkpoint in inputs:
        for path in checkpoint.files:
            if place in (path.parent.resolve(), *path.resolve().parents):
                raise SpectraError(
                    f"{target} holds {shown(path.name)} of {checkpoint.source}, which would be lost; "
                    "choose another folder"
                )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}."):
            there = [path.relative_to(target) for path in target.rglob("*") if not path.is_dir()]
        if target.exists() and not target.is_dir():
            raise SpectraError(f"{target} is a file; give the name of a folder to write")
    except OSError as error:
        raise SpectraError(f"cannot write to {target}: {error.strerror or error}; choose another folder") from error
    ours = {*layout.weights, *layout.others, Path(RECORD)}
    foreign = sorted(str(path) for path in there if path not in ours)
    if foreign and (force or not there):
        raise SpectraError(f"{target} holds {foreign[0]!r}, which this edit would not write; choose another folder")
    if there and not force:
        raise SpectraError(f"{target} holds files already; choose another folder, or force their replacement")


def copy_files(layout: Layout, folder: Path) -> None:
    """Copy every file of a layout, bytes and times, links as what they point at."""
    for path in (*layout.weights, *layout.others):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(layout.root / path, folder / path)


@contextmanager
def put_in_place(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that becomes it when the block ends well, and vanishes otherwise.

    Raises: SpectraError for what the operating system refuses (a full disk).
    """
    try:
        with replacing_folder(folder) as made:
            yield made
    except OSError as error:
        raise SpectraError(
            f"cannot write the edited checkpoint to {folder}: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from error

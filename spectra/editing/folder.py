"""The folder that an edited checkpoint is written into: its files, checked before the work, and put there at once."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from spectra.atomic import actual, replacing_folder
from spectra.checkpoints import Checkpoint
from spectra.checkpoints.wording import listed, shown
from spectra.editing.beside import files_beside
from spectra.editing.record import RECORD, files_of_record
from spectra.errors import SpectraError


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint, relative to `root`.

    Attributes:
        weights: those that hold tensors.   others: copied as they are.
        notes: what is left out, and why.
    """

    root: Path
    weights: tuple[Path, ...]
    others: tuple[Path, ...]
    notes: tuple[str, ...]


def layout_of(checkpoint: Checkpoint) -> Layout:
    """What is to be written for an edit of `checkpoint`; all of its folder where that was given, not only its files.

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
    notes: tuple[str, ...] = ()
    if is_folder:
        beside, notes = files_beside(root, files, weights)
        others += beside
    return Layout(root, weights, tuple(others), notes)


def check_target(target: Path, layout: Layout, inputs: Sequence[Checkpoint], force: bool) -> None:
    """Raise `SpectraError` where the edit must not or cannot be put into `target`.

    With `force` the folder of an earlier edit is replaced, whatever files its record lists, and never one that holds
    anything else, or an input. Nothing is written into the folder of an input either.
    """
    place = actual(target)
    for checkpoint in inputs:
        given = Path(checkpoint.source).expanduser()
        if given.is_dir() and actual(given) in place.parents:
            raise SpectraError(
                f"{target} lies inside {checkpoint.source}, which would hold more than its model; "
                "choose a folder outside of it"
            )
        for path in checkpoint.files:
            if place in (path.parent.resolve(), *path.resolve().parents):
                raise SpectraError(
                    f"{target} holds {shown(path.name)} of {checkpoint.source}, which would be lost; "
                    "choose another folder"
                )
    try:
        standing = next(parent for parent in place.parents if parent.exists())
        with tempfile.TemporaryDirectory(dir=standing, prefix=f".{place.name}."):
            there = [path.relative_to(place) for path in place.rglob("*") if not path.is_dir()]
        if place.exists() and not place.is_dir():
            raise SpectraError(f"{target} is a file; give the name of a folder to write")
    except OSError as error:
        raise SpectraError(f"cannot write to {target}: {error.strerror or error}; choose another folder") from error
    if there and not force:
        raise SpectraError(f"{target} holds files already; choose another folder, or force their replacement")
    if there and Path(RECORD) not in there:
        raise SpectraError(f"{target} holds {str(min(there))!r}, which no edit left there; choose another folder")
    ours = {*layout.weights, *layout.others, Path(RECORD), *files_of_record(target)}
    if foreign := sorted(str(path) for path in there if path not in ours):
        raise SpectraError(f"{target} holds {foreign[0]!r}, which no edit wrote; choose another folder")


def leftovers(target: Path) -> tuple[str, ...]:
    """What to say of unfinished folders beside a target: nothing tells those of killed runs from those of others."""
    place = actual(target)
    unfinished = re.compile(rf"\.{re.escape(place.name)}\.[a-z0-9_]{{8}}(\.old)?")  # as `replacing_folder` names them
    beside = place.parent.iterdir() if place.parent.is_dir() else ()
    found = sorted(path.name for path in beside if unfinished.fullmatch(path.name) and path.is_dir())
    return (
        (f"left beside it by runs that were killed, unless they still write there: {listed(found)}",) if found else ()
    )


def copy_files(layout: Layout, folder: Path) -> None:
    """Copy the bytes of every file of a layout, links as what they point at."""
    for path in (*layout.weights, *layout.others):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(layout.root / path, folder / path)


@contextmanager
def put_in_place(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that becomes it when the block ends well, and vanishes otherwise.

    So do those of its parents that had to be made.
    Raises: SpectraError for what the operating system refuses (a full disk).
    """
    try:
        with _with_parents(actual(folder)), replacing_folder(folder) as made:
            yield made
    except OSError as error:
        raise SpectraError(
            f"cannot write the edited checkpoint to {folder}: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from error


@contextmanager
def _with_parents(place: Path) -> Iterator[None]:
    missing = [parent for parent in place.parents if not parent.exists()]  # the deepest first
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # where another run has put something by now
                parent.rmdir()
        raise

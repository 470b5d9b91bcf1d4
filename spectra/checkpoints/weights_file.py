"""One file of weights: which format it is, by its content."""

from __future__ import annotations

import re
from pathlib import Path

from spectra.checkpoints.checkpoint import Checkpoint, CheckpointError
from spectra.checkpoints.foreign import HEAD_BYTES, foreign_file, foreign_folder
from spectra.checkpoints.safetensors_file import open_safetensors_file
from spectra.checkpoints.stored_file import StoredFile
from spectra.checkpoints.torch_file import open_torch_file
from spectra.checkpoints.torch_legacy import MAGIC as LEGACY_MAGIC
from spectra.checkpoints.wording import shown

SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)*\.(safetensors|bin|pt|pth)")


def open_weights_file(path: Path) -> Checkpoint:
    """Open a single file, whatever its ending, as what its first bytes say it is.

    Raises `CheckpointError` where it is empty, of a foreign format (which is named), or of none that is known.
    """
    file = StoredFile.at(path)
    if file.size == 0:
        raise CheckpointError(f"{shown(path)} is empty (0 bytes); download it again")
    head = file.read(0, HEAD_BYTES)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        _refuse_foreign(path, b"")
        return open_torch_file(path)
    if head.startswith(LEGACY_MAGIC):
        return open_torch_file(path)
    if _begins_like_safetensors(head):
        return open_safetensors_file(path)
    if not head.strip(b"\0"):
        raise CheckpointError(f"{shown(path)} begins with zeros only: an unfinished download; download it again")
    _refuse_foreign(path, head)
    if path.suffix == ".safetensors":
        return open_safetensors_file(path)
    raise CheckpointError(
        f"{shown(path)} is in no format that is known here; give a .safetensors file, a torch file, or a model folder"
    )


def _begins_like_safetensors(head: bytes) -> bool:
    # A header of eight bytes of length, then JSON. Lengths of real headers leave the upper bytes zero.
    return head[8:9] == b"{" and head[5:8] == b"\0\0\0"


def _refuse_foreign(path: Path, head: bytes) -> None:
    foreign = foreign_file(path, head)
    if foreign:
        raise CheckpointError(f"{shown(path)} is {foreign}")
    if re.fullmatch(r"consolidated\.\d+\.pth", path.name):
        slices = foreign_folder(entry.name for entry in path.parent.iterdir())
        if slices:
            raise CheckpointError(f"{shown(path)} is one of {slices}")

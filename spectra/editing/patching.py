"""Edited tensors written over their own bytes in a copy of the files, so that every other byte is the original's."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from spectra.checkpoints import Checkpoint
from spectra.checkpoints.stored_file import StoredTensor
from spectra.checkpoints.weights_file import open_weights_file
from spectra.checkpoints.wording import quoted
from spectra.editing.placing import put
from spectra.editing.torch_archive import mend_checksums
from spectra.errors import SpectraError
from spectra.matrices import Matrix


class Store(Protocol):
    """Where edited tensors go."""

    def write(self, name: str, matrix: Matrix | None, W: Tensor) -> None:
        """Put W (m x n, of the tensor's dtype) in the place of a matrix in tensor `name`; None: W is the tensor."""


class InMemory:
    """Edited tensors by name, in their stored shapes; the others are not copied."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors: dict[str, Tensor] = {}

    def write(self, name: str, matrix: Matrix | None, W: Tensor) -> None:
        if name not in self.tensors:
            self.tensors[name] = self.checkpoint[name].clone()
        if matrix is None:
            self.tensors[name].copy_(W)
        else:
            put(matrix, self.tensors[name][matrix.place], W)


class InFiles:
    """A copy in `folder` of a checkpoint's files below `root`, in which tensors are overwritten."""

    def __init__(self, checkpoint: Checkpoint, root: Path, folder: Path) -> None:
        self.checkpoint, self.root, self.folder = checkpoint, root, folder
        self._written: dict[str, list[tuple[Matrix | None, str]]] = defaultdict(list)
        self._records: dict[Path, set[int]] = defaultdict(set)

    def write(self, name: str, matrix: Matrix | None, W: Tensor) -> None:
        stored = lying_at(self.checkpoint, name)
        part = stored.part(() if matrix is None else matrix.place)
        path = self.folder / stored.file.path.relative_to(self.root)
        flat = torch.empty(part.extent, dtype=torch.uint8)
        with path.open("r+b") as file:
            file.seek(part.start)
            file.readinto(flat.numpy().data)
            assert part.stride is not None  # a part has strides
            view = flat.view(part.dtype).as_strided(part.shape, part.stride)
            if matrix is None:
                view.copy_(W)
            else:
                put(matrix, view, W)
            file.seek(part.start)
            file.write(flat.numpy().data)
        if stored.record is not None:
            self._records[path].add(stored.record.start)
        self._written[name].append((matrix, _digest(W)))

    def finish(self) -> None:
        """Bring the checksums of what was overwritten up to date."""
        for path, starts in self._records.items():
            mend_checksums(path, starts)

    def check(self) -> None:
        """Read everything back. Raises SpectraError unless what was written is there, and all else as it was."""
        files: dict[Path, Checkpoint] = {}
        for name in self.checkpoint:
            stored = lying_at(self.checkpoint, name)
            path = self.folder / stored.file.path.relative_to(self.root)
            if path not in files:
                files[path] = open_weights_file(path)
            before, after = self.checkpoint[name], files[path][stored.name]
            for matrix, digest in self._written.get(name, ()):
                found = after if matrix is None else matrix.extract(after)
                if _digest(found) != digest:
                    raise _differs(name)
                if matrix is None:
                    before = after
                else:
                    before = before.clone()
                    put(matrix, before[matrix.place], found)
            if before.shape != after.shape or before.dtype != after.dtype or _digest(before) != _digest(after):
                raise _differs(name)


def lying_at(checkpoint: Checkpoint, name: str) -> StoredTensor:
    """Where the bytes of a tensor lie: its loader is a method of what knows that."""
    owner = getattr(checkpoint.entry(name).load, "__self__", None)
    if not isinstance(owner, StoredTensor):
        raise SpectraError(f"tensor {quoted(name)} of {checkpoint.source} lies in no file that could be copied")
    return owner


def _digest(tensor: Tensor) -> str:
    """What identifies the bits of a tensor's elements."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
    return hashlib.sha256(content).hexdigest()


def _differs(name: str) -> SpectraError:
    return SpectraError(f"tensor {quoted(name)} read back otherwise than it was written; check the disk")

"""A torch file (`.pt`, `.pth`, `.bin`, `.ckpt`): the zip container, or the format before torch 1.6."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from spectra.checkpoints.checkpoint import Checkpoint, CheckpointError, Entry, TensorInfo
from spectra.checkpoints.containers import find_state_dict
from spectra.checkpoints.safe_pickle import StorageClaim, Unpickled, require_safe_torch, unpickle
from spectra.checkpoints.stored_file import Record, StoredFile, StoredTensor, elements_spanned
from spectra.checkpoints.torch_legacy import read_legacy
from spectra.checkpoints.torch_zip import read_archive
from spectra.checkpoints.wording import quoted, shown

ZIP_MAGIC = b"PK"


def open_torch_file(path: Path) -> Checkpoint:
    """Describe the tensors of a torch file, in whichever nested dict they are; each is read when it is asked for.

    Nothing of the file is run: its pickle may hold tensors and plain values only. Storages tagged with a device are
    read to the CPU. Raises `CheckpointError` for code or objects, damaged files, and tensors larger than their data;
    loading a tensor raises it where the bytes do not fit the checksum that a zip file keeps of them.
    """
    file = StoredFile.at(path)
    where = shown(path)
    require_safe_torch(where)
    find_start: Callable[[StorageClaim], int]
    records: Mapping[str, Record] = {}
    if file.read(0, len(ZIP_MAGIC)) == ZIP_MAGIC:
        archive = read_archive(file)
        unpickled = unpickle(BytesIO(archive.pickle), where, file.size)
        find_start, records = archive.start, archive.storages
    else:
        legacy = read_legacy(file)
        unpickled = legacy.unpickled
        find_start = legacy.start
    state, notes = find_state_dict(unpickled.content, where)
    entries, tied, refused = _described(file, state, unpickled, find_start, records)
    return Checkpoint(where, entries, files=(path,), tied=tied, refused=refused, notes=notes)


def _described(
    file: StoredFile,
    state: Mapping[str, Tensor],
    unpickled: Unpickled,
    find_start: Callable[[StorageClaim], int],
    records: Mapping[str, Record],
) -> tuple[dict[str, Entry], dict[str, str], dict[str, str]]:
    """Entries, tied names and refused names of a state dict whose tensors are on the meta device."""
    entries: dict[str, Entry] = {}
    tied: dict[str, str] = {}
    refused: dict[str, str] = {}
    first_names: dict[tuple[object, ...], str] = {}
    for name, value in state.items():
        # A plain tensor: the file may have hung attributes of its own on this one, over the names of methods.
        tensor = Tensor.detach(value)
        claim = unpickled.claim(tensor) if tensor.layout == torch.strided else None
        if claim is None:
            refused[name] = "a tensor without data in the file (meta device): save the weights after loading them"
            continue
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        first = int(tensor.storage_offset()) * tensor.itemsize
        extent = elements_spanned(shape, stride) * tensor.itemsize
        if first + extent > claim.bytes:
            raise CheckpointError(
                f"tensor {quoted(name)} of {shown(file.path)} claims {first + extent} bytes "
                f"of a storage of {claim.bytes}; download it again"
            )
        start = find_start(claim) + first
        # `expand` makes terabytes out of four bytes. No honest tensor is larger than its file.
        if tensor.numel() * tensor.itemsize > file.size:
            refused[name] = (
                f"a view that repeats {extent} bytes into {tensor.numel()} elements: save it before expand()"
            )
            continue
        if tensor.is_conj() or tensor.is_neg():
            refused[name] = "a lazily conjugated or negated view: save it after resolve_conj().resolve_neg()"
            continue
        identity = (claim.key, start, tensor.dtype, shape, stride)
        if extent and first_names.setdefault(identity, name) != name:
            tied[name] = first_names[identity]
            continue
        rows = None if tensor.is_contiguous() else stride
        stored = StoredTensor(file, name, start, extent, tensor.dtype, shape, rows, records.get(claim.key))
        entries[name] = Entry(TensorInfo(name, shape, tensor.dtype), stored.load, stored.load_part)
    return entries, tied, refused

"""A `.safetensors` file: the header, parsed strictly so that each refusal names the tensor and the reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from spectra.checkpoints.checkpoint import Checkpoint, CheckpointError, Entry, TensorInfo
from spectra.checkpoints.stored_file import StoredFile, StoredTensor
from spectra.checkpoints.wording import quoted, shown

# The format allows 100 MB; a million empty tensors fit into 58 MB and cost a gigabyte once parsed. The largest real
# headers (mixtures of experts in one file) stay under 20 MB.
MOST_HEADER_BYTES = 32 << 20
MOST_TENSORS = 200_000

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# Narrower than a byte: torch has no such element, so they are listed as refused and not as weights.
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
BITS = {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} | PACKED_BITS


def open_safetensors_file(path: Path) -> Checkpoint:
    """Read the header of a `.safetensors` file; each tensor is read on its own when it is asked for.

    Raises `CheckpointError` for a truncated file, a header that is too large or not valid, and tensors that overlap,
    leave holes, lie past the end or whose shape and size disagree.
    Source: the format's own description (8 bytes of length, a JSON header, the tensors' bytes).
    """
    file = StoredFile.at(path)
    header, data_start = _header(file)
    entries: dict[str, Entry] = {}
    refused: dict[str, str] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, described in header.items():
        dtype, shape, start, stop = _described(path, name, described)
        ranges.append((start, stop, name))
        if dtype in PACKED_BITS:
            refused[name] = (
                f"packed {dtype} elements of {PACKED_BITS[dtype]} bits: dequantise to bfloat16 and save again"
            )
            continue
        stored = StoredTensor(file, name, data_start + start, stop - start, DTYPES[dtype], shape)
        entries[name] = Entry(TensorInfo(name, shape, DTYPES[dtype]), stored.load, stored.load_part)
    _check_ranges(path, ranges, file.size - data_start)
    return Checkpoint(shown(path), entries, files=(path,), refused=refused)


def _header(file: StoredFile) -> tuple[dict[str, Any], int]:
    """The tensors of the header by name, and the position of the first data byte."""
    where = shown(file.path)
    if file.size < 8:
        raise CheckpointError(f"{where} is truncated: {file.size} bytes are no safetensors file; download it again")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.size - 8:
        raise CheckpointError(
            f"{where} is truncated or no safetensors file: its header should take {length} bytes, "
            f"{file.size - 8} are there; download it again"
        )
    if length > MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{where} has a header of {length} bytes, and more than {MOST_HEADER_BYTES} are not read; "
            "split the file into shards"
        )
    try:
        header = json.loads(
            file.read(8, length).decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{where} has a damaged header ({reason}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where} has a damaged header (no JSON object); download it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where} has a damaged header (`__metadata__` is no map of texts); save it again")
    if len(header) > MOST_TENSORS:
        raise CheckpointError(
            f"{where} lists {len(header)} tensors, and more than {MOST_TENSORS} are not read; "
            "split the file into shards"
        )
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {quoted(twice)} appears twice")
    # Lone surrogates are valid to Python's parser, but are no text that could be printed or stored.
    "".join(unique).encode("utf-8")
    return unique


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _described(path: Path, name: str, described: Any) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's dtype, shape and byte range, checked against each other."""

    def damaged(reason: str) -> CheckpointError:
        return CheckpointError(f"tensor {quoted(name)} of {shown(path)} {reason}; download or save it again")

    if not isinstance(described, Mapping) or not {"dtype", "shape", "data_offsets"} <= described.keys():
        raise damaged("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(f"has the unknown dtype {quoted(dtype)}")
    if not _are_sizes(shape):
        raise damaged(f"has the impossible shape {quoted(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise damaged(f"has the impossible data_offsets {quoted(offsets)}")
    start, stop = offsets
    bits = BITS[dtype]
    if prod(size for size in shape if size) * bits >= 1 << 63:
        raise damaged(f"has the impossible shape {quoted(shape)}")
    if prod(shape) * bits != (stop - start) * 8:
        raise damaged(f"has shape {quoted(shape)} and dtype {dtype}, which do not fill its {stop - start} bytes")
    return dtype, tuple(shape), start, stop


def _are_sizes(values: Any) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_ranges(path: Path, ranges: list[tuple[int, int, str]], data_bytes: int) -> None:
    """The tensors must cover the data section once: no overlap, no hole, nothing past the end, nothing left over."""
    end = 0
    for start, stop, name in sorted(ranges):
        if start == end and stop <= data_bytes:
            end = stop
            continue
        where = f"tensor {quoted(name)} of {shown(path)}"
        if stop > data_bytes:
            raise CheckpointError(
                f"{where} ends at byte {stop} of the data, and the file holds {data_bytes}: it is truncated; "
                "download it again"
            )
        fault = "overlaps the tensor before it" if start < end else "leaves a hole before it"
        raise CheckpointError(f"{where} {fault} (bytes {start} to {end}); save the file again")
    if end != data_bytes:
        raise CheckpointError(f"{shown(path)} has {data_bytes - end} bytes after its last tensor; download it again")

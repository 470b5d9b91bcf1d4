"""Positioned reads from a file that was described before: no memory map, no handle kept open."""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from spectra.checkpoints.checkpoint import CheckpointError, Index
from spectra.checkpoints.wording import quoted, shown

# read(2) on Linux moves at most 0x7ffff000 bytes a call; anything below it will do.
LARGEST_READ = 1 << 30
CHECKED_AT_ONCE = 1 << 22
# A row out of an embedding must not cost the reading of the whole table.
MOST_READ_FOR_CHECK = 4
_CHECKING = Lock()  # one for all records: a lock in each could not be sent to another process


@dataclass(frozen=True)
class StoredFile:
    """A regular file as it was when its header was read.

    Every read opens the file anew, so that any thread may read at once, and refuses a file that has changed since.
    """

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def at(cls, path: Path) -> StoredFile:
        """Look at a file without reading it. Raises `CheckpointError` where it is missing, forbidden or no file."""
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(
                    f"{shown(path)} is not a regular file; give the path of a checkpoint file or folder"
                )
            path.open("rb").close()
        except (OSError, ValueError) as error:
            raise cannot_read(path, error) from error
        return cls(path, status.st_size, status.st_mtime_ns)

    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length); fewer only where the file ends before."""
        length = max(0, min(length, self.size - start))
        buffer = bytearray(length)
        self.fill(memoryview(buffer), start)
        return bytes(buffer)

    def fill(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` from byte `start` on. Raises `CheckpointError` where the file has changed or ends before."""
        try:
            with self.path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns):
                    raise CheckpointError(
                        f"{shown(self.path)} has changed since it was opened; "
                        "wait until it is written, then start again"
                    )
                file.seek(start)
                filled = 0
                while filled < len(buffer):
                    count = file.readinto(buffer[filled : filled + LARGEST_READ])
                    if not count:
                        raise CheckpointError(f"{shown(self.path)} ends early; copy or download it again")
                    filled += count
        except OSError as error:
            raise cannot_read(self.path, error) from error


@dataclass
class Record:
    """`size` bytes from `start` on whose CRC-32 the writer left; `crc` is 0 where it left none.

    `is_sound` is set once the bytes were compared with it, so that the parts of one record check it once; threads that
    ask at once wait for the first.
    """

    start: int
    size: int
    crc: int
    is_sound: bool | None = None

    def agrees(self, content: bytes | memoryview) -> bool:
        """Whether the bytes of the whole record have its checksum. Cost: about 0.25 ms a megabyte, without the GIL."""
        return self.crc in (0, zlib.crc32(content))

    def agrees_in(self, file: StoredFile) -> bool:
        """Whether the record has its checksum, read from the file a few megabytes at a time."""
        if self.crc == 0:
            return True
        with _CHECKING:
            if self.is_sound is None:
                crc = 0
                for offset in range(0, self.size, CHECKED_AT_ONCE):
                    crc = zlib.crc32(file.read(self.start + offset, min(CHECKED_AT_ONCE, self.size - offset)), crc)
                self.is_sound = crc == self.crc
            return self.is_sound


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's elements inside a file: `extent` bytes from `start` on, seen through `shape` and `stride`.

    `stride` (in elements) is None where the elements lie in row-major order without gaps. `record` is what they are
    checked against, where the format has checksums. `part_of` is the extent of the tensor that this is a part of, 0
    where it is none: the parts together are read as often as the whole, and by its size it is decided about a check.
    """

    file: StoredFile
    name: str
    start: int
    extent: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    record: Record | None = None
    part_of: int = 0

    def part(self, index: Index) -> StoredTensor:
        """`tensor[index]`, described by the bytes from its first element to its last. Reads nothing.

        Raises `IndexError` as the tensor would.
        """
        if len(index) > len(self.shape):
            raise IndexError(f"{len(index)} indices for a tensor of {len(self.shape)} dimensions")
        every = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        first, shape, stride = 0, [], []
        for at, size, step in zip(every, self.shape, self.stride or _row_major(self.shape), strict=True):
            picked = range(size)[at]
            if isinstance(picked, range):
                first += picked.start * step
                shape.append(len(picked))
                stride.append(picked.step * step)
            else:
                first += picked * step
        return replace(
            self,
            start=self.start + first * self.dtype.itemsize,
            extent=elements_spanned(shape, stride) * self.dtype.itemsize,
            shape=tuple(shape),
            stride=tuple(stride),
            part_of=self.part_of or self.extent,
        )

    def load_part(self, index: Index) -> Tensor:
        """`self.load()[index]`, reading no byte before its first element or after its last. Raises as both do."""
        return self.part(index).load()

    def load(self) -> Tensor:
        """Read this tensor's own bytes, and of its record as much as a check may cost. As described, on the CPU.

        Raises `CheckpointError` where the file has changed or is damaged, and where memory is short.
        """
        if prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        try:
            flat = torch.empty(self.extent, dtype=torch.uint8)
        except RuntimeError as error:
            raise CheckpointError(
                f"tensor {quoted(self.name)} of {shown(self.file.path)} needs {self.extent / 1e9:.1f} GB of memory, "
                "more than there is; use a machine with more"
            ) from error
        self.file.fill(flat.numpy().data, self.start)
        self._check(flat.numpy().data)
        elements = flat.view(self.dtype)
        if self.stride is None:
            return elements.reshape(self.shape)
        tensor = elements.as_strided(self.shape, self.stride)
        # A view with gaps would keep the whole extent alive; a transposed one loses nothing by staying a view.
        return tensor.clone() if self.extent != tensor.numel() * tensor.itemsize else tensor

    def _check(self, content: memoryview) -> None:
        """Refuse bytes that differ from those that were written, where the whole record was read or is small."""
        record = self.record
        if record is None or record.size > MOST_READ_FOR_CHECK * (self.part_of or self.extent):
            return
        is_whole = (record.start, record.size) == (self.start, self.extent)
        if not (record.agrees(content) if is_whole else record.agrees_in(self.file)):
            raise CheckpointError(
                f"tensor {quoted(self.name)} of {shown(self.file.path)} is damaged: its bytes do not fit the checksum "
                "that was written with them; download or save it again"
            )


def elements_spanned(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last that a view touches."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps."""
    return tuple(prod(shape[position + 1 :]) for position in range(len(shape)))


def cannot_read(path: Path, error: OSError | ValueError) -> CheckpointError:
    """The sentence for an operating system error on `path`."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CheckpointError(f"{shown(path)} does not exist; check the path")
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"{shown(path)} may not be read by this user (permission denied); "
            "ask its owner for `chmod a+r`, since some writers create weights for their owner alone"
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return CheckpointError(f"{shown(path)} cannot be read: {reason}; check the path and the disk")

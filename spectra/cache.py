"""Spectra of base weights on disk, found by what the weight holds: a base that was decomposed once is not again.

A folder holds one file an entry, named by the SHA-256 of the weight, and believed only where its own SHA-256 agrees.
Whatever happens to the folder (a full disk, a killed writer, another process that clears it) costs a decomposition and
never an answer.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from spectra.errors import SpectraError
from spectra.linalg.svd import Spectrum
from spectra.spectrum_file import NOT_A_SPECTRUM, read_label, read_spectrum, write_spectrum

# Part of every key. Raise it with any change to what `svd` gives for the same weight (a solver, a threshold, the order
# or the sign of vectors, a corrected error) and to how an entry is written: what older versions stored is then left to
# age out instead of being served.
VERSION = 1

BLOCK = 1 << 24  # bytes of a strided weight that are made contiguous at once to be hashed
HYSTERESIS = 16  # a full folder is emptied by a further 1/16, so that not every new entry has to list it
ABANDONED = 3600  # seconds after which a file that never became an entry was left by a killed writer

_ENTRY = re.compile(r"([0-9a-f]{64})\.safetensors")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.safetensors\..+")  # as `spectra.atomic.replacing` names them


@dataclass(frozen=True)
class Entry:
    """A file of the cache: the spectrum of an m x n weight. shape (0, 0), algorithm "unreadable": a broken file."""

    key: str
    bytes: int
    shape: tuple[int, int]
    dtype: str  # of U and V
    algorithm: str
    used: datetime  # when it was last written or served


class SpectrumCache:
    """A handle on a folder of spectra. Threads may share it, and processes the folder.

    Attributes:
        hits: spectra that were not computed.   misses: those that were.
        notes: why spectra could not be kept, once each; empty where all went well.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = 20 * 2**30) -> None:
        """Open the folder, and make it where there is none.

        Args: limit in bytes; beyond it, the least recently used entries go.
        Raises: SpectraError where the folder cannot be made or written.
        """
        self.folder, self.limit = Path(folder).absolute(), limit
        self.hits = self.misses = 0
        self.notes: tuple[str, ...] = ()
        if limit < 0:
            raise SpectraError(f"the size limit of a cache must not be negative, and {limit} bytes were given")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".spectra-"):
                pass
        except OSError as error:
            raise SpectraError(
                f"cannot write into the cache {self.folder}: {error.strerror or error}; choose another folder for it"
            ) from error
        self._lock = threading.Lock()
        self._running: dict[str, Future[Spectrum]] = {}
        self._storing = threading.Lock()
        self._listed: int | None = None  # bytes in the folder when it was last listed
        self._written = 0  # bytes that were added since

    def spectrum(self, W: Tensor, dtype: torch.dtype, compute: Callable[[], Spectrum]) -> Spectrum:
        """The spectrum of W: from the folder where it is there and intact, otherwise `compute()`, which is then kept.

        A spectrum from the folder has the bits and the memory order of the one that was computed, so that everything
        computed from it has too. Threads that ask for the same one at once wait for the first and share its result.

        Args: W (m, n) as stored, of any dtype and strides; dtype of U and V, float32 or float64; compute() gives
            the `Spectrum` of W with vectors of that dtype.
        Returns: the `Spectrum`, on the CPU where it was read, as `compute` gave it otherwise.
        Raises: what `compute` raises. A folder that cannot be read or written is no error; `notes` tells.
        Cost: of a hit, SHA-256 of W and of the entry (about 2 GB/s), and reading it.
        """
        key = key_of(W, dtype)
        while True:
            with self._lock:
                others = self._running.get(key)
                if others is None:
                    mine = self._running[key] = Future()
                    break
            if others.exception() is None:  # waits; where the first one failed, the next one tries for itself
                self._count(hit=True)
                return others.result()
        path = self.folder / f"{key}.safetensors"
        try:
            found = read_spectrum(path, key)
            is_hit = found is not None and _fits(found, W, dtype)
            self._count(hit=is_hit)
            if found is None or not is_hit:
                found = compute()
                if not _fits(found, W, dtype):
                    raise ValueError(f"compute() gave {found.U.dtype} vectors of a {found.shape} weight, not {dtype}")
        except BaseException as error:
            self._forget(key)
            mine.set_exception(error)
            raise
        mine.set_result(found)
        try:
            if is_hit:
                with suppress(OSError):
                    os.utime(path)  # the time of use is ours to set: file systems seldom keep that of reading
            else:
                self._store(path, key, found)
        finally:
            self._forget(key)
        return found

    def entries(self) -> list[Entry]:
        """What the folder holds, the most recently used first. SpectraError where it cannot be read."""
        return entries_of(self.folder)

    def clear(self) -> int:
        """Remove all entries, and nothing that is not one. Returns: bytes freed. SpectraError where it fails."""
        freed = 0
        try:
            for path, status in [*_files(self.folder, _ENTRY), *_files(self.folder, _TEMPORARY)]:
                with suppress(FileNotFoundError):  # another process clears, too
                    path.unlink()
                    freed += status.st_size
        except OSError as error:
            raise SpectraError(f"cannot clear the cache {self.folder}: {error.strerror or error}") from error
        with self._storing:
            self._listed = None
        return freed

    def _count(self, *, hit: bool) -> None:
        with self._lock:
            self.hits += hit
            self.misses += not hit

    def _forget(self, key: str) -> None:
        with self._lock:
            self._running.pop(key, None)

    def _store(self, path: Path, key: str, spectrum: Spectrum) -> None:
        """Keep the spectrum where it fits; what prevents that is noted and not raised."""
        with self._storing:  # one thread at a time, since each counts what the others wrote
            try:
                self._make_room(path, write_spectrum(path, key, spectrum, self.limit))
            except (OSError, MemoryError) as error:
                if isinstance(error, FileNotFoundError) and self.folder.is_dir():
                    return  # another process cleared the folder while this one wrote
                reason = getattr(error, "strerror", None) or type(error).__name__
                note = (
                    f"spectra could not be kept in the cache {self.folder} ({reason}), so that they are computed again "
                    "next time; free some space or choose another folder"
                )
                self.notes = tuple(dict.fromkeys((*self.notes, note)))

    def _make_room(self, kept: Path, size: int) -> None:
        """After `kept` was written: remove the least recently used others while there is more than the limit.

        The folder is listed only when it may be full, and now and then for what other processes have written.
        """
        self._written += size
        known = self._listed is not None and self._written <= self.limit // HYSTERESIS
        if known and (self._listed or 0) + self._written <= self.limit:
            return
        for path, status in _files(self.folder, _TEMPORARY):
            if status.st_mtime < time.time() - ABANDONED:
                path.unlink(missing_ok=True)
        files = _files(self.folder, _ENTRY)
        total = sum(status.st_size for _, status in files)
        goal = self.limit if total <= self.limit else self.limit - self.limit // HYSTERESIS
        for path, status in files:
            if total <= goal:
                break
            if path != kept:
                path.unlink(missing_ok=True)
                total -= status.st_size
        self._listed, self._written = total, 0


def entries_of(folder: Path) -> list[Entry]:
    """What a folder of spectra holds, the most recently used first; the folder may be read-only.

    Raises: SpectraError where it cannot be read.
    """
    try:
        files = _files(folder, _ENTRY)
    except OSError as error:
        raise SpectraError(f"cannot read the cache {folder}: {error.strerror or error}") from error
    listing = []
    for path, status in reversed(files):
        key = path.name.partition(".")[0]
        used = datetime.fromtimestamp(status.st_mtime, UTC)
        entry = Entry(key, status.st_size, (0, 0), "", "unreadable", used)
        with suppress(*NOT_A_SPECTRUM), path.open("rb") as file:
            label, _ = read_label(file, key)
            entry = replace(entry, shape=label.shape, dtype=label.vectors, algorithm=label.algorithm)
        listing.append(entry)
    return listing


def key_of(W: Tensor, dtype: torch.dtype) -> str:
    """The key of W's spectrum with vectors of `dtype`: 64 hexadecimal digits.

    SHA-256 of VERSION, the dtypes, the shape, and the entries of W row by row: its strides and its device do not
    matter, the bits of its entries do (0 and -0 differ).
    """
    m, n = W.shape
    digest = hashlib.sha256(f"{VERSION} {W.dtype} {m} {n} {dtype}\n".encode())
    W = W.detach()
    if W.is_contiguous() and W.device.type == "cpu":
        digest.update(_bytes(W))
        return digest.hexdigest()
    columns = max(1, min(n, BLOCK // W.itemsize))  # all of them, or a piece of a single row: row by row either way
    rows = max(1, BLOCK // (columns * W.itemsize))
    for row in range(0, m, rows):
        for column in range(0, n, columns):
            block = W[row : row + rows, column : column + columns]
            digest.update(_bytes(block.cpu()))
    return digest.hexdigest()


def _bytes(block: Tensor) -> memoryview:
    """The bytes of a block row by row; a copy only where it does not lie so."""
    flat = block.reshape(-1)
    if flat.stride(0) != 1:  # a strided row or column, which reshape and contiguous() may leave as it is
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def _fits(found: Spectrum, W: Tensor, dtype: torch.dtype) -> bool:
    return found.shape == tuple(W.shape) and found.U.dtype == dtype and found.V.dtype == dtype


def _files(folder: Path, name: re.Pattern[str]) -> list[tuple[Path, os.stat_result]]:
    """The files of such a name, the least recently used first; one that vanishes meanwhile is left out."""
    files = []
    with os.scandir(folder) as listing:
        for item in listing:
            if name.fullmatch(item.name):
                with suppress(FileNotFoundError):
                    files.append((Path(item.path), item.stat()))
    return sorted(files, key=lambda file: (file[1].st_mtime_ns, file[0].name))

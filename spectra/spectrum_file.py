"""A spectrum in a safetensors file that proves itself: whose it is, and that no byte of it is missing or changed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

import spectra
from spectra.atomic import replacing
from spectra.linalg.svd import Spectrum

LONGEST_HEADER = 4096  # bytes; ours take about 600

_STORED = {torch.float32: "F32", torch.float64: "F64"}  # in the words of safetensors
# What reading a file that is broken, or none of ours, may raise.
NOT_A_SPECTRUM = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Label:
    """All that a file says of its spectrum but the digest."""

    key: str  # of the weight
    shape: tuple[int, int]  # (m, n)
    vectors: str  # dtype of U and V
    algorithm: str
    turned: str  # those of U and V that lie column by column in memory, and are stored so: "", "U", "V" or "UV"
    spectra: str  # version of the program

    def blocks(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and row-major shape of the tensors in the order of the file, the widest dtype first."""
        (m, n), k, dtype = self.shape, min(self.shape), getattr(torch, self.vectors)
        blocks: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"S": (torch.float64, (k,))}
        for name, rows in (("U", m), ("V", n)):
            turned = name in self.turned
            blocks[f"{name}_transposed" if turned else name] = (dtype, (k, rows) if turned else (rows, k))
        return blocks

    def header(self, digest: str) -> bytes:
        """The opening bytes of the file, in the safetensors format."""
        metadata = {
            "key": self.key,
            "shape": f"{self.shape[0]}x{self.shape[1]}",
            "vectors": self.vectors,
            "algorithm": self.algorithm,
            "turned": self.turned,
            "spectra": self.spectra,
            "sha256": digest,
        }
        header: dict[str, object] = {"__metadata__": metadata}
        end = 0
        for name, (dtype, shape) in self.blocks().items():
            start, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _STORED[dtype], "shape": shape, "data_offsets": (start, end)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        data = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.blocks().values())
        return len(self.header("0" * 64)) + data

    def digest(self, blocks: list[Tensor]) -> str:
        """SHA-256 of the label and of the tensors' bytes, each row-major."""
        digest = hashlib.sha256(self.header(""))
        for block in blocks:
            digest.update(block.numpy().data)
        return digest.hexdigest()


def write_spectrum(path: Path, key: str, spectrum: Spectrum, limit: int) -> int:
    """Write the spectrum of the weight `key`, unless the file would exceed `limit` bytes.

    U and V are not copied, and keep the order in which they lie in memory: products with a matrix round differently
    where it lies the other way round.

    Returns: bytes written, 0 where that would be too many.   Raises: OSError; `path` is then as it was.
    """
    factors = {"U": spectrum.U.detach().cpu(), "V": spectrum.V.detach().cpu()}
    turned = "".join(name for name, X in factors.items() if X.T.is_contiguous() and not X.is_contiguous())
    vectors = str(spectrum.U.dtype).removeprefix("torch.")
    label = Label(key, spectrum.shape, vectors, spectrum.algorithm, turned, spectra.__version__)
    if label.size > limit:
        return 0
    U, V = (X.T if name in turned else X for name, X in factors.items())
    blocks = [X.contiguous() for X in (spectrum.S.detach().cpu(), U, V)]
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(label.header(label.digest(blocks)))
        for block in blocks:
            file.write(block.numpy().data)
    return label.size


def read_spectrum(path: Path, key: str) -> Spectrum | None:
    """The spectrum of the weight `key`, on the CPU; None where the file is missing, broken or of another weight.

    It is read and not mapped into memory: what was verified cannot change afterwards, and a file that another process
    truncates cannot end this one.
    """
    try:
        with path.open("rb") as file:
            label, digest = read_label(file, key)
            blocks = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in label.blocks().items()}
            for block in blocks.values():
                file.readinto(block.numpy().data)
        if label.digest(list(blocks.values())) != digest:
            return None
    except NOT_A_SPECTRUM:
        return None
    U, V = (blocks[name] if name in blocks else blocks[f"{name}_transposed"].T for name in ("U", "V"))
    return Spectrum(U, blocks["S"], V, label.algorithm)


def read_label(file: BinaryIO, key: str) -> tuple[Label, str]:
    """The label and the digest. The header must be to the byte what would be written for them, and the size fit.

    Raises: one of NOT_A_SPECTRUM.
    """
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if size > LONGEST_HEADER:
        raise ValueError("the header is too long to be ours")
    text = file.read(size)
    said = json.loads(text)["__metadata__"]
    m, n = (int(side) for side in said["shape"].split("x"))
    label = Label(key, (m, n), said["vectors"], said["algorithm"], said["turned"], said["spectra"])
    if length + text != label.header(said["sha256"]):
        raise ValueError("the header is not ours, or that of another weight")
    if os.fstat(file.fileno()).st_size != label.size:
        raise ValueError("the file is not whole")
    return label, said["sha256"]

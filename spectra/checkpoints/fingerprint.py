"""What a checkpoint's bytes are, so that a result can say from what it was made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectra.checkpoints.checkpoint import Adapter, Checkpoint
from spectra.checkpoints.stored_file import cannot_read
from spectra.checkpoints.wording import shown

CHUNK_BYTES = 1 << 22


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """SHA-256 of a checkpoint's content, read in small pieces.

    Returns:
        `source`: what the user gave; `bytes`: size of all files, or of all tensors of an object in memory;
        `sha256`: one digest for the whole (a single file's own); `files`: path -> digest, empty in memory.

    Raises `CheckpointError` where a file cannot be read any more.
    """
    if not checkpoint.files:
        digest, size = _of_tensors(checkpoint)
        return {"source": checkpoint.source, "bytes": size, "sha256": digest, "files": {}}
    digests = {path: _of_file(path) for path in checkpoint.files}
    whole = hashlib.sha256()
    for path, (digest, _) in sorted(digests.items(), key=lambda item: item[0].name):
        whole.update(f"{path.name}\0{digest}\n".encode(errors="surrogateescape"))
    one = len(digests) == 1
    return {
        "source": checkpoint.source,
        "bytes": sum(size for _, size in digests.values()),
        "sha256": next(iter(digests.values()))[0] if one else whole.hexdigest(),
        "files": {shown(path): digest for path, (digest, _) in digests.items()},
    }


def _of_file(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise cannot_read(path, error) from error
    return digest.hexdigest(), size


def _of_tensors(checkpoint: Checkpoint) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for name in sorted(checkpoint):
        size += _add(digest, name, checkpoint[name])
    if isinstance(checkpoint, Adapter):
        for name in sorted(checkpoint.updates):
            update = checkpoint.update(name)
            digest.update(f"update\0{update.c!r}\0".encode())
            size += _add(digest, f"{name}\0B", update.B) + _add(digest, f"{name}\0A", update.A)
    return digest.hexdigest(), size


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> int:
    digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode(errors="surrogatepass"))
    if tensor.numel():
        # NumPy knows no bfloat16, but bytes of any dtype. A single element counts as contiguous with any stride.
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return tensor.numel() * tensor.itemsize

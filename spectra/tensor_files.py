"""Files of tensors, written so that a full disk is an OSError and not an error of the format's library."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file of tensors on the CPU, none of which share memory. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata=dict(metadata) if metadata is not None else None)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_torch(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a file as `torch.save` does. Raises OSError."""
    import torch

    try:
        torch.save(content, path)
    except RuntimeError as error:  # of its archive writer
        raise OSError(str(error).partition("\n")[0]) from error

"""Files of tensors, written so that a full disk is an OSError and not an error of the format's library."""

from __future__ import annotations

import os
import re
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
        raise _of_system(str(error)) from error


def write_torch(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a file as `torch.save` does. Raises OSError."""
    import torch

    try:
        torch.save(content, path)
    except RuntimeError as error:  # of its archive writer
        raise _of_system(str(error)) from error


def _of_system(text: str) -> OSError:
    """The error of the operating system behind what a library says of it; in plain words where only it knows which."""
    number = re.search(r"\(os error (\d+)\)", text)  # safetensors, as Rust has it
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if "inline_container" in text:  # torch's writer found fewer bytes in the file than it had put there
        return OSError("the file could not be written in full")
    return OSError(text.partition("\n")[0])

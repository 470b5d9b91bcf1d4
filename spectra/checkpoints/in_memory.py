"""A state dict or an `nn.Module` that is already in memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectra.checkpoints.checkpoint import Checkpoint, CheckpointError, Entry, Index, TensorInfo
from spectra.checkpoints.containers import find_state_dict

# Tensor classes of other libraries whose elements are not the weight: by class name, or by the package's name.
PACKED_CLASSES = {"Params4bit": "bitsandbytes (4 bit)", "Int8Params": "bitsandbytes (LLM.int8)"}
PACKED_PACKAGES = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "optimum": "quanto", "hqq": "HQQ"}


def open_module(module: nn.Module) -> Checkpoint:
    """The parameters and buffers of a module, as its `state_dict` names them. Nothing is copied on the CPU.

    Tensors on other devices are copied to the CPU when they are asked for.
    """
    kind = type(module).__name__
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    described: Mapping[str, Any] = to_dict() if callable(to_dict) else {}
    return _open_tensors(module.state_dict(), f"{kind} in memory", config=described)


def open_state_dict(state: Mapping[str, Any]) -> Checkpoint:
    """The tensors of a dict by name, or of the dict of weights inside a training checkpoint; not copied on the CPU.

    Raises `CheckpointError` where there is no dict of tensors in it.
    """
    return _open_tensors(state, "state dict in memory")


def _open_tensors(content: Mapping[str, Any], source: str, *, config: Mapping[str, Any] | None = None) -> Checkpoint:
    state, notes = find_state_dict(content, f"the {source}")
    entries: dict[str, Entry] = {}
    tied: dict[str, str] = {}
    refused: dict[str, str] = {}
    first_names: dict[tuple[object, ...], str] = {}
    for name, value in state.items():
        reason = _unusable(value)
        if reason:
            refused[name] = reason
            continue
        tensor = value.detach().as_subclass(Tensor)
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and first_names.setdefault(identity, name) != name:
            tied[name] = first_names[identity]
            continue
        info = TensorInfo(name, tuple(tensor.shape), tensor.dtype)
        entries[name] = Entry(info, tensor.cpu, partial(_part, tensor))
    return Checkpoint(source, entries, config=config, tied=tied, refused=refused, notes=notes)


def _part(tensor: Tensor, index: Index) -> Tensor:
    """A view on the CPU; from another device only the part is copied."""
    return tensor[index].cpu()


def _unusable(tensor: Tensor) -> str | None:
    """Why a tensor in memory has no elements that could be read as a weight; None where it has."""
    kind = type(tensor)
    package = kind.__module__.partition(".")[0]
    scheme = PACKED_CLASSES.get(kind.__name__) or PACKED_PACKAGES.get(package)
    if scheme:
        return f"packed by {scheme}: dequantise first, e.g. model.dequantize()"
    if kind.__name__ == "DTensor":
        return "a tensor spread over processes (DTensor): give tensor.full_tensor()"
    if tensor.is_quantized:
        return f"packed by torch's quantisation ({str(tensor.dtype).removeprefix('torch.')}): give tensor.dequantize()"
    if kind.__name__ == "FakeTensor" or tensor.is_meta:
        return "a tensor without data (meta device): load the weights first"
    if tensor.layout != torch.strided:
        return "a sparse tensor: give tensor.to_dense()"
    if tensor.is_nested:
        return "a nested tensor: give its parts by name"
    return None


def not_openable(source: object) -> CheckpointError:
    """The sentence for an object that is neither a path nor anything with tensors by name."""
    return CheckpointError(
        f"a {type(source).__name__} is no checkpoint; give a path, a dict of tensors by name, or a torch.nn.Module"
    )

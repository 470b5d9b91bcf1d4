"""The one door: anything a user may mean by "a checkpoint" -> `Checkpoint` or `Adapter`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectra.checkpoints.adapter_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapters_inside,
    is_adapter_folder,
    is_peft_model,
    open_adapter_folder,
    open_peft_model,
)
from spectra.checkpoints.checkpoint import Adapter, Checkpoint, CheckpointError
from spectra.checkpoints.collector import paused_collector
from spectra.checkpoints.foreign import foreign_keys
from spectra.checkpoints.huggingface_folder import (
    INDEX,
    described_by_config,
    folder_names,
    holds_weights,
    is_usual_name,
    open_index,
    open_model_folder,
    shard_note,
)
from spectra.checkpoints.in_memory import not_openable, open_module, open_state_dict
from spectra.checkpoints.quantised import packed_tensors, scheme_names
from spectra.checkpoints.stored_file import cannot_read
from spectra.checkpoints.weights_file import open_weights_file
from spectra.checkpoints.wording import listed, quoted, shown

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@paused_collector()
def open_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module | Checkpoint) -> Checkpoint:
    """Open a checkpoint: headers only, then one tensor at a time.

    Args:
        source: a file (safetensors, torch), a model folder, an index of shards, a PEFT adapter folder, the name of a
            model in the local Hugging Face cache ("org/name"), a state dict, a module, or an open checkpoint.

    Returns a `Checkpoint`, or an `Adapter` where the source holds LoRA factors.
    Raises `CheckpointError` where it is missing, damaged, of a foreign format, packed as a whole, or holds code.

    >>> import torch
    >>> open_checkpoint({"layer.weight": torch.ones(3, 2)}).tensors["layer.weight"].shape
    (3, 2)
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module):
        return open_peft_model(source) if is_peft_model(source) else _usable(open_module(source))
    if isinstance(source, Mapping):
        return _usable(open_state_dict(source))
    if isinstance(source, str | os.PathLike):
        if not os.fspath(source):  # Path("") is the current folder
            raise CheckpointError(
                "the path of the checkpoint is empty; give that of a file or folder, or '.' for the current folder"
            )
        checkpoint = _open_path(Path(source))
        return checkpoint if isinstance(checkpoint, Adapter) else _usable(checkpoint)
    raise not_openable(source)


def _open_path(path: Path) -> Checkpoint:
    path = path.expanduser()
    try:
        # stat, and not exists(): a folder that may not be entered is there.
        path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and HUB_NAME.fullmatch(str(path)):
            return _open_path(_cached(str(path)))
        raise cannot_read(path, error) from error
    if path.is_dir():
        return _open_folder(path)
    if INDEX.fullmatch(path.name):
        checkpoint = open_index(path)
    elif path.name in ADAPTER_WEIGHTS:
        if not is_adapter_folder(path.parent):
            raise CheckpointError(
                f"{shown(path)} lies without its {ADAPTER_CONFIG}, which holds the scaling; put it into the same folder"
            )
        return open_adapter_folder(path.parent)
    else:
        checkpoint = open_weights_file(path)
    note = shard_note(path)
    described = described_by_config(path.parent, checkpoint) if is_usual_name(path.name) else {}
    return checkpoint.described(checkpoint.source, notes=(*checkpoint.notes, *([note] if note else [])), **described)


def _open_folder(folder: Path) -> Checkpoint:
    if is_adapter_folder(folder):
        models = [name for name in folder_names(folder) if is_usual_name(name)]
        if models:
            raise CheckpointError(
                f"{shown(folder)} holds an adapter and also a whole model ({listed(models)}); "
                "give the path of the one file that you mean"
            )
        return open_adapter_folder(folder)
    adapters = [] if holds_weights(folder) else adapters_inside(folder)
    if adapters:
        raise CheckpointError(
            f"{shown(folder)} holds adapters in its folders {listed(adapters, most=12)}; give the path of one of them"
        )
    return open_model_folder(folder)


def _cached(name: str) -> Path:
    """The folder of a hub model in the local cache. Nothing is downloaded."""
    missing = (
        f"{name} is neither a path nor a model in the local Hugging Face cache; check the path, or download the model"
    )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(missing) from error
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise CheckpointError(missing) from error


def _usable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with packed tensors set apart. Raises `CheckpointError` where nothing is left to work with."""
    where = checkpoint.source
    foreign = foreign_keys(checkpoint)
    if foreign:
        raise CheckpointError(f"{where} is {foreign}")
    packed = packed_tensors(checkpoint.tensors, checkpoint.config)
    if packed:
        checkpoint = checkpoint.described(where, refused={**checkpoint.refused, **packed})
    tensors = checkpoint.tensors.values()
    if not tensors and not checkpoint.refused:
        raise CheckpointError(f"{where} holds no tensors; give a file with a model's weights")
    if checkpoint.refused and not any(_is_weight_like(info.dtype) for info in tensors):
        schemes = " and ".join(scheme_names(packed))
        if schemes:
            raise CheckpointError(
                f"{where} holds weights packed by {schemes} and no plain ones; give the unpacked weights of the model"
            )
        name, reason = next(iter(checkpoint.refused.items()))
        raise CheckpointError(f"{where} holds nothing that can be used as weights; tensor {quoted(name)} is {reason}")
    weights = [info for info in tensors if info.name.endswith("weight")]
    if weights and not any(info.bytes for info in weights):
        raise CheckpointError(
            f"{where} holds only empty weights, as DeepSpeed ZeRO-3 leaves them; gather them with zero_to_fp32.py"
        )
    return checkpoint


def _is_weight_like(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex

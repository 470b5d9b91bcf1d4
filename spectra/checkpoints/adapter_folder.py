"""A PEFT adapter: a folder with `adapter_config.json`, or a `PeftModel` in memory."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from spectra.checkpoints.checkpoint import Adapter, CheckpointError
from spectra.checkpoints.huggingface_folder import folder_names, holds_weights, read_json
from spectra.checkpoints.in_memory import open_state_dict
from spectra.checkpoints.lora_config import read_scaling
from spectra.checkpoints.lora_factors import adapter_of
from spectra.checkpoints.weights_file import open_weights_file
from spectra.checkpoints.wording import listed, shown

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds one PEFT adapter, and not a merged model beside which its configuration was left."""
    has_factors = any((folder / name).is_file() for name in ADAPTER_WEIGHTS)
    return (folder / ADAPTER_CONFIG).is_file() and (has_factors or not holds_weights(folder))


def adapters_inside(folder: Path) -> list[str]:
    """The sub-folders of a folder that hold adapters."""
    return [name for name in folder_names(folder) if is_adapter_folder(folder / name)]


def open_adapter_folder(folder: Path) -> Adapter:
    """A LoRA adapter as `save_pretrained` of a PeftModel writes it.

    Raises `CheckpointError` for other kinds of adapters and for missing or unfitting weights.
    """
    where = shown(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    # Before the weights are looked for: a prompt or IA3 adapter is named as such, whatever else is wrong with it.
    read_scaling(config, where)
    names = folder_names(folder)
    weights = [name for name in ADAPTER_WEIGHTS if name in names]
    if not weights:
        raise CheckpointError(
            f"{where} holds {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS[0]}; download it, or save the adapter again"
        )
    notes = (f"took '{weights[0]}', left out {listed(weights[1:])}",) if weights[1:] else ()
    stored = open_weights_file(folder / weights[0])
    stored = stored.described(where, files=(folder / ADAPTER_CONFIG, *stored.files), notes=(*notes, *stored.notes))
    return adapter_of(stored, config)


def is_peft_model(module: nn.Module) -> bool:
    """Whether a module is a PeftModel, without importing peft."""
    return any(kind.__name__ == "PeftModel" and kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def open_peft_model(module: nn.Module) -> Adapter:
    """The active LoRA adapter of a PeftModel in memory.

    Raises `CheckpointError` where several are active, or one is merged into the base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert isinstance(module, PeftModel)
    active = module.active_adapters
    if len(active) != 1:
        raise CheckpointError(
            f"the PeftModel in memory has {len(active)} active adapters; "
            "choose one with set_adapter, or give merge_and_unload()"
        )
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in module.modules()):
        raise CheckpointError(
            "the PeftModel in memory has merged its adapter into the base; "
            "call unmerge_adapter(), or give merge_and_unload()"
        )
    config = {
        key: value.value if isinstance(value, Enum) else value for key, value in _config_of(module, active[0]).items()
    }
    # Embeddings that were not trained need not be looked for on the hub, which "auto" would do.
    state = get_peft_model_state_dict(module, adapter_name=active[0], save_embedding_layers=False)
    read_scaling(config, "the PeftModel in memory")
    return adapter_of(open_state_dict(state).described("PeftModel in memory"), config)


def _config_of(module: Any, adapter: str) -> dict[str, Any]:
    return dict(module.peft_config[adapter].to_dict())

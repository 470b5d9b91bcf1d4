"""A LoRA adapter, merged into its base by the library that trained it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spectra.checkpoints import Adapter
from spectra.errors import SpectraError
from spectra.sources.libraries import first_line, library, quietly


def head_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the modules that an adapter brings whole, such as a new head."""
    saved = config.get("modules_to_save") or ()
    return tuple(map(str, saved)) if isinstance(saved, list | tuple) else ()


def merge_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """`model` with W + c B A in the place of every adapted W, and with the modules that the adapter brings whole.

    Args:
        model: the base in float32, on the CPU; it is changed and given back under its own names.
        adapter: an opened PEFT LoRA folder, of a kind whose update is c B A (see `spectra.checkpoints`).
    Raises: SpectraError where the adapter was trained on another model, or peft is not installed.
    """
    peft = library("peft", "to run an adapter")
    folder = next(file.parent for file in adapter.files if file.name == "adapter_config.json")
    with quietly(), torch.random.fork_rng(devices=[]):
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            adapted = peft.get_peft_model(model, config)
            stored = peft.utils.load_peft_weights(str(folder), device="cpu")
            found = peft.utils.set_peft_model_state_dict(adapted, stored)
        except Exception as error:  # peft raises what it likes
            raise SpectraError(
                f"peft cannot put the adapter {folder} onto this {type(model).__name__}: {first_line(error)}; "
                "give the base that it was trained on"
            ) from error
        missing = [name for name in found.missing_keys if "lora_" in name]
        foreign = list(found.unexpected_keys)
        if missing or foreign:
            said = f"lacks {missing[0]!r}" if missing else f"holds {foreign[0]!r}, which the model does not have"
            raise SpectraError(
                f"the adapter {folder} does not fit this {type(model).__name__}: it {said}; "
                "give the base that it was trained on"
            )
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:  # what safe_merge found: numbers that are not finite
            raise SpectraError(f"the adapter {folder} cannot be merged: {first_line(error)}; train it again") from error
    assert isinstance(merged, nn.Module)
    return merged

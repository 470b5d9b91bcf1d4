"""A LoRA adapter, merged into its base by the library that trained it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectra.checkpoints import Adapter
from spectra.errors import SpectraError
from spectra.sources.libraries import first_line, library, quietly

STORED_UNDER = "base_model.model."  # how peft begins the names of an adapter's tensors
RECORD = "spectra_slices.json"  # what `spectra.lora` writes beside an adapter of its own


def head_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the modules that an adapter brings whole, such as a new head."""
    saved = config.get("modules_to_save") or ()
    return tuple(map(str, saved)) if isinstance(saved, list | tuple) else ()


def class_names(adapter: Adapter) -> dict[int, str]:
    """The names of the classes that an adapter of `spectra.lora` was trained on, by number; empty where it has none."""
    try:
        content = json.loads((_folder(adapter) / RECORD).read_text(encoding="utf-8"))
        return {int(number): str(name) for number, name in content.get("id2label", {}).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def merge_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """`model` with W + c B A in the place of every adapted W, and with the modules that the adapter brings whole.

    Args:
        model: the base in float32, on the CPU; it is changed and given back under its own names.
        adapter: an opened PEFT LoRA folder, of a kind whose update is c B A (see `spectra.checkpoints`).
    Raises: SpectraError where the adapter was trained on another model, or peft is not installed.
    """
    peft = library("peft", "to run an adapter")
    folder = _folder(adapter)
    with quietly(), torch.random.fork_rng(devices=[]):
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            stored = peft.utils.load_peft_weights(str(folder), device="cpu")
            if prefix := _body_prefix(model, stored):
                stored = _of_body(model, config, stored, prefix)
            adapted = peft.get_peft_model(model, config)
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


def _folder(adapter: Adapter) -> Path:
    return next(file.parent for file in adapter.files if file.name == "adapter_config.json")


def _body_prefix(model: nn.Module, stored: Mapping[str, torch.Tensor]) -> str:
    """What stands before the names of `model` in an adapter that was trained with a head around it ("bert."), or ""."""
    adapted = {_module_of(name) for name in stored if ".lora_" in name}
    own = {name for name, _ in model.named_modules()}
    if not adapted or adapted <= own:
        return ""
    first = min(adapted)
    beginnings = (first[: at + 1] for at, letter in enumerate(first) if letter == ".")
    fits = (p for p in beginnings if all(name.startswith(p) and name.removeprefix(p) in own for name in adapted))
    return next(fits, "")


def _of_body(model: nn.Module, config: Any, stored: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of the body alone, without those of a head around it; edits `config`."""
    own = {name for name, _ in model.named_modules()}
    inner = {name: f"{STORED_UNDER}{_inner(name).removeprefix(prefix)}" for name in stored}
    kept = {inner[name]: tensor for name, tensor in stored.items() if _module_of(inner[name]) in own}
    config.target_modules = sorted({_module_of(name) for name in kept if ".lora_" in name})
    config.modules_to_save = [name for name in config.modules_to_save or () if name in own] or None
    config.task_type = None  # for which peft would look for the head that is not there
    for patterns in (config.rank_pattern, config.alpha_pattern):
        renamed = {
            f"^{key.lstrip('^').removeprefix(prefix)}" if prefix in key else key: patterns[key] for key in patterns
        }
        patterns.clear()
        patterns.update(renamed)
    return kept


def _inner(name: str) -> str:
    return name.removeprefix(STORED_UNDER)


def _module_of(name: str) -> str:
    """'base_model.model.bert.pooler.dense.lora_A.weight' -> 'bert.pooler.dense'."""
    return _inner(name).split(".lora_")[0] if ".lora_" in name else _inner(name).rpartition(".")[0]

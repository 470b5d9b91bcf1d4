"""A PEFT LoRA adapter folder, written whole or not at all, and read back before it takes its place."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectra.atomic import replacing_folder
from spectra.checkpoints import Adapter, open_checkpoint
from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank
from spectra.sources.adapters import RECORD
from spectra.tensor_files import write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_AN_ADAPTER = frozenset({CONFIG, WEIGHTS, RECORD, "adapter_model.bin"})
# What is laid beside an adapter, and kept where that is replaced: a tokenizer or image processor, a model card.
BESIDE = frozenset({
    "README.md", "added_tokens.json", "chat_template.jinja", "merges.txt", "preprocessor_config.json",
    "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
})  # fmt: skip
CAUSAL = ("ForCausalLM", "LMHeadModel")  # what names of causal language models end in


def check_place(folder: Path, force: bool) -> None:
    """Raise `SpectraError` where an adapter must not or cannot be put into `folder`; makes its parents.

    With `force` an adapter in the folder is replaced, and never a folder that holds anything else than that and what
    is laid beside one.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}."):
            names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise SpectraError(
            f"cannot write an adapter to {folder}: {error.strerror or error}; choose another folder"
        ) from error
    if foreign := sorted(names - OF_AN_ADAPTER - BESIDE):
        raise SpectraError(f"{folder} holds {foreign[0]!r}, which is no part of an adapter; choose another folder")
    if names and not force:
        raise SpectraError(f"{folder} holds an adapter already; choose another folder, or force its replacement")


def write_adapter(
    folder: Path,
    factors: Mapping[str, LowRank],
    *,
    others: Collection[str] = (),
    is_transposed: bool = False,
    base_model: str | None = None,
    architectures: Collection[str] = (),
) -> None:
    """Write D = B A of each module as a LoRA that `PeftModel.from_pretrained(base_model, folder)` loads.

    Args:
        folder: takes the place of what is there; see `check_place`.
        factors: module name -> B (out x r), A (r x in), c = 1; ranks may differ. lora_alpha = r, so that the scaling
            is 1 and the factors are stored as they are.
        others: the base's modules that are not adapted, so that none of them is meant by a name's ending.
        is_transposed: whether modules store (in x out), as Conv1D does; the factors do not.
        base_model: the base's path or hub id, for `AutoPeftModel`.   architectures: those of its config.
    Raises: SpectraError where the disk is full or what was read back differs.
    """
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": factor
        for module, update in factors.items()
        for side, factor in (("A", update.A), ("B", update.B))
    }
    put_adapter(folder, tensors, _config(factors, others, is_transposed, base_model, architectures), factors)


def put_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    updates: Mapping[str, LowRank],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors under PEFT's names, adapter_config.json and perhaps our own record as one folder.

    Args: updates: module -> D, what the folder must read back as.   Raises: as `write_adapter`.
    """
    try:
        with replacing_folder(folder) as temporary:
            for name in sorted(BESIDE):
                if (folder / name).is_file():
                    shutil.copy2(folder / name, temporary)
            write_tensors(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            for name, content in ((CONFIG, config), (RECORD, record)):
                if content is not None:
                    (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _check(temporary, updates)
    except OSError as error:
        raise SpectraError(
            f"cannot write the adapter to {folder}: {error.strerror or error}; free some space or choose another folder"
        ) from error


def _config(
    factors: Mapping[str, LowRank],
    others: Collection[str],
    is_transposed: bool,
    base_model: str | None,
    architectures: Collection[str],
) -> dict[str, Any]:
    """adapter_config.json. PEFT takes names for endings of modules' names, and patterns for regular expressions."""
    every = {*factors, *others}
    ranks = {pattern_of(module, every): update.rank for module, update in factors.items()}
    most = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if any(name.endswith(CAUSAL) for name in architectures) else None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": targets_of(factors, others),
        "fan_in_fan_out": is_transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_rslora": False,
        "init_lora_weights": True,
    }


def pattern_of(module: str, every: Collection[str]) -> str:
    """The regular expression by which a rank_pattern means this module and no other of the model."""
    # `fc` would also mean `layer.fc`.
    anchor = "^" if any(other.endswith(f".{module}") for other in every) else ""
    return anchor + re.escape(module)


def targets_of(modules: Collection[str], others: Collection[str]) -> str | list[str]:
    """The target_modules that mean exactly these: their names, a regular expression where a name ends another's."""
    means_others = any(other.endswith(f".{module}") for module in modules for other in others)
    return "|".join(map(re.escape, modules)) if means_others else list(modules)


def _check(folder: Path, factors: Mapping[str, LowRank]) -> None:
    """Raise `SpectraError` unless the folder reads as an adapter of exactly these updates."""
    adapter = open_checkpoint(folder)
    assert isinstance(adapter, Adapter)
    for module, written in factors.items():
        read = adapter.update(f"{module}.weight")
        same = torch.equal(read.A, written.A) and torch.equal(read.B, written.B)
        if not (same and isclose(read.c, written.c, rel_tol=1e-12)):
            raise SpectraError(f"the factors of {module!r} read back otherwise than they were written; check the disk")

"""LoRA factors under PEFT's names -> low-rank updates under the base's own tensor names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch

from spectra.checkpoints.checkpoint import Adapter, Checkpoint, CheckpointError, Entry, LowRankEntry, LowRankInfo
from spectra.checkpoints.lora_config import MERGE, LoraScaling, read_scaling
from spectra.checkpoints.wording import listed, quoted
from spectra.linalg.lowrank import LowRank

PREFIX = "base_model.model."
# `<module>.lora_A.weight`, with an adapter's name before `weight` in a raw state dict; embeddings have no `weight`.
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?P<rest>.+))?")


def adapter_of(stored: Checkpoint, config: Mapping[str, Any]) -> Adapter:
    """A LoRA adapter from its tensors under PEFT's names and its adapter_config.json.

    Tensors that are no factors (`modules_to_save`, trained biases) are kept whole, under the base's names.
    Raises `CheckpointError` for other kinds of adapters and for factors that are missing or do not fit.
    """
    where = stored.source
    scaling = read_scaling(config, where)
    factors: dict[tuple[str, bool], dict[str, Entry]] = defaultdict(dict)
    adapter_names: set[str] = set()
    whole: dict[str, Entry] = {}
    refused = dict(stored.refused)
    for name in [*stored, *stored.tied]:
        entry = stored.entry(stored.tied.get(name, name))
        plain = name.removeprefix(PREFIX)
        match = FACTOR.fullmatch(plain)
        if "lora_magnitude_vector" in plain:
            raise CheckpointError(f"{where} holds {quoted(name)} of DoRA, whose update is not linear in B A; {MERGE}")
        if match:
            adapter_names.add(_adapter_name(match, name, where))
            factors[match["module"], bool(match["embedding"])][match["side"]] = entry
        elif "trainable_tokens" in plain:
            refused[name] = f"replaces single rows of an embedding (trainable tokens): {MERGE}"
        elif ".lora_" in plain:
            refused[name] = f"no factor of a plain LoRA: {MERGE}"
        elif ".original_module." not in plain:
            whole[plain] = entry
    if len(adapter_names) > 1:
        raise CheckpointError(f"{where} holds several adapters ({listed(sorted(adapter_names))}); save them one by one")
    if not factors:
        raise CheckpointError(
            f"{where} holds no LoRA factors; give the folder that save_pretrained of a PeftModel writes"
        )
    modules = {module for module, _ in factors}
    for module in _attention_outputs(modules):
        # peft 0.21 adds this update twice, in its forward pass and when it merges; other versions may not.
        factors.pop((module, False), None)
        refused[_base_name(module, modules)] = f"the output projection of a MultiheadAttention under LoRA: {MERGE}"
    updates = {
        (base := _base_name(module, modules)): _update(base, module, is_embedding, sides, scaling, where)
        for (module, is_embedding), sides in factors.items()
    }
    return Adapter(
        where,
        _under_base_names(whole, adapter_names),
        updates,
        files=stored.files,
        config=config,
        refused=refused,
        notes=stored.notes,
    )


def _adapter_name(match: re.Match[str], name: str, where: str) -> str:
    """The adapter's name between `lora_A` and `weight`; empty in saved adapters."""
    rest = match["rest"] or ""
    if match["embedding"]:
        return rest
    adapter, _, leaf = rest.rpartition(".")
    if leaf == "bias":
        raise CheckpointError(f"{where} holds {quoted(name)}, a bias in a LoRA factor, which is not supported; {MERGE}")
    if leaf != "weight":
        raise CheckpointError(
            f"{where} holds {quoted(name)}, which is no name of a LoRA factor; save the adapter again"
        )
    return adapter


def _attention_outputs(modules: Iterable[str]) -> set[str]:
    """The adapted modules that are the output projection of a MultiheadAttention, which PEFT wraps as a whole."""
    return {module for module in modules if module.endswith(".base_layer.out_proj")}


def _base_name(module: str, modules: set[str]) -> str:
    """The base tensor that a module's factors update."""
    # The wrapped attention's own factors are those of its fused input projection.
    is_attention = f"{module}.base_layer.out_proj" in modules
    return f"{_without_wrapper(module)}.{'in_proj_weight' if is_attention else 'weight'}"


def _without_wrapper(name: str) -> str:
    return re.sub(r"(?<=\.)base_layer\.", "", name)


def _under_base_names(whole: Mapping[str, Entry], adapter_names: Iterable[str]) -> dict[str, Entry]:
    renamed: dict[str, Entry] = {}
    for name, entry in whole.items():
        plain = name
        for adapter in adapter_names:
            plain = plain.replace(f".modules_to_save.{adapter}.", ".")
        unnamed = re.sub(r"\.modules_to_save\.[^.]+\.", ".", plain)
        is_copy = unnamed != plain and unnamed in whole
        plain = _without_wrapper(unnamed if is_copy else plain.replace(".modules_to_save.", "."))
        # With bias="all" the bias of a module that was trained whole is stored twice; PEFT loads the plain name's.
        if plain == name or plain not in renamed:
            renamed[plain] = replace(entry, info=replace(entry.info, name=plain))
    return renamed


def _update(
    base: str, module: str, is_embedding: bool, sides: Mapping[str, Entry], scaling: LoraScaling, where: str
) -> LowRankEntry:
    """The update of one base tensor, its factors checked against each other and against the configuration."""
    missing = {"A", "B"} - sides.keys()
    if missing:
        raise CheckpointError(f"{where} lacks factor {missing.pop()} of {quoted(module)}; save the adapter again")
    # An embedding of shape (num, dim) is updated by (B A)^T = A^T B^T, with A (r x num) and B (dim x r).
    left, right = (sides["A"], sides["B"]) if is_embedding else (sides["B"], sides["A"])
    shapes = left.info.shape, right.info.shape
    if any(len(shape) < 2 or 0 in shape for shape in shapes):
        raise CheckpointError(
            f"{where} holds empty factors of {quoted(module)}, as ZeRO-3 and FSDP leave them; "
            "gather the parameters before saving"
        )
    if is_embedding:
        m, r, inner, n = shapes[0][1], shapes[0][0], shapes[1][1], shapes[1][0]
    else:
        # Convolutions: B is (out, r, 1, 1), A is (r, in, kh, kw).
        m, r, inner, n = shapes[0][0], prod(shapes[0][1:]), shapes[1][0], prod(shapes[1][1:])
    if r != inner:
        raise CheckpointError(
            f"{where} holds factors of {quoted(module)} of shapes {shapes[0]} and {shapes[1]}, which do not multiply "
            f"(a grouped convolution, or damage); {MERGE}"
        )
    rank, c = scaling.of(module)
    if rank != r:
        raise CheckpointError(
            f"{where} holds factors of {quoted(module)} of rank {r}, and its adapter_config.json says {rank}; "
            "the scaling would be a guess: correct rank_pattern"
        )
    dtype = torch.promote_types(left.info.dtype, right.info.dtype)

    def load() -> LowRank:
        first, second = left.load().to(dtype), right.load().to(dtype)
        if is_embedding:
            return LowRank(first.T, second.T, c)  # (num, r), (r, dim)
        return LowRank(first.reshape(m, r), second.reshape(r, n), c)  # (out, r), (r, in*kh*kw)

    return LowRankEntry(LowRankInfo(base, (m, n), r, dtype), load)

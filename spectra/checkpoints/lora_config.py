"""What a PEFT `adapter_config.json` says of LoRA: the scaling of every module, and variants that are no plain B A."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectra.checkpoints.checkpoint import CheckpointError
from spectra.checkpoints.wording import quoted

MERGE = "merge it with merge_and_unload() and give the merged model"

# Options under which the update is not c B A of one weight.
VARIANTS = {
    "use_dora": "DoRA, whose update is not linear in B A",
    "lora_bias": "a LoRA with biases in B (lora_bias)",
    "target_parameters": "a LoRA on parameters in place of modules (target_parameters)",
    "use_qalora": "QALoRA, whose A acts on pooled inputs",
    "kasa_config": "KaSA, which changes the base weights",
    "monteclora_config": "Monteclora, whose factors are random",
    "alora_invocation_tokens": "an activated LoRA, which holds for some tokens only",
    "use_bdlora": "a block-diagonal LoRA",
    "arrow_config": "an Arrow router of several LoRAs",
    "layer_replication": "a LoRA with replicated layers",
}
# Initialisations that subtract B0 A0 from the base: the factors are an update of that base, and not of the original.
CHANGED_BASE = ("pissa", "milora", "olora", "loftq", "corda", "lora_ga", "loraga")


@dataclass(frozen=True)
class LoraScaling:
    """Rank r and scaling c of every adapted module: c = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""

    rank: int
    alpha: float
    is_rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def of(self, module: str) -> tuple[int, float]:
        """(r, c) of the module of this name, within the base model."""
        rank = self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def read_scaling(config: Mapping[str, Any], where: str) -> LoraScaling:
    """The scaling of a plain LoRA adapter.

    Raises `CheckpointError` for other kinds of adapters, for variants whose update is not c B A, and for those whose
    initialisation changed the base.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where} is a PEFT adapter of type {quoted(kind)} and not LORA; {MERGE}")
    for option, name in VARIANTS.items():
        if config.get(option):
            raise CheckpointError(f"{where} is {name}, which is not supported; {MERGE}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise CheckpointError(
            f"{where} was initialised with {quoted(start)}, which changed the base weights: "
            "its factors are not the update of the original base; "
            "save it with path_initial_model_for_weight_conversion, or give the merged model"
        )
    return LoraScaling(
        rank=_number(config.get("r"), "r", where, whole=True),
        alpha=_number(config.get("lora_alpha"), "lora_alpha", where),
        is_rank_stabilised=bool(config.get("use_rslora")),
        rank_pattern=_pattern(config, "rank_pattern", where, whole=True),
        alpha_pattern=_pattern(config, "alpha_pattern", where),
    )


def _matching(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that the module's name ends with, at a dot. Patterns are regular expressions, as in PEFT."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def _pattern(config: Mapping[str, Any], key: str, where: str, *, whole: bool = False) -> dict[str, Any]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where} has a {key} that is no map; save the adapter again")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{where} has the invalid {key} {quoted(pattern)}: {error}; correct it") from error
    return {pattern: _number(value, key, where, whole=whole) for pattern, value in patterns.items()}


def _number(value: Any, key: str, where: str, *, whole: bool = False) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (whole and (value < 1 or value != int(value))):
        raise CheckpointError(f"{where} gives {quoted(value)} as {key}; correct its adapter_config.json")
    return int(value) if whole else float(value)

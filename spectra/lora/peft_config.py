"""What peft is told: the LoraConfig of the adapted modules, and its settings as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import nn

from spectra.errors import SpectraError
from spectra.lora.configuration import SliceConfig
from spectra.lora.layers import Kind
from spectra.lora.peft_folder import CAUSAL, pattern_of, targets_of

if TYPE_CHECKING:
    from peft import LoraConfig

# peft writes it into adapter_config.json when `save_pretrained` is called instead of `save_adapter`. What peft would
# load there is not what was trained; under this name peft refuses to, and so does `open_checkpoint`, both citing it.
UNFINISHED = "pissa-like start, kept apart: save this model with spectra.lora.save_adapter"
_TASK_TYPES = {
    **dict.fromkeys(CAUSAL, "CAUSAL_LM"),
    "ForSequenceClassification": "SEQ_CLS",
}


def require_peft() -> None:
    """Raise SpectraError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise SpectraError(
            f"adapters need the library peft ({error}); install it with pip install 'spectra-weights[train]'"
        ) from error


def lora_config(
    model: nn.Module,
    config: SliceConfig,
    kinds: Mapping[str, Kind],
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
) -> LoraConfig:
    """The LoraConfig that gives each named module of `model` its rank and its scaling, and no other module a LoRA."""
    from peft import LoraConfig

    others = {name for name, _ in model.named_modules() if name} - kinds.keys()
    every = {*kinds, *others}
    is_stable = config.is_rank_stabilised
    alphas = {name: _alpha(scalings[name], rank, is_stable) for name, rank in ranks.items()}
    usual_rank, usual_alpha = (
        Counter(ranks.values()).most_common(1)[0][0],
        Counter(alphas.values()).most_common(1)[0][0],
    )
    return LoraConfig(
        r=usual_rank,
        lora_alpha=usual_alpha,  # type: ignore[arg-type]  # peft takes fractions as well
        rank_pattern={pattern_of(name, every): r for name, r in ranks.items() if r != usual_rank},
        alpha_pattern={pattern_of(name, every): a for name, a in alphas.items() if a != usual_alpha},
        use_rslora=is_stable,
        target_modules=targets_of(kinds, others),
        fan_in_fan_out="conv1d" in kinds.values(),
        lora_dropout=config.dropout,
        modules_to_save=list(config.modules_to_save) or None,
        bias="none",
        task_type=task_type(model, config.modules_to_save),
    )


def task_type(model: nn.Module, saved: Collection[str]) -> str | None:
    """What peft calls the task that a transformers model of this class is for; None where it has no word for it.

    Args: names of the modules that are saved whole.
    """
    name = type(model).__name__ if hasattr(model, "config") else ""
    kind = next((kind for ending, kind in _TASK_TYPES.items() if name.endswith(ending)), None)
    # With SEQ_CLS, peft trains the modules of these names whole, and misses them in an adapter without them.
    heads = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("classifier", "score")}
    return None if kind == "SEQ_CLS" and not (heads and heads <= {*saved}) else kind


def as_json(config: LoraConfig) -> dict[str, Any]:
    """The content of adapter_config.json, the same every time."""
    plain: dict[str, Any] = {}
    for key, value in sorted(config.to_dict().items()):  # type: ignore[no-untyped-call]
        plain[key] = value.value if isinstance(value, Enum) else sorted(value) if isinstance(value, set) else value
    return plain


def _alpha(scaling: float, rank: int, is_stable: bool) -> float:
    """lora_alpha, as an integer where it is one: peft's own type for it."""
    alpha = scaling * (math.sqrt(rank) if is_stable else rank)
    return int(alpha) if alpha == int(alpha) else alpha

"""Which modules of a model are adapted, and why others cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.lora.configuration import ALL_LINEAR, SliceConfig, matches
from spectra.lora.layers import Kind, kind_of, matrix_of
from spectra.lora.peft_config import require_peft
from spectra.matrices.names import block_of, natural
from spectra.matrices.roles import role_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Target:
    """A module that gets factors."""

    name: str
    module: nn.Module
    kind: Kind

    @property
    def stored(self) -> Tensor:
        """The weight as the module stores it."""
        weight: Tensor = self.module.get_parameter("weight").detach()
        return weight

    @property
    def W(self) -> Tensor:
        """The weight as a matrix (m, n)."""
        return matrix_of(self.kind, self.stored)

    @property
    def cost(self) -> int:
        short, long = sorted(self.W.shape)
        return short * short * (long + 4 * short) + 10_000


def choose_targets(model: nn.Module, config: SliceConfig) -> tuple[list[Target], list[str]]:
    """The modules to adapt, in the model's order, and what was chosen where the configuration leaves it open.

    Raises: SpectraError for a pattern that matches nothing, for a module that carries no LoRA, for a model without any
        module to adapt.
    """
    named = dict(model.named_modules())
    notes: list[str] = []
    asked = config.target_modules
    if asked is None:
        names, note = _usual(model, named)
        notes.append(note)
    elif asked == ALL_LINEAR:
        names, note = _all_linear(model, named)
        notes.append(note)
    else:
        patterns = [asked] if isinstance(asked, str) else list(asked)
        require_sense("target_modules", patterns, named)
        names = [name for name in named if name and any(matches(pattern, name) for pattern in patterns)]
    require_sense("exclude", config.exclude, named)
    names = [name for name in names if not any(matches(pattern, name) for pattern in config.exclude)]
    if not names:
        raise SpectraError(f"no module of {type(model).__name__} is left to adapt; exclude less")
    for kind in ("rank_pattern", "alpha_pattern", "start_pattern", "position_pattern"):
        require_sense(kind, getattr(config, kind), names)
    saved = [name for name in names if any(_is_in(name, whole) for whole in config.modules_to_save)]
    if saved:
        raise SpectraError(f"{saved[0]!r} is to be adapted and to be trained whole (modules_to_save); exclude it")
    require_sense("modules_to_save", config.modules_to_save, named)
    ties = tied_names(model)
    for name in names:
        if reason := why_not(name, named, ties):
            raise SpectraError(f"{name!r} carries no LoRA: {reason}")
    return [Target(name, named[name], _kind(named[name])) for name in names], notes


def require_sense(kind: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise SpectraError for a pattern that matches none of the names, which is always a slip."""
    names = [name for name in names if name]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            few = ", ".join(repr(name) for name in sorted(names, key=natural)[-3:])
            raise SpectraError(
                f"the pattern {pattern!r} of {kind} matches no module (names look like {few}); "
                "give a glob on a module's name or on the end of it, such as '*.query'"
            )


def why_not(name: str, named: Mapping[str, nn.Module], ties: Mapping[str, str]) -> str:
    """Why a module of this name carries no LoRA, with a remedy; "" where it does."""
    module = named[name]
    kind = kind_of(module)
    class_name = type(module).__name__
    if kind is None:
        return (
            f"a {class_name}, and only Linear, Conv1D, Embedding and Conv2d do; name what is inside it, or exclude it"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        return f"the weight of this {class_name} is computed from others; remove the parametrisation, or exclude it"
    if weight.is_meta:
        return "its weight is on the meta device; load the weights first"
    if weight.dtype not in DTYPES or weight.ndim < 2:
        stored = str(weight.dtype).removeprefix("torch.")
        return f"its weight is stored as {stored}; load the model without quantisation, or exclude it"
    if name in ties:
        return f"it shares its weight with {ties[name]!r}, which would not follow; untie the two, or exclude it"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an embedding with max_norm changes its own factors in use; set it to None, or exclude it"
    if isinstance(module, nn.Conv2d) and not _is_plain(module):
        return "a Conv2d with groups, dilation or padding other than zeros, which peft's LoRA leaves out; exclude it"
    parent = named.get(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads the weight and not the module, so that a LoRA has no effect; exclude it"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "the fast path of TransformerEncoderLayer passes it by in evaluation; "
            "call torch.backends.mha.set_fastpath_enabled(False) first"
        )
    return ""


def tied_names(model: nn.Module) -> dict[str, str]:
    """Modules whose weight is another module's, too: name -> the other's name."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            # Some models tie by making two parameters of one storage.
            owners.setdefault(parameter.data_ptr() or id(parameter), []).append(name.removesuffix(".weight"))
    return {
        name: next(other for other in names if other != name)
        for names in owners.values()
        if len({*names}) > 1
        for name in names
    }


def _kind(module: nn.Module) -> Kind:
    kind = kind_of(module)
    assert kind is not None
    return kind


def _is_plain(module: nn.Conv2d) -> bool:
    return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"


def _is_in(name: str, whole: str) -> bool:
    return re.search(rf"(^|\.){re.escape(whole)}(\.|$)", name) is not None


def _usual(model: nn.Module, named: Mapping[str, nn.Module]) -> tuple[list[str], str]:
    """What peft adapts in a model of this type, and what to say of it; all linear layers where it has no opinion."""
    require_peft()
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    usual: Sequence[str] | str | None = USUAL.get(model_type) if isinstance(model_type, str) else None
    if usual is not None:
        if isinstance(usual, str):
            names = [name for name in named if re.fullmatch(usual, name)]
        else:
            names = [name for name in named if any(name == end or name.endswith(f".{end}") for end in usual)]
        if names:
            words = usual if isinstance(usual, str) else ", ".join(usual)
            return names, f"adapting {words}, which peft adapts in models of type {model_type}: {len(names)} modules"
    return _all_linear(model, named)


def _all_linear(model: nn.Module, named: Mapping[str, nn.Module]) -> tuple[list[str], str]:
    """All linear layers that can be adapted, but for the head."""
    ties = tied_names(model)
    heads = {*_heads(model, named)}
    linear = [name for name in named if kind_of(named[name]) in ("linear", "conv1d")]
    names = [name for name in linear if name not in heads and not why_not(name, named, ties)]
    if not names:
        raise SpectraError(
            f"{type(model).__name__} has no linear layer that carries a LoRA, apart from heads; name target_modules"
        )
    left = [name for name in linear if name not in {*names}]
    without = f", without {', '.join(left[:3])}{' and others' if len(left) > 3 else ''}" if left else ""
    return names, f"adapting all linear layers{without}: {len(names)} modules"


def _heads(model: nn.Module, named: Mapping[str, nn.Module]) -> Iterator[str]:
    """Names of linear layers that are heads: the model's own output embeddings, and what is called one."""
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in named.items():
        weight = f"{name}.weight"
        in_block = block_of(weight) is not None
        if module is output or (
            isinstance(module, nn.Linear) and role_of(weight, is_kernel=False, is_in_block=in_block) == "head"
        ):
            yield name

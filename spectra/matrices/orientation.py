"""Which tensors are stored in x out: GPT-2's `Conv1D`, transposed convolutions, some stacks of experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Protocol

import torch

from spectra.matrices.names import block_of, family, unwrapped

_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D = re.compile(r"(?:^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")
_TRANSPOSED_KERNEL = re.compile(r"(conv_?transpose|transposed?_?conv|deconv|up_?conv)", re.IGNORECASE)
_EXPERTS = re.compile(r"(?:^|\.)\w*(?:experts|moe)\w*\.")
_EXPERT_PARAMETERS = frozenset({"gate_up_proj", "down_proj", "gate_proj", "up_proj", "w1", "w2", "w3"})
_IN_OUT_EXPERT_MODELS = frozenset({"gpt_oss", "llama4", "llama4_text"})


class TensorLike(Protocol):
    """What is read of a tensor before it is loaded."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


def models_in(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config, and those of the models inside it (`text_config`, `encoder`, ...)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping) and "model_type" in value:
            yield from models_in(value)


def is_expert_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds one matrix per expert: three dimensions, under a name of experts."""
    if len(shape) != 3:
        return False
    plain = unwrapped(name).removesuffix(".weight")
    return _EXPERTS.search(plain) is not None or plain.rpartition(".")[2] in _EXPERT_PARAMETERS


def transposed_tensors(
    tensors: Mapping[str, TensorLike], config: Mapping[str, Any], override: Sequence[str] | None = None
) -> dict[str, bool]:
    """Whether each tensor of two and more dimensions is stored in x out, for those where something decides it.

    With `override` (globs on tensor names) exactly the tensors that match are. Otherwise a `Conv1D` name is decided
    by what is seen before what is claimed: the length of its bias or the shape of `c_attn` (d x 3d or 3d x d); the same
    of its neighbours in a stack of blocks; the model type in `config`; whether an MLP matrix grows or shrinks. A
    transposed convolution is known by its bias or by its name: a kernel of as many inputs as outputs without either is
    read as an ordinary one. A stack of experts is decided by the shapes beside it, then by the model type.
    """
    if override is not None:
        return {
            name: any(fnmatchcase(name, pattern) for pattern in override)
            for name, info in tensors.items()
            if len(info.shape) >= 2
        }
    answers: dict[str, bool | None] = {}
    conv1d: dict[str, str] = {}
    for name, info in tensors.items():
        dimensions = len(info.shape)
        if dimensions > 2:
            is_stack = is_expert_stack(name, info.shape)
            answers[name] = _experts(name, tensors, config) if is_stack else _kernel(name, tensors)
        elif dimensions == 2 and (leaf := _conv1d_leaf(family(unwrapped(name)))):
            conv1d[name] = leaf
    answers |= _conv1d(conv1d, tensors, config)
    return {name: answer for name, answer in answers.items() if answer is not None}


@cache
def _conv1d_leaf(plain: str) -> str | None:
    found = _CONV1D.search(plain)
    return found[1] if found else None


def _conv1d(
    leaves: Mapping[str, str], tensors: Mapping[str, TensorLike], config: Mapping[str, Any]
) -> dict[str, bool | None]:
    """Decide the tensors that are named as GPT-2's are, each by the first of the rules that can."""
    blocks = {name: block_of(name) for name in leaves}
    stacks = {name: "" if block is None else block.stack for name, block in blocks.items()}
    answers = {name: _seen(name, leaf, tensors) for name, leaf in leaves.items()}
    claimed = _claimed(config)
    grown = {name: _grown(leaf, tensors[name].shape) for name, leaf in leaves.items()}
    fallbacks: tuple[Mapping[str, bool | None], ...] = (dict.fromkeys(leaves, claimed), grown, {})
    for fallback in fallbacks:
        votes: dict[str, set[bool]] = {}
        for name, answer in answers.items():
            if answer is not None:
                votes.setdefault(stacks[name], set()).add(answer)
        for name, answer in answers.items():
            if answer is None:
                vote = votes.get(stacks[name], set())
                answers[name] = next(iter(vote)) if len(vote) == 1 else fallback.get(name)
    return answers


def _seen(name: str, leaf: str, tensors: Mapping[str, TensorLike]) -> bool | None:
    first, second = tensors[name].shape
    if first != second and (outputs := _bias_length(name, tensors)) in (first, second):
        return outputs == second
    if leaf == "c_attn" and max(first, second) in (2 * min(first, second), 3 * min(first, second)):
        return second > first
    return None


def _claimed(config: Mapping[str, Any]) -> bool | None:
    types = [model["model_type"] for model in models_in(config) if "model_type" in model]
    if not any(kind in _CONV1D_MODELS for kind in types):
        return False if types else None
    # Of a model made of several, only some may be of a type that stores in x out.
    return True if types[0] in _CONV1D_MODELS else None


def _grown(leaf: str, shape: tuple[int, ...]) -> bool | None:
    """An MLP's c_fc has more outputs than inputs, its c_proj fewer."""
    if shape[0] == shape[1] or leaf not in ("c_fc", "c_proj"):
        return None
    return (shape[1] > shape[0]) == (leaf == "c_fc")


def _bias_length(name: str, tensors: Mapping[str, TensorLike]) -> int | None:
    bias = tensors.get(name.removesuffix("weight") + "bias")
    return bias.shape[0] if bias is not None and len(bias.shape) == 1 else None


def _kernel(name: str, tensors: Mapping[str, TensorLike]) -> bool | None:
    first, second = tensors[name].shape[:2]
    if first != second and (outputs := _bias_length(name, tensors)) in (first, second):
        return outputs == second
    return True if _TRANSPOSED_KERNEL.search(name) else None


def _experts(name: str, tensors: Mapping[str, TensorLike], config: Mapping[str, Any]) -> bool | None:
    """By the shapes beside it: gate_up is (2f, d) and down (d, f) out x in, and (d, 2f) and (f, d) in x out."""
    stem = name.removesuffix(".weight")
    parent, _, leaf = stem.rpartition(".")
    shape = tensors[name].shape[1:]
    gate_up, down = (
        next((tensors[sibling].shape[1:] for sibling in siblings if sibling in tensors), None)
        for siblings in (
            [f"{parent}.{word}{end}" for word in ("gate_up_proj", "input_linear") for end in ("", ".weight")],
            [f"{parent}.{word}{end}" for word in ("down_proj", "output_linear") for end in ("", ".weight")],
        )
    )
    if gate_up is not None and down is not None and len(gate_up) == len(down) == 2:
        is_out_in = gate_up[0] == 2 * down[1] and gate_up[1] == down[0]
        is_in_out = gate_up[1] == 2 * down[0] and gate_up[0] == down[1]
        if is_out_in != is_in_out:
            return is_in_out
    bias = tensors.get(f"{stem}_bias")
    if bias is not None and shape[0] != shape[1] and bias.shape[-1] in shape:
        return bool(bias.shape[-1] == shape[1])
    widths = {model.get("hidden_size") for model in models_in(config)}
    if (shape[0] in widths) != (shape[1] in widths):
        takes_width = leaf not in ("down_proj", "w2", "output_linear")
        return (shape[0] in widths) == takes_width
    types = {model.get("model_type") for model in models_in(config)}
    return True if types & _IN_OUT_EXPERT_MODELS else None

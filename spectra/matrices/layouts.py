"""How a fused tensor is divided into its parts: q | k | v in their layouts, gate | up, the gates of an LSTM or GRU.

The layouts are those of the models' own definitions; no rule is believed before it explains the number of rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spectra.matrices.matrix import RowBlocks
from spectra.matrices.names import unwrapped
from spectra.matrices.orientation import TensorLike, models_in

_RECURRENT = re.compile(r"weight_(?:ih|hh)(?P<suffix>(?:_l\d+)?(?:_reverse)?)$")
_GATES = {1: (), 3: ("r", "z", "n"), 4: ("i", "f", "g", "o")}
_GATE_UP = frozenset({"gate_up_proj", "input_linear", "w12", "weights_in"})
_KEY_VALUE = frozenset({"to_kv", "kv"})
_PER_HEAD_MODELS = frozenset(
    {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "minimax", "deberta", "gpt_bigcode", "chatglm"}
)
_FALCON_MODELS = frozenset({"falcon", "RefinedWeb", "RefinedWebModel"})
_CODEGEN_SHARDS = 4  # CodeGen kept the order of the four devices it was trained on

UNKNOWN_LAYOUT = "kept whole, for how its q, k and v lie is not known"


@dataclass(frozen=True)
class Part:
    """A part of a fused matrix: its name in brackets, its role, its rows."""

    name: str
    role: str
    block: RowBlocks


@dataclass(frozen=True)
class Heads:
    """h query heads and g key and value heads of size d."""

    h: int
    g: int
    d: int

    @property
    def rows(self) -> int:
        return (self.h + 2 * self.g) * self.d


def parts_of(
    name: str, role: str, rows: int, columns: int, tensors: Mapping[str, TensorLike], config: Mapping[str, Any]
) -> tuple[tuple[Part, ...], str]:
    """The parts of a matrix of rows x columns (out x in), none where it is one whole; and what had to be left undone.

    Every row belongs to exactly one part.
    """
    plain = unwrapped(name).removesuffix(".weight")
    leaf = plain.rpartition(".")[2].lower()
    if role == "recurrent":
        return _gates(name, rows, tensors)
    if leaf in _GATE_UP and rows % 2 == 0:
        interleaved = any(model.get("model_type") == "gpt_oss" for model in models_in(config))
        cut = _per_group(rows // 2, 1, 1) if interleaved else _runs(rows // 2, rows // 2)
        return _named(cut, ("gate", "up"), ("mlp_gate", "mlp_up")), ""
    if role == "qkv":
        parts = _attention(leaf, rows, columns, config)
        return parts, "" if parts or leaf in ("kv_a_proj_with_mqa", "kv_proj") else UNKNOWN_LAYOUT
    return (), ""


def _attention(leaf: str, rows: int, columns: int, config: Mapping[str, Any]) -> tuple[Part, ...]:
    if leaf == "kv_b_proj":
        return _latent_key_value(rows, config)
    if rows % 2 == 0 and (leaf in _KEY_VALUE or (leaf == "c_attn" and rows == 2 * columns)):
        return _named(_runs(rows // 2, rows // 2), ("k", "v"), ("key", "value"))
    for model in models_in(config):
        if cut := _by_config(leaf, rows, columns, model):
            return cut
    # Without a config, three equal runs are what every model of these names has, except where heads may be interleaved.
    if leaf in ("query_key_value", "in_proj"):
        return ()
    is_thirds = rows == 3 * columns or (
        rows % 3 == 0 and leaf in ("qkv", "to_qkv", "in_proj_weight") and columns != rows
    )
    return _query_key_value(_runs(*[rows // 3] * 3)) if is_thirds and not _may_be_interleaved(config) else ()


def _may_be_interleaved(config: Mapping[str, Any]) -> bool:
    kind = config.get("model_type")
    return kind in _PER_HEAD_MODELS | _FALCON_MODELS | {"codegen", "internlm2"}


def _by_config(leaf: str, rows: int, columns: int, model: Mapping[str, Any]) -> tuple[Part, ...]:
    heads = _heads(model)
    kind = model.get("model_type")
    if heads is None or _width(model) != columns:
        return ()
    each = heads.h * heads.d
    if kind == "codegen" and rows == 3 * each and heads.h % _CODEGEN_SHARDS == 0:
        size = each // _CODEGEN_SHARDS
        query, value, key = _per_group(_CODEGEN_SHARDS, size, size, size)
        return _query_key_value([query, key, value])
    if kind in _PER_HEAD_MODELS and rows == 3 * each:
        return _query_key_value(_per_group(heads.h, heads.d, heads.d, heads.d))
    if kind in _FALCON_MODELS and not model.get("new_decoder_architecture"):
        if rows == each + 2 * heads.d:
            return _query_key_value(_runs(each, heads.d, heads.d))
        return _query_key_value(_per_group(heads.h, heads.d, heads.d, heads.d)) if rows == 3 * each else ()
    if kind in _FALCON_MODELS | {"internlm2"}:
        if rows != heads.rows or heads.h % heads.g:
            return ()
        return _query_key_value(_per_group(heads.g, heads.h // heads.g * heads.d, heads.d, heads.d))
    if leaf == "query_key_value" and kind != "chatglm":
        return ()
    if kind == "gpt_bigcode" and rows == each + 2 * heads.d:
        return _query_key_value(_runs(each, heads.d, heads.d))
    if rows == heads.rows:
        return _query_key_value(_runs(each, heads.g * heads.d, heads.g * heads.d))
    return ()


def _width(model: Mapping[str, Any]) -> int | None:
    return _first(model, "hidden_size", "n_embd", "d_model", "n_embed", "dim")


def _heads(model: Mapping[str, Any]) -> Heads | None:
    width = _width(model)
    h = _first(model, "num_attention_heads", "n_head", "n_heads", "num_heads")
    if not width or not h:
        return None
    inner = model.get("attn_config")
    nested = _first(inner, "kv_n_heads") if isinstance(inner, Mapping) else None
    g = nested or _first(model, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num") or h
    d = _first(model, "head_dim", "kv_channels") or width // h
    return Heads(h, g, d)


def _first(model: Mapping[str, Any], *keys: str) -> int | None:
    return next((model[key] for key in keys if isinstance(model.get(key), int)), None)


def _latent_key_value(rows: int, config: Mapping[str, Any]) -> tuple[Part, ...]:
    """DeepSeek's multi-head latent attention: per head, a key without position and a value."""
    for model in models_in(config):
        h = _first(model, "num_attention_heads")
        key, value = _first(model, "qk_nope_head_dim"), _first(model, "v_head_dim")
        if h and key and value and rows == h * (key + value):
            return _named(_per_group(h, key, value), ("k", "v"), ("key", "value"))
    return ()


def _gates(name: str, rows: int, tensors: Mapping[str, TensorLike]) -> tuple[tuple[Part, ...], str]:
    """The gates of a recurrent layer, whose number is the rows over the hidden size that `weight_hh` takes in.

    With a projection (`proj_size`) the hidden size is what `weight_hr` takes in instead.
    """
    found = _RECURRENT.search(name)
    if found is None:
        return (), ""
    prefix, suffix = name[: found.start()], found["suffix"]
    source = tensors.get(f"{prefix}weight_hr{suffix}") or tensors.get(f"{prefix}weight_hh{suffix}")
    hidden = source.shape[1] if source is not None and len(source.shape) == 2 else 0
    gates = rows // hidden if hidden and rows % hidden == 0 else 0
    if gates not in _GATES:
        return (), "kept whole, for the number of its gates is not known"
    return _named(_runs(*[hidden] * gates), _GATES[gates], ("recurrent",) * gates) if gates > 1 else (), ""


def _runs(*sizes: int) -> list[RowBlocks]:
    """Consecutive runs of rows."""
    return _per_group(1, *sizes)


def _per_group(groups: int, *sizes: int) -> list[RowBlocks]:
    """In each of `groups` groups, consecutive runs of these sizes."""
    size = sum(sizes)
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    return [RowBlocks(groups, size, start, start + length) for start, length in zip(starts, sizes, strict=True)]


def _query_key_value(blocks: list[RowBlocks]) -> tuple[Part, ...]:
    return _named(blocks, ("q", "k", "v"), ("query", "key", "value"))


def _named(blocks: list[RowBlocks], names: tuple[str, ...], roles: tuple[str, ...]) -> tuple[Part, ...]:
    return tuple(Part(name, role, block) for name, role, block in zip(names, roles, blocks, strict=True))

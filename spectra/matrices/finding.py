"""Every weight matrix of a checkpoint, from its header alone; and every tensor that holds none, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import torch

from spectra.matrices.layouts import Part, parts_of
from spectra.matrices.matrix import Matrix
from spectra.matrices.names import block_of, family, natural, number_layers, unwrapped
from spectra.matrices.orientation import TensorLike, is_expert_stack, transposed_tensors
from spectra.matrices.roles import ROLES, role_of

_READABLE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    | {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
)
_ROLE_PLACES = {role: place for place, role in enumerate(ROLES)}
# Later words of the table would also match names that earlier ones explain better. As in the table of roles, no rule
# reads which number stands between two dots.
_NOT_WEIGHTS = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"(^|\.)(\w*_)?(mask|attn_mask|causal_mask|weight_mask)$|masked_bias$", "a mask"),
        (r"(^|\.)(cos_cached|sin_cached|freqs_\w+|inv_freq)$", "a table of rotary angles"),
        (r"(^|\.)(relative_position_index|relative_coords_table|position_ids|token_type_ids)$", "a table of indices"),
        (r"(^|\.)running_(mean|var)$|num_batches_tracked$", "running statistics of a normalisation"),
        (r"weight_scale(_inv)?$|(^|\.)(scales|input_scale)$", "a scale of quantised values"),
        (
            r"(^|\.)weight_[gv]$|parametrizations\.\w+\.original[01]$",
            "a factor of a weight-normalised weight, which is g v / ||v||: remove the weight norm to compare it",
        ),
        (
            r"(^|\.)weight_orig$|parametrizations\.\w+\.original$",
            "the stored parameter of a reparametrised or pruned weight: make the weight itself permanent to compare it",
        ),
        (r"(^|\.)(\w+_)?(cls|mask|class|dist|register)_?(token|emb)s?$|class_embedding$", "a learned token: a vector"),
    )
)


def find_matrices(
    tensors: Mapping[str, TensorLike], config: Mapping[str, Any], transposed: Sequence[str] | None = None
) -> tuple[list[Matrix], dict[str, str]]:
    """The weight matrices in `tensors`, in reading order, and the tensors that hold none: name -> reason.

    Args:
        tensors: name -> shape and dtype, as a header gives them. Their order does not matter.
        config: the model's `config.json`; empty where there is none.
        transposed: globs on tensor names: exactly these are stored in x out. None: decided by bias, shape, model type
            and name (see `transposed_tensors`).

    Rules: two dimensions are out x in. Three and more are a kernel, out x (in height width), except for a stack of
    experts and for a leading dimension of 1 of what is no kernel (ViT's position embeddings). Fused projections are
    divided.

    >>> from spectra.checkpoints import open_checkpoint
    >>> state = torch.nn.LSTM(3, 2).state_dict()
    >>> matrices, left_out = find_matrices(open_checkpoint(state).tensors, {})
    >>> [(matrix.name, matrix.rows, matrix.columns) for matrix in matrices][3:5]
    [('weight_hh_l0[o]', 2, 2), ('weight_ih_l0[i]', 2, 3)]
    >>> left_out["bias_ih_l0"]
    'a vector: it has no singular basis'
    """
    return divide(tensors, config, transposed_tensors(tensors, config, transposed))


def divide(
    tensors: Mapping[str, TensorLike], config: Mapping[str, Any], is_transposed: Mapping[str, bool]
) -> tuple[list[Matrix], dict[str, str]]:
    """What `find_matrices` returns, where `transposed_tensors` was asked before."""
    layers = number_layers(tensors)
    matrices: list[Matrix] = []
    left_out: dict[str, str] = {}
    for name, info in tensors.items():
        if reason := _why_not(name, info):
            left_out[name] = reason
        else:
            matrices.extend(_matrices_in(name, tensors, config, layers[name], is_transposed.get(name, False)))
    return in_reading_order(matrices), left_out


def in_reading_order(matrices: Iterable[Matrix]) -> list[Matrix]:
    """Embeddings; the blocks (encoder before decoder, 9 before 10, attention before MLP); heads and the rest."""

    return sorted(matrices, key=reading_place)


def reading_place(matrix: Matrix) -> tuple[Any, ...]:
    """A key that sorts matrices in reading order."""
    block = block_of(matrix.tensor)
    is_embedding = matrix.layer is None and matrix.role in ("token_embedding", "position_embedding", "conv")
    section = 0 if is_embedding else 2 if matrix.layer is None else 1
    stack = "" if block is None or section != 1 else block.stack
    role = _ROLE_PLACES[matrix.role]
    start = 0 if matrix.block is None else matrix.block.start
    tensor = natural(matrix.tensor)
    name = tensor if matrix.name == matrix.tensor else natural(matrix.name)
    return (
        section,
        "decoder" in stack,
        natural(stack),
        matrix.layer or 0,
        role,
        (tensor, matrix.index or 0, start, name),
    )


def _why_not(name: str, info: TensorLike) -> str | None:
    """Why a tensor is no weight matrix; None where it is one."""
    shape, dtype = info.shape, info.dtype
    if dtype is torch.bool:
        return "a boolean buffer"
    if dtype.is_complex:
        return "complex values, for which no comparison is defined here"
    if dtype not in _READABLE:
        return f"no floating-point weights ({str(dtype).removeprefix('torch.')})"
    if 0 in shape:
        return "an empty tensor"
    plain = unwrapped(name)
    if plain.endswith((".bias", "_bias")) and len(shape) >= 2:
        is_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
        return "a causal mask" if is_mask else "a bias: it has no singular basis"
    if reason := _no_weight(family(plain)):
        return reason
    if len(shape) < 2:
        return "a vector: it has no singular basis" if shape else "a single number"
    if len(shape) > 2 and max(shape) == prod(shape) and not plain.endswith("weight"):
        return "a vector: it has no singular basis"
    return None


@cache
def _no_weight(plain: str) -> str | None:
    """What a family of names says that its tensors are, where that is no weight."""
    return next((reason for pattern, reason in _NOT_WEIGHTS if pattern.search(plain)), None)


def _matrices_in(
    name: str, tensors: Mapping[str, TensorLike], config: Mapping[str, Any], layer: int | None, is_transposed: bool
) -> list[Matrix]:
    shape = tensors[name].shape
    is_experts = is_expert_stack(name, shape)
    is_weight = unwrapped(name).endswith("weight")
    is_table = len(shape) > 2 and shape[0] == 1 and not is_weight and not is_experts
    inner = shape[1:] if is_experts or is_table else shape
    if is_transposed:
        inner = (inner[1], inner[0], *inner[2:])
    rows, columns = inner[0], prod(inner[1:])
    is_kernel = len(inner) > 2
    role = role_of(name, is_kernel=is_kernel and is_weight, is_in_block=layer is not None)
    parts: tuple[Part, ...] = ()
    note = ""
    if not is_kernel:
        parts, note = parts_of(name, role, rows, columns, tensors, config)
    elif not is_weight:
        note = f"of unknown layout {tuple(shape)}, read as {rows} x {columns}"
    whole = Matrix(
        name=name,
        tensor=name,
        part="",
        role=role,
        layer=layer,
        rows=rows,
        columns=columns,
        index=0 if is_table else None,
        is_transposed=is_transposed,
        note=note,
    )
    stack = [replace(whole, part=str(e), index=e) for e in range(shape[0])] if is_experts else [whole]
    divided = [
        replace(
            matrix,
            part=".".join(filter(None, (matrix.part, part.name))),
            role=part.role,
            rows=part.block.count,
            block=part.block,
        )
        for matrix in stack
        for part in parts
    ]
    return [replace(matrix, name=f"{name}[{matrix.part}]") if matrix.part else matrix for matrix in divided or stack]

"""Which rows and columns of a weight belong to which attention heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.errors import SpectraError
from spectra.matrices import Matrix
from spectra.matrices.orientation import models_in

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Mask = NDArray[np.bool_]

OUTPUTS = frozenset({"query", "key", "value"})
UNKNOWN = "how the heads lie in it is not known"
SHARED = "a key and value go back only with all heads that share them"


def head_entries(
    matrix: Matrix, config: Mapping[str, Any], heads: Sequence[int], size: int | None = None
) -> tuple[Mask, Mask] | str:
    """The rows (m,) and columns (n,) of the heads in one matrix; or why it has none, in words.

    Args: config: the model's, for the number and size of heads; size: d, where it does not say or says otherwise.
    Raises: SpectraError for heads that the matrix does not have, and where their size is not known.
    """
    rows, columns = np.zeros(matrix.rows, np.bool_), np.zeros(matrix.columns, np.bool_)
    if matrix.role == "qkv":
        return UNKNOWN
    if matrix.role not in OUTPUTS | {"attention_output"}:
        return "has no heads"
    here, shared, size = _layout(matrix, config, size)
    if wrong := [head for head in heads if head >= here * shared]:
        raise SpectraError(f"{matrix.name!r} has heads 0 to {here * shared - 1}, and head {wrong[0]} was asked for")
    for group in range(here):
        if all(head in heads for head in range(group * shared, (group + 1) * shared)):
            (rows if matrix.role in OUTPUTS else columns)[group * size : (group + 1) * size] = True
    return rows, columns


def shared_heads(matrix: Matrix, config: Mapping[str, Any], heads: Sequence[int], size: int | None = None) -> list[int]:
    """Which of the heads stay in a key or value matrix, for they share it with others that are not named.

    Arguments and errors as of `head_entries`, where that finds rows or columns.
    """
    here, shared, _ = _layout(matrix, config, size)
    groups = [range(group * shared, (group + 1) * shared) for group in range(here)]
    return sorted({head for group in groups for head in heads if head in group and not {*group} <= {*heads}})


def _layout(matrix: Matrix, config: Mapping[str, Any], size: int | None) -> tuple[int, int, int]:
    """How many heads a matrix has, how many query heads read each of them, and their size."""
    count, known = _count_and_size(config, matrix)
    size = size or known
    if size is None:
        raise SpectraError(
            f"the size of the heads of {matrix.name!r} is not known, for there is no config.json that says it; "
            "give the size"
        )
    length = matrix.rows if matrix.role in OUTPUTS else matrix.columns
    if length % size:
        raise SpectraError(f"{matrix.name!r} has {length} {_side(matrix)}, which heads of size {size} do not fill")
    here = length // size
    return here, max(count or here, here) // here, size


def _side(matrix: Matrix) -> str:
    return "rows" if matrix.role in OUTPUTS else "columns"


def _count_and_size(config: Mapping[str, Any], matrix: Matrix) -> tuple[int | None, int | None]:
    """The number and the size of the query heads that the config gives to a model of this matrix's width."""
    for model in models_in(config):
        width = next((model[key] for key in ("hidden_size", "n_embd", "d_model", "dim") if key in model), None)
        keys = ("num_attention_heads", "n_head", "n_heads", "num_heads")
        count = next((model[key] for key in keys if isinstance(model.get(key), int)), None)
        if count and isinstance(width, int) and width in (matrix.rows, matrix.columns):
            size = model.get("head_dim") or model.get("d_kv") or width // count
            return count, size if isinstance(size, int) else None
    return None, None

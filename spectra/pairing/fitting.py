"""Whether a tuned tensor holds the same matrices as its base partner: wholly, transposed, or on the first rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from spectra.matrices import Matrix, RowBlocks

_RELATIVE = re.compile(r"(^|[._])rel(ative)?_")
_VISION = re.compile(r"(^|[._])(vision|visual|image|img|vit|patch)", re.IGNORECASE)


class Misfit(Exception):
    """The two tensors cannot be compared; the text is the reason."""


@dataclass(frozen=True)
class Fit:
    """A base matrix and its counterpart, cut to their common rows; `rest` is what was cut off: (side, reason)."""

    base: Matrix
    tuned: Matrix
    note: str = ""
    rest: tuple[str, str] | None = None


def fit(
    matrices: list[Matrix],
    base: tuple[int, ...],
    tuned: tuple[int, ...],
    *,
    is_transposed: bool | None,
    vocabulary: int | None,
) -> list[Fit]:
    """The matrices of one base tensor beside their counterparts in a tuned tensor.

    Args:
        matrices: what the base tensor of shape `base` holds.
        tuned: shape of the tuned tensor.
        is_transposed: whether that one is stored in x out; None where nothing decides it: then it is as the base is.
        vocabulary: how many words the base knows; a head of as many rows is one that grows with the vocabulary.

    Raises `Misfit` where the two do not hold the same matrices.
    """
    first = matrices[0]
    turned = first.is_transposed if is_transposed is None else is_transposed
    note = ""
    if turned != first.is_transposed:
        note = f"stored {_way(first.is_transposed)} in the base and {_way(turned)} in the tuned checkpoint"
    if tuned == _stored(base, first, turned):
        if turned == first.is_transposed:
            return [Fit(matrix, matrix) for matrix in matrices]
        return [Fit(matrix, replace(matrix, is_transposed=turned), note) for matrix in matrices]
    is_plain = len(matrices) == 1 and len(base) == len(tuned) == 2 and not turned and not first.is_transposed
    if is_plain and base[1] == tuned[1] and _grows(first, vocabulary):
        return [common_rows(first, tuned[0])]
    shapes = f"shaped {_times(base)} in the base and {_times(tuned)} in the tuned checkpoint"
    if len(base) == 2 and tuned == base[::-1]:
        shapes += ": one is the other transposed; name those stored in x out with `transposed`"
    elif first.role == "position_embedding" and base[1:] == tuned[1:]:
        shapes += ": positions that were resized do not answer to each other row by row"
    raise Misfit(shapes)


def fit_update(matrices: list[Matrix], update: tuple[int, int]) -> list[Fit]:
    """The matrices of one base tensor beside their rows in an update D of `update` shape (out x in).

    Raises `Misfit` where the update is not of their shape.
    """
    first = matrices[0]
    rows = sum(matrix.rows for matrix in matrices)
    if update == (rows, first.columns):
        return [Fit(matrix, matrix) for matrix in matrices]
    if len(matrices) == 1 and update[1] == first.columns and first.role in ("token_embedding", "head"):
        return [common_rows(first, update[0])]
    raise Misfit(f"{_times(update)}, and the base's tensor is {_times((rows, first.columns))} (out x in)")


def common_rows(matrix: Matrix, tuned_rows: int) -> Fit:
    """A base matrix and a tuned one of another number of rows, both cut to the rows that they share."""
    common = min(matrix.rows, tuned_rows)
    more, side, other = (matrix.rows, "base", "tuned") if matrix.rows > common else (tuned_rows, "tuned", "base")
    if more == common:
        return Fit(matrix, matrix)
    base, tuned = (
        replace(matrix, rows=common, block=RowBlocks(groups=1, size=rows, start=0, stop=common))
        for rows in (matrix.rows, tuned_rows)
    )
    note = f"compared on the first {common} rows: the base has {matrix.rows}, the tuned checkpoint {tuned_rows}"
    last = f"row {common} has" if more == common + 1 else f"rows {common} to {more - 1} have"
    return Fit(base, tuned, note, (side, f"{last} no counterpart in the {other} checkpoint"))


def _grows(matrix: Matrix, vocabulary: int | None) -> bool:
    """Whether the rows are a table's entries, so that row i means the same after some were added or taken away."""
    if matrix.role == "position_embedding":
        is_learned_table = matrix.tensor.endswith(".weight") and not _RELATIVE.search(matrix.tensor)
        return is_learned_table and not _VISION.search(matrix.tensor)
    return matrix.role == "token_embedding" or (matrix.role == "head" and matrix.rows == vocabulary)


def _stored(base: tuple[int, ...], matrix: Matrix, is_transposed: bool) -> tuple[int, ...]:
    """The shape in which the base's tensor would be stored, were it `is_transposed`."""
    if is_transposed == matrix.is_transposed:
        return base
    at = 0 if matrix.index is None else 1
    return (*base[:at], base[at + 1], base[at], *base[at + 2 :])


def _way(is_transposed: bool) -> str:
    return "in x out" if is_transposed else "out x in"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

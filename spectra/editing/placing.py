"""Edited matrices back into where they came from: a part of a stored tensor, or of a module's factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectra.linalg.lowrank import LowRank
from spectra.matrices import Matrix


def put(matrix: Matrix, part: Tensor, W: Tensor) -> None:
    """Write W (m x n) into `part`, which is `tensor[matrix.place]`: the inverse of `Matrix.arrange`, in place.

    Entries of other matrices in the part (interleaved heads) keep their bits.

    >>> matrix = Matrix("c.weight", "c.weight", "", "other", None, rows=2, columns=3, is_transposed=True)
    >>> stored = torch.zeros(3, 2)
    >>> put(matrix, stored, torch.arange(6.0).reshape(2, 3))
    >>> stored.tolist()
    [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    view = part.transpose(0, 1) if matrix.is_transposed else part  # (all rows, ...)
    if matrix.block is not None and matrix.block.groups > 1:
        block = matrix.block
        grouped = torch.unflatten(view, 0, (block.groups, block.size))
        view = grouped[:, block.start : block.stop]  # (groups, rows of one, ...)
    view.copy_(W.reshape(view.shape))


def rows_of(matrix: Matrix, total: int) -> Tensor:
    """Which rows of its module's update (`total` x n) a matrix is: (m,) indices."""
    every = torch.arange(total)
    return every if matrix.block is None else matrix.block.take(every[:, None])[:, 0]


def joined(whole: LowRank, parts: Sequence[tuple[Tensor, LowRank]]) -> LowRank:
    """The update of a module from the edited updates of the matrices in it.

    Args:
        whole: the update before the edit, c B A with r rows in A.
        parts: (rows of the module, edited update) of each matrix. Rows that none names keep theirs.
    Returns: factors of the scaling c where all parts have it. Columns of B that still go with A's own rows are shared
        by all parts, so that q directions added to any of them make the rank r + q; a part with factors of its own
        adds its whole rank. A module without any update left gets rank 0.
    """
    scalings = {part.c for _, part in parts if part.rank}
    c = scalings.pop() if len(scalings) == 1 and _covers(whole, parts) else whole.c
    B, A = whole.B.clone(), whole.A
    r = whole.rank
    added_B, added_A = [], []
    for rows, part in parts:
        own = part.B if part.c == c else part.B.double() * (part.c / c)
        shares = part.rank >= r and torch.equal(part.A[:r].to(A.dtype), A)
        B = B.to(torch.promote_types(B.dtype, own.dtype))
        B[rows] = own[:, :r].to(B.dtype) if shares else torch.zeros((), dtype=B.dtype)
        extra = own[:, r:] if shares else own
        if extra.shape[1]:
            wide = torch.zeros(whole.shape[0], extra.shape[1], dtype=torch.float64)
            wide[rows] = extra.double()
            added_B.append(wide)
            added_A.append(part.A[r if shares else 0 :].double())
    if not bool(B.any()):  # nothing goes with the old rows any more
        B, A = B[:, :0], A[:0]
    if not added_B:
        return LowRank(B, A, c)
    return LowRank(torch.cat([B.double(), *added_B], 1), torch.cat([A.double(), *added_A]), c)


def _covers(whole: LowRank, parts: Sequence[tuple[Tensor, LowRank]]) -> bool:
    return sum(len(rows) for rows, _ in parts) == whole.shape[0]

"""A weight matrix W (m x n, out x in) as it lies in a stored tensor, and the way to take it out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectra.linalg.lowrank import LowRank


@dataclass(frozen=True)
class RowBlocks:
    """The rows of a fused matrix that belong to one part: rows [start, stop) of each of `groups` groups of `size`.

    One group says "rows start to stop"; as many groups as heads says "interleaved per head".
    """

    groups: int
    size: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.groups * (self.stop - self.start)

    def take(self, matrix: Tensor) -> Tensor:
        """The part's rows in their order (`count` x n) from a matrix of groups x size rows: a view for one group."""
        if self.groups == 1:
            return matrix[self.start : self.stop]
        grouped = torch.unflatten(matrix, 0, (self.groups, self.size))  # (groups, size, n)
        return grouped[:, self.start : self.stop].flatten(0, 1)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of m = `rows` (out) by n = `columns` (in), described without its values.

    Attributes:
        name: the tensor's name, plus `[part]` where the tensor holds several matrices.
        tensor: the stored tensor's name.
        part: "" for a whole tensor; "q", "k", "v", "gate", "up"; "i", "f", "g", "o" or "r", "z", "n" (the gates of an
            LSTM or GRU); "3" or "3.gate" (of expert 3).
        role: one of `ROLES`.
        layer: the block's number, counted through nested stages; None outside the blocks.
        index: which entry of the leading dimension, for a stack of matrices.
        is_transposed: stored in x out, as Hugging Face's `Conv1D` and transposed convolutions are.
        block: the rows of this part, where the tensor is fused.
        note: what had to be assumed or left undone, in words; "" where nothing.
    """

    name: str
    tensor: str
    part: str
    role: str
    layer: int | None
    rows: int
    columns: int
    index: int | None = None
    is_transposed: bool = False
    block: RowBlocks | None = None
    note: str = ""

    @property
    def place(self) -> tuple[int | slice, ...]:
        """Where W lies: `tensor[place]` is the part of the stored tensor that `arrange` makes W of.

        It holds W alone, except where the rows of several parts are interleaved: then it holds those of all.
        """
        stack = () if self.index is None else (self.index,)
        if self.block is None or self.block.groups > 1:
            return stack
        rows = slice(self.block.start, self.block.stop)
        return (*stack, slice(None), rows) if self.is_transposed else (*stack, rows)

    def arrange(self, part: Tensor) -> Tensor:
        """W (m x n) out of `tensor[place]`, in its dtype: a view, except for interleaved rows and odd strides.

        A kernel (out x in x height x width) becomes out x (in height width); a grouped one keeps its in / groups
        inputs, so that a depthwise one is out x (height width). Raises `ValueError` for a part of another shape.
        """
        matrix = part.transpose(0, 1) if self.is_transposed else part
        matrix = matrix.flatten(1)  # (all rows, n)
        if self.block is not None and self.block.groups > 1:
            matrix = self.block.take(matrix)
        if matrix.shape != (self.rows, self.columns):
            raise ValueError(
                f"{self.name} is {self.rows} x {self.columns}, which a tensor {tuple(part.shape)} does not hold"
            )
        return matrix

    def extract(self, tensor: Tensor) -> Tensor:
        """W (m x n) out of the whole stored tensor. Raises `ValueError` for a tensor of another shape."""
        return self.arrange(tensor[self.place])

    def extract_update(self, update: LowRank) -> LowRank:
        """The rows of this part of an update D = c B A of the whole tensor, given out x in: rows of B, at no product.

        Raises `ValueError` for a part of a stack, whose update is no single matrix, and for an update of another shape.
        """
        if self.index is not None:
            raise ValueError(f"{self.name} is one of a stack of matrices, which one low-rank product cannot update")
        part = update if self.block is None else LowRank(self.block.take(update.B), update.A, update.c)
        if part.shape != (self.rows, self.columns):
            raise ValueError(
                f"{self.name} is {self.rows} x {self.columns}, which an update {update.shape} does not hold"
            )
        return part

"""The stored tensors of a base that one LoRA of one module could update, and why others cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spectra.checkpoints import Checkpoint
from spectra.matrices.names import unwrapped
from spectra.pairing import Pair, Pairing


def modules(pairing: Pairing, base: Checkpoint, tuned: Checkpoint) -> list[Module]:
    """The pairs by stored tensor, in reading order."""
    groups: dict[tuple[str, str, str], list[Pair]] = {}
    for pair in pairing.pairs:
        groups.setdefault((_whole_name(pair), pair.matrix.tensor, pair.tuned_tensor), []).append(pair)
    return [Module(tuple(group), base, tuned) for group in groups.values()]


def _whole_name(pair: Pair) -> str:
    """The name of the tensor that was compared, which is another than the stored one where it is tied."""
    return pair.matrix.name.removesuffix(f"[{pair.matrix.part}]")


@dataclass(frozen=True)
class Module:
    """A stored tensor of the base with the pairs that its matrices are in, which one LoRA would update together."""

    pairs: tuple[Pair, ...]
    base: Checkpoint
    tuned: Checkpoint

    @property
    def tensor(self) -> str:
        return self.pairs[0].matrix.tensor

    @property
    def name(self) -> str:
        """The tensor under the name that was compared."""
        return _whole_name(self.pairs[0])

    def module(self, names: Literal["base", "tuned"]) -> str:
        """The module whose weight this is, under the names of one side."""
        name = self.name if names == "base" else self.pairs[0].tuned_tensor
        return unwrapped(name).removesuffix(".weight")

    @property
    def is_transposed(self) -> bool:
        return self.pairs[0].matrix.is_transposed

    @property
    def cost(self) -> int:
        short, long = sorted((sum(pair.matrix.rows for pair in self.pairs), self.pairs[0].matrix.columns))
        return short * short * (long + 4 * short) + 10_000

    def why_not(self) -> str:
        """Why PEFT's LoRA of a Linear or Conv1D cannot carry this tensor's update; "" where it can."""
        matrix, shape = self.pairs[0].matrix, self.base.tensors[self.tensor].shape
        if matrix.index is not None:
            return "a stack of matrices, which no LoRA of one module updates"
        if "embedding" in matrix.role:
            return "an embedding"
        if len(shape) != 2:
            return "a convolution"
        if self.name != self.tensor or self.tensor in self.base.tied.values():
            return "tied to another tensor of the base, which would not follow"
        if not (self.name.endswith(".weight") and self.pairs[0].tuned_tensor.endswith(".weight")):
            return "a parameter that is no module's weight"
        if (
            self.name.endswith(".out_proj.weight")
            and self.name[: -len("out_proj.weight")] + "in_proj_weight" in self.base
        ):
            return "the output of a MultiheadAttention, whose LoRA has no effect of its own"
        whole = torch.Size(shape).numel(), torch.Size(self.tuned.tensors[self.pairs[0].tuned_tensor].shape).numel()
        if {sum(pair.matrix.rows * pair.matrix.columns for pair in self.pairs)} != {*whole}:
            return "matched or asked for in parts only, and a module has one LoRA for all of them"
        return ""

    def load(self) -> tuple[Tensor, Tensor]:
        """W and W' as PEFT sees them (out x in), in their stored dtypes."""
        first = self.pairs[0]
        W, tuned = self.base[self.tensor], self.tuned[first.tuned_tensor]
        return W.T if first.matrix.is_transposed else W, tuned.T if first.tuned_matrix.is_transposed else tuned

    def matched(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The matrices that were matched, of a tensor of any shape, each beside its counterpart; read once."""
        W, tuned = self.base[self.tensor], self.tuned[self.pairs[0].tuned_tensor]
        for pair in self.pairs:
            yield pair.matrix.extract(W), pair.tuned_matrix.extract(tuned)

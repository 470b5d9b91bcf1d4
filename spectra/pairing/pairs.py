"""What pairing finds: pairs that can be loaded, what has no partner, and what was decided on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectra.checkpoints.checkpoint import Adapter, Checkpoint
from spectra.linalg.lowrank import LowRank
from spectra.matrices import Matrix


@dataclass(frozen=True)
class Pair:
    """A weight matrix W (m x n) of the base and its tuned counterpart. Nothing is loaded before it is asked for.

    Attributes:
        matrix: the base's matrix; its rows and columns are those that are compared (the common part).
        tuned_tensor: the name of the tuned tensor, or of the adapter's update.
        base_dtype, tuned_dtype: the dtypes as stored.
        rank: r of the update's factors, where the tuned side is an adapter; None for a tuned matrix W'.
        note: what a reader must know of this pair ("compared on the first 30522 of 30524 rows"); "" where nothing.
        tuned_matrix: where W' lies in the tuned tensor (or the rows of this part in the update).
        base, tuned: the checkpoints that the two are loaded from; one and the same where an adapter leaves W as it is.
    """

    matrix: Matrix
    tuned_tensor: str
    base_dtype: torch.dtype
    tuned_dtype: torch.dtype
    rank: int | None
    note: str
    tuned_matrix: Matrix = field(repr=False)
    base: Checkpoint = field(repr=False, compare=False)
    tuned: Checkpoint = field(repr=False, compare=False)

    @property
    def is_untouched(self) -> bool:
        """Whether an adapter leaves this matrix as it is."""
        return self.tuned is self.base

    @property
    def is_low_rank(self) -> bool:
        return self.rank is not None

    def load_base(self) -> Tensor:
        """W (m x n), in its stored dtype.

        Of the tensor that holds it, what lies from W's first element to its last is read: one expert, one of q | k | v.
        Where rows of others lie between W's, or W is stored as columns among others, that is more than W.
        """
        return self.matrix.arrange(self.base.part(self.matrix.tensor, self.matrix.place))

    def load_tuned(self) -> Tensor | LowRank:
        """W' (m x n) in its stored dtype, read as W; where `is_low_rank`, the update D = W' - W (m x n) as factors."""
        if self.is_low_rank and isinstance(self.tuned, Adapter):
            return self.tuned_matrix.extract_update(self.tuned.update(self.tuned_tensor))
        return self.tuned_matrix.arrange(self.tuned.part(self.tuned_tensor, self.tuned_matrix.place))


@dataclass(frozen=True)
class Unmatched:
    """What was not compared: a tensor (or a matrix, or some of its rows) of one side, and why."""

    name: str
    side: str  # "base" | "tuned"
    reason: str


@dataclass(frozen=True)
class Pairing:
    """The pairs in reading order (embeddings, blocks, heads), what was left out, and how names were matched."""

    pairs: tuple[Pair, ...]
    unmatched: tuple[Unmatched, ...]
    notes: tuple[str, ...]

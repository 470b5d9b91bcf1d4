"""What an edit does to the vectors beside the matrices: biases, norms and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectra.checkpoints import Adapter, Checkpoint
from spectra.checkpoints.wording import listed, quoted
from spectra.editing.edits import Edit, Rewinding
from spectra.editing.heads import OUTPUTS, head_entries
from spectra.editing.placing import rows_of
from spectra.editing.selecting import Choice, chosen_vectors, same_vectors, without_base
from spectra.errors import SpectraError
from spectra.pairing import Pair, Pairing


@dataclass(frozen=True)
class Vector:
    """A vector of the tuned model that moves along the line through it and the base's.

    Attributes:
        name, of_base: its name, and that of the base's.   factor: 0 is the base's, 1 the tuned one's.
        entries: (m,) True where it moves; None: everywhere.
    """

    name: str
    of_base: str
    factor: float
    entries: Tensor | None = None

    def moved(self, base: Tensor, tuned: Tensor) -> Tensor:
        """Its new values, in the tuned one's dtype; of either of the two, to the bit, for 0 and 1.

        Raises: SpectraError where they overflow.
        """
        if self.factor == 1:
            return tuned
        if self.factor == 0:
            new = base.to(tuned.dtype)
            return new if self.entries is None else torch.where(self.entries, new, tuned)
        exact = base.double() + self.factor * (tuned.double() - base.double())
        moved = exact.to(tuned.dtype)
        if not torch.equal(moved.isfinite(), exact.isfinite()):
            dtype = str(tuned.dtype).removeprefix("torch.")
            raise SpectraError(f"tensor {quoted(self.name)} overflows {dtype} when it is scaled by {self.factor:g}")
        return moved


def vectors_of(
    what: Edit,
    base: Checkpoint,
    tuned: Checkpoint,
    everything: Pairing,
    chosen: Pairing,
    choice: Choice,
) -> tuple[list[Vector], tuple[str, ...]]:
    """The vectors that an edit moves, and what is to be said of others.

    Args:
        everything, chosen: the pairs of all matrices, and of those that are edited.
        choice: what those were chosen by, which chooses the vectors as well.
    """
    if isinstance(what, Rewinding) and what.heads is not None:
        return _of_heads(what, base, tuned, everything, chosen)
    lacking = without_base(base, tuned, everything, choice, with_vectors=what.of_vectors is not None)
    notes = (f"tensors that stay tuned, for the base has none of their name and shape: {listed(lacking)}",)
    if what.of_vectors is None:
        return [], notes if lacking else ()
    found = chosen_vectors(base, tuned, everything, choice)
    vectors = [Vector(name, of_base, what.of_vectors) for name, of_base in found.items()]
    return vectors, notes if lacking else ()


def _of_heads(
    what: Rewinding, base: Checkpoint, tuned: Checkpoint, everything: Pairing, chosen: Pairing
) -> tuple[list[Vector], tuple[str, ...]]:
    """The entries of some heads in the biases of query, key and value; and a note of biases that hold them unseen."""
    config = base.config if isinstance(tuned, Adapter) else tuned.config or base.config
    found = same_vectors(base, tuned, everything)
    beside = {of_base: name for name, of_base in found.items() if len(base.tensors[of_base].shape) == 1}
    places: dict[str, Tensor] = {}
    homes: set[str] = set()
    for pair in chosen.pairs:
        if pair.matrix.role not in OUTPUTS | {"qkv"}:
            continue
        module = pair.matrix.tensor.rpartition(".")[0]
        homes |= {module} if pair.matrix.tensor.endswith("_weight") else {module, module.rpartition(".")[0]}
        of_base = _bias_of(pair.matrix.tensor)
        if of_base in beside:
            total = base.tensors[of_base].shape[0]
            entries = _entries(what, pair, total, config)
            if entries is not None:
                places.setdefault(of_base, torch.zeros(total, dtype=torch.bool))[entries] = True
    unseen = [
        name
        for of_base, name in beside.items()
        if of_base not in places
        and of_base.endswith("bias")
        and of_base.rpartition(".")[0] in homes
        and not torch.equal(base[of_base], tuned[name])
    ]
    notes = (f"biases that stay tuned, for how the heads lie in them is not known: {listed(unseen)}",) if unseen else ()
    return [Vector(beside[of_base], of_base, 0.0, entries) for of_base, entries in places.items()], notes


def _bias_of(weight: str) -> str:
    """`q_proj.weight` -> `q_proj.bias`, and `in_proj_weight` -> `in_proj_bias`."""
    return weight.removesuffix("weight") + "bias" if weight.endswith("weight") else ""


def _entries(what: Rewinding, pair: Pair, total: int, config: Mapping[str, Any]) -> Tensor | None:
    """Which entries of its bias belong to the heads in the outputs of a matrix; None where that is not known."""
    assert what.heads is not None
    matrix = pair.matrix
    rows = matrix.rows if matrix.block is None else matrix.block.groups * matrix.block.size
    if rows != total or matrix.block != pair.tuned_matrix.block:
        return None
    try:
        found = head_entries(matrix, config, what.heads, what.head_size)
    except SpectraError:  # the row of the matrix says it
        return None
    return None if isinstance(found, str) else rows_of(matrix, total)[torch.from_numpy(found[0])]

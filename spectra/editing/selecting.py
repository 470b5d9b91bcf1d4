"""Which matrices an edit is for, and which vectors stand beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from spectra.checkpoints import Adapter, Checkpoint
from spectra.checkpoints.wording import quoted
from spectra.errors import SpectraError
from spectra.loading import identical
from spectra.matrices.names import number_layers
from spectra.pairing import Pair, Pairing
from spectra.pairing.matching import match_names


def of_layers(pairing: Pairing, layers: Sequence[int] | None) -> Pairing:
    """The pairs of some blocks. Raises SpectraError for a block that the model does not have."""
    if layers is None:
        return pairing
    known = {pair.matrix.layer for pair in pairing.pairs if pair.matrix.layer is not None}
    if missing := sorted(set(layers) - known):
        there = f"{min(known)} to {max(known)}" if known else "none"
        raise SpectraError(f"the model has no weight matrix in layer {missing[0]} (its layers are {there})")
    kept = tuple(pair for pair in pairing.pairs if pair.matrix.layer in layers)
    return Pairing(kept, pairing.unmatched, pairing.notes)


def require_apart(pairing: Pairing) -> None:
    """Raise SpectraError where the tuned model keeps one matrix for two different ones of the base."""
    first: dict[tuple[str, str], Pair] = {}
    for pair in pairing.pairs:
        if pair.is_low_rank or pair.is_untouched:
            continue
        other = first.setdefault((pair.tuned_tensor, pair.tuned_matrix.part), pair)
        if other is not pair and not identical(other.load_base(), pair.load_base()):
            raise SpectraError(
                f"{quoted(pair.tuned_tensor)} of the tuned model is tied, and would be edited against both "
                f"{quoted(other.matrix.name)} and {quoted(pair.matrix.name)} of the base; exclude one of the two"
            )


def require_components(pairing: Pairing, start: int) -> None:
    """Raise SpectraError where no matrix has as many components."""
    most = max(min(pair.matrix.rows, pair.matrix.columns) for pair in pairing.pairs)
    if start >= most:
        raise SpectraError(
            f"components from {start} on lie beyond every matrix, for the largest has {most}; give a slice below that"
        )


def same_vectors(base: Checkpoint, tuned: Checkpoint, pairing: Pairing) -> dict[str, str]:
    """Biases, norms and the like that both models have, of one shape: tuned name -> base name.

    Args: pairing: of all matrices.
    """
    shapes = [{name: info.shape for name, info in side.tensors.items()} for side in (base, tuned)]
    matrices = {pair.tuned_tensor for pair in pairing.pairs}
    # A fused tensor whose parts were all excluded is left as it is: its own name fits no glob on those.
    parts = {line.name.partition("[")[0] for line in pairing.unmatched if line.side == "base" and "[" in line.name}
    return {
        name: of_base
        for name, of_base in match_names(*shapes).partners.items()
        if name not in matrices
        and of_base not in parts
        and tuned.tensors[name].dtype.is_floating_point
        and shapes[0][of_base] == shapes[1][name]
    }


@dataclass(frozen=True)
class Choice:
    """Which tensors an edit is for: layers (None: all), and globs on the base's names."""

    layers: Sequence[int] | None
    include: str | Sequence[str]
    exclude: str | Sequence[str]

    def takes(self, name: str, layer: int | None) -> bool:
        """Whether it is for a tensor of this name in the base, of this layer."""
        include, exclude = ([given] if isinstance(given, str) else given for given in (self.include, self.exclude))
        return (
            (self.layers is None or layer in self.layers)
            and (not include or any(fnmatchcase(name, pattern) for pattern in include))
            and not any(fnmatchcase(name, pattern) for pattern in exclude)
        )


def chosen_vectors(base: Checkpoint, tuned: Checkpoint, pairing: Pairing, choice: Choice) -> dict[str, str]:
    """Those of `same_vectors` that are moved where whole matrices are."""
    numbers = number_layers(tuned.tensors)
    return {
        name: of_base
        for name, of_base in same_vectors(base, tuned, pairing).items()
        if choice.takes(of_base, numbers[name])
    }


def without_base(
    base: Checkpoint, tuned: Checkpoint, pairing: Pairing, choice: Choice, *, with_vectors: bool
) -> list[str]:
    """Tensors of the tuned model that no edit reaches, for the base has none of their name and shape.

    Args:
        pairing: of all matrices.   choice: what it leaves out is not listed.
        with_vectors: whether the edit is for biases, norms and the like, too.
    """
    updates = {name: info.shape for name, info in tuned.updates.items()} if isinstance(tuned, Adapter) else {}
    shapes = {name: info.shape for name, info in tuned.tensors.items() if info.dtype.is_floating_point} | updates
    partners = match_names({name: info.shape for name, info in base.tensors.items()}, shapes).partners
    numbers = number_layers(shapes)
    edited = {pair.tuned_tensor for pair in pairing.pairs}
    return [
        name
        for name, shape in shapes.items()
        if name not in edited
        and (with_vectors or len(shape) > 1)
        and (name not in partners or (base.tensors[partners[name]].shape != shape and name not in updates))
        and choice.takes(partners.get(name, name), numbers[name])
    ]

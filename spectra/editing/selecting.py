"""Which matrices an edit is for, and which vectors go with them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from spectra.checkpoints import Checkpoint
from spectra.errors import SpectraError
from spectra.matrices.names import number_layers
from spectra.pairing import Pairing
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


def vectors_beside(
    base: Checkpoint,
    tuned: Checkpoint,
    pairing: Pairing,
    layers: Sequence[int] | None,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
) -> dict[str, str]:
    """Biases, norms and the like that go back where whole matrices do: tuned name -> base name.

    Args: pairing: of all matrices.   layers, include, exclude: as for the matrices, on the base's names.
    """
    shapes = [{name: info.shape for name, info in side.tensors.items()} for side in (base, tuned)]
    include, exclude = ([given] if isinstance(given, str) else given for given in (include, exclude))
    matrices = {pair.tuned_tensor for pair in pairing.pairs}
    numbers = number_layers(tuned.tensors)
    found = {}
    for name, of_base in match_names(*shapes).partners.items():
        if name in matrices or not tuned.tensors[name].dtype.is_floating_point:
            continue
        is_asked_for = (
            (layers is None or numbers[name] in layers)
            and (not include or any(fnmatchcase(of_base, pattern) for pattern in include))
            and not any(fnmatchcase(of_base, pattern) for pattern in exclude)
        )
        if is_asked_for and shapes[0][of_base] == shapes[1][name]:
            found[name] = of_base
    return found

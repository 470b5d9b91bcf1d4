"""When two checkpoints are not to be compared at all, in one sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spectra.errors import SpectraError
from spectra.matrices.names import natural
from spectra.pairing.pairs import Pair, Unmatched
from spectra.pairing.side import Side

# Partial checkpoints match wholly from the smaller side; a few tables of equal size in two foreign models do not.
_LEAST_SHARE = 0.1
_LEAST_SHARE_OF_OTHER_TYPES = 0.5


def matches_nothing(kind: str, pattern: str, names: Iterable[str], source: str) -> SpectraError:
    """The sentence for a glob that matches none of the names, which is always a slip."""
    return SpectraError(
        f"the {kind} pattern '{pattern}' matches no weight matrix of {source} (names look like {_few(names)}); "
        "give a glob such as '*.weight'"
    )


def require_same_architecture(base: Side, tuned: Side, pairs: Sequence[Pair], unmatched: Sequence[Unmatched]) -> None:
    """Raise `SpectraError` where the two have nothing, or too little, in common to be a base and its tuned model."""
    sources = base.checkpoint.source, tuned.checkpoint.source
    many = len([*_matrices(base)]), len([*_matrices(tuned)]) + len(tuned.updates)
    types = base.checkpoint.config.get("model_type"), tuned.checkpoint.config.get("model_type")
    are_other_types = None not in types and types[0] != types[1]
    least = _LEAST_SHARE_OF_OTHER_TYPES if are_other_types else _LEAST_SHARE
    share = len({pair.matrix.name for pair in pairs}) / max(min(many), 1)
    if pairs and share >= least:
        return
    for number, side in zip(many, (base, tuned), strict=True):
        if not number:
            why = next(iter(side.checkpoint.refused.values()), next(iter(side.left_out.values()), "it is empty"))
            remedy = "give a checkpoint with floating-point weights"
            raise SpectraError(f"{side.checkpoint.source} holds no weight matrix ({why}); {remedy}")
    named = f" ({types[0]} and {types[1]})" if are_other_types else ""
    remedy = "give the base that this model was fine-tuned from"
    misfit = next((line for line in unmatched if line.reason.startswith("shaped ")), None)
    ambiguous = next((line for line in unmatched if line.reason.startswith("could be ")), None)
    if ambiguous is not None:
        raise SpectraError(
            f"{sources[0]} and {sources[1]} cannot be matched by name: '{ambiguous.name}' {ambiguous.reason}"
        )
    if misfit is not None:
        raise SpectraError(
            f"{sources[0]} and {sources[1]} are models of different shapes{named}: "
            f"'{misfit.name}' is {misfit.reason.removeprefix('shaped ')}; {remedy}"
        )
    common = f"only {len(pairs)} of {min(many)} weight matrices" if pairs else "no weight matrix"
    names = _few(_matrices(base)), _few([*_matrices(tuned), *tuned.updates])
    raise SpectraError(
        f"{sources[0]} and {sources[1]} are different architectures{named}: they share {common} of the same name and "
        f"shape (the base holds {names[0]}; the tuned holds {names[1]}); {remedy}"
    )


def _matrices(side: Side) -> list[str]:
    return [matrix.name for name, found in side.matrices.items() if name not in side.stored for matrix in found]


def _few(names: Iterable[str], count: int = 3) -> str:
    ordered = sorted(names, key=natural)
    return ", ".join(f"'{name}'" for name in ordered[:count]) + (", ..." if len(ordered) > count else "")

"""One spelling for a name that the same model writes in several ways, for matching only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache

from spectra.matrices import Matrix
from spectra.matrices.names import family, unwrapped

# Old LayerNorm parameters; and what transformers 5 calls its modules in memory against what it writes to disk. Both
# sides are respelled, so a rule that a model does not need changes nothing.
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\bLayerNorm\.gamma$", "LayerNorm.weight"),
        (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
        (r"\bencoder\.layer\.(\d+)\.", r"layers.\1."),
        (r"\battention\.(?:attention|self)\.query\.", "attention.q_proj."),
        (r"\battention\.(?:attention|self)\.key\.", "attention.k_proj."),
        (r"\battention\.(?:attention|self)\.value\.", "attention.v_proj."),
        (r"\battention\.output\.dense\.", "attention.o_proj."),
        (r"\bintermediate\.dense\.", "mlp.fc1."),
        (r"(\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
        (r"\bembed_out\.weight$", "lm_head.weight"),
        (r"\bblock_sparse_moe\.", "mlp."),
    )
)

_ONE_EXPERT = re.compile(r"^(?P<place>.*\bexperts)\.(?P<expert>\d+)\.\w+\.weight$")
_EXPERT_STACK = re.compile(r"^(?P<place>.*\bexperts)\.\w+$")


def spell(names: Iterable[str]) -> dict[str, str]:
    """Each name's common spelling, without what wrappers put in. Names that would fall together keep their own."""
    spelled = {name: _common(name) for name in names}
    times = Counter(spelled.values())
    return {name: common if times[common] == 1 else name for name, common in spelled.items()}


def _common(name: str) -> str:
    plain = unwrapped(name)
    return _respelled(plain) if _is_respelled(family(plain)) else plain


@cache
def _is_respelled(plain: str) -> bool:
    """Whether any rule changes the names of this family: no rule reads which number stands in them."""
    return _respelled(plain) != plain


def _respelled(plain: str) -> str:
    for pattern, replacement in _SPELLINGS:
        plain = pattern.sub(replacement, plain)
    return plain


def expert_place(matrix: Matrix, spelled: str) -> tuple[str, int, str] | None:
    """Where an expert's matrix stands (place of the experts, number, role), stacked or not; None for other matrices."""
    if matrix.index is not None and (stack := _EXPERT_STACK.match(spelled)):
        return stack["place"], matrix.index, matrix.role
    if one := _ONE_EXPERT.match(spelled):
        return one["place"], int(one["expert"]), matrix.role
    return None

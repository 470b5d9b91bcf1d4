"""What a tensor's name says apart from its role: what wraps it, and which block of which stack it belongs to."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer"})
"""Components that a wrapper of a module (DDP, compile, FSDP, PEFT) puts into a name, anywhere in it."""

_NOT_BLOCKS = frozenset(
    {
        "experts",
        "classifier",
        "head",
        "heads",
        "score",
        "projector",
        "projection_head",
        "prediction_head",
        "fc",
        "to_out",
    }
)
_NESTED = frozenset({"blocks", "layers", "albert_layers"})
_NUMBERED = re.compile(r"^(.*?)_?(\d+)$")
_NUMBER = re.compile(r"(\d+)")
_INNER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_RECURRENT = re.compile(r"weight_(?:ih|hh|hr)_l(\d+)(?:_reverse)?$")


NAMES_KEPT = 1 << 18
"""How many names a cache of what they say remembers: a base and a tuned mixture of experts of a hundred thousand."""


@dataclass(frozen=True)
class Block:
    """Where a tensor stands: `stack` names the run of blocks, `indices` the stage and the block, or the block alone."""

    stack: str
    indices: tuple[int, ...]


@lru_cache(NAMES_KEPT)
def unwrapped(name: str) -> str:
    """The name without the components that wrappers put in: `module.a._orig_mod.b` is `a.b`."""
    if not any(word in name for word in WRAPPERS):  # nearly always
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@lru_cache(NAMES_KEPT)
def family(name: str) -> str:
    """The name with a 0 for every number between two dots: one for all blocks and experts.

    What a tensor is for does not depend on these numbers, so that rules need to look at one name of each family.

    >>> family("layers.17.experts.203.w1.weight")
    'layers.0.experts.0.w1.weight'
    """
    return _INNER_NUMBER.sub("0", name)


@lru_cache(NAMES_KEPT)
def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts 10 after 9."""
    return tuple(map(_piece, filter(None, _NUMBER.split(name))))


@lru_cache(NAMES_KEPT)
def _piece(piece: str) -> tuple[int, str]:
    return (int(piece), "") if piece.isdecimal() else (-1, piece)


def block_of(name: str) -> Block | None:
    """The block that a name places its tensor in; None outside the blocks.

    `layer.3`, `h.3` and `encoder_layer_3` are block 3; `stages.1.blocks.0`, `layer1.0` and `blocks.1.0` are block 0 of
    stage 1. In T5's `block.3.layer.1` the second number is a part of block 3; under a head or experts none is a block.
    """
    return _block_of_plain(unwrapped(name))


@lru_cache(NAMES_KEPT)
def _block_of_plain(plain: str) -> Block | None:
    parts = plain.split(".")
    for position, part in enumerate(parts):
        if not part[-1:].isdecimal():
            continue
        if part.isdecimal():
            if position and parts[position - 1].lstrip("_") in _NOT_BLOCKS:
                continue
            return Block(".".join(parts[:position]), (int(part), *_nested_index(parts[position + 1 :])))
        if (numbered := _NUMBERED.match(part)) and _holds_blocks(numbered[1]):
            stack = ".".join([*parts[:position], numbered[1]])
            return Block(stack, (int(numbered[2]), *_nested_index(parts[position + 1 :])))
    if recurrent := _RECURRENT.search(parts[-1]):
        return Block(".".join(parts[:-1]), (int(recurrent[1]),))
    return None


def _holds_blocks(word: str) -> bool:
    return word in {"layer", "stage", "block"} or word.endswith(("_layer", "_block"))


def _nested_index(rest: list[str]) -> tuple[int, ...]:
    if rest and rest[0].isdecimal():
        return (int(rest[0]),)
    if len(rest) > 1 and rest[0] in _NESTED and rest[1].isdecimal():
        return (int(rest[1]),)
    return ()


def number_layers(names: Iterable[str]) -> dict[str, int | None]:
    """The layer of each name: its block's number, counted through the stages of a stack that has several.

    What lies in a stage and in none of its blocks (a down-sampling) has the number of that stage's last block.
    """
    blocks = {name: block_of(name) for name in names}
    stages: dict[str, set[tuple[int, ...]]] = {}
    for block in blocks.values():
        if block is not None and len(block.indices) == 2:
            stages.setdefault(block.stack, set()).add(block.indices)
    ordered = {stack: sorted(members) for stack, members in stages.items()}

    def layer(block: Block | None) -> int | None:
        if block is None:
            return None
        if block.stack not in ordered:
            return block.indices[0]
        until = (block.indices[0] + 1,) if len(block.indices) == 1 else (*block.indices, 0)
        return max(bisect_left(ordered[block.stack], until) - 1, 0)

    return {name: layer(block) for name, block in blocks.items()}

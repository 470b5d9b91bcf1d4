"""The weights of a checkpoint, put into a module that the user's own code built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from spectra.checkpoints import Adapter, Checkpoint, open_checkpoint
from spectra.checkpoints.wording import listed
from spectra.errors import SpectraError
from spectra.matrices.names import unwrapped

COUNTERS = ("num_batches_tracked",)  # which no output depends on in evaluation mode


def load_weights(module: nn.Module, source: Any) -> tuple[str, ...]:
    """Copy the tensors of a checkpoint into the parameters and buffers of `module`, in their dtype.

    Names agree exactly, or but for what wrappers put in ("module.", "_orig_mod."), or for one prefix that all on one
    side share ("model.encoder.").

    Args:
        source: whatever `spectra.open_checkpoint` opens, an adapter aside.
    Returns: what was left over or decided, a sentence each.
    Raises: SpectraError that names the tensors that are missing or of another shape; the module is then unchanged.

    >>> left = load_weights(nn.Linear(2, 1, bias=False), {"net.weight": torch.ones(1, 2), "head.weight": torch.ones(3)})
    >>> left[0]
    "state dict in memory holds 1 tensor that Linear does not have: 'head.weight'"
    """
    checkpoint = open_checkpoint(source)
    kind = type(module).__name__
    if isinstance(checkpoint, Adapter):
        raise SpectraError(
            f"{checkpoint.source} is an adapter, which only a Hugging Face model can take; merge it with "
            "merge_and_unload() and give the merged weights"
        )
    own = module.state_dict()
    partner = _partners(own, [*checkpoint, *checkpoint.tied])
    missing = [name for name in own if name not in partner and not name.endswith(COUNTERS)]
    if missing:
        raise SpectraError(
            f"{checkpoint.source} lacks {len(missing)} of the {len(own)} tensors of {kind}: {listed(missing)}; give "
            "the checkpoint of this very model"
        )
    for name, stored in partner.items():
        shape = checkpoint.tensors[checkpoint.tied.get(stored, stored)].shape
        if shape != tuple(own[name].shape):
            raise SpectraError(
                f"{checkpoint.source} has {stored!r} of shape {list(shape)}, and {name!r} of {kind} is "
                f"{list(own[name].shape)}; give the checkpoint of this very model"
            )
    with torch.no_grad():
        for name, stored in partner.items():
            own[name].copy_(checkpoint[checkpoint.tied.get(stored, stored)])
    return (*checkpoint.notes, *_left_over(checkpoint, set(partner.values()), kind))


def _left_over(checkpoint: Checkpoint, used: set[str], kind: str) -> Iterable[str]:
    used |= {checkpoint.tied[name] for name in used if name in checkpoint.tied}
    left = [name for name in checkpoint if name not in used]
    if left:
        tensors = "1 tensor" if len(left) == 1 else f"{len(left)} tensors"
        yield f"{checkpoint.source} holds {tensors} that {kind} does not have: {listed(left)}"


def _partners(own: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """Own name -> stored name, by the reading of the stored names that makes the most of them agree."""
    plain = {unwrapped(name): name for name in stored}
    names = {name: unwrapped(name) for name in own}
    best: dict[str, str] = {}
    for reading in _readings(names.values(), plain):
        found = {name: reading[spelled] for name, spelled in names.items() if spelled in reading}
        if len(found) > len(best):
            best = found
    return best


def _readings(own: Iterable[str], stored: Mapping[str, str]) -> Iterable[dict[str, str]]:
    """The stored names as they are, without each prefix that one of them has, and with each that an own name has."""
    yield dict(stored)
    own = list(own)
    endings = {name.rsplit(".", 2)[-1] for name in own}
    for prefix in sorted(_prefixes(stored), key=len):
        yield {name.removeprefix(prefix): key for name, key in stored.items() if name.startswith(prefix)}
    for prefix in sorted(_prefixes(own), key=len):
        yield {f"{prefix}{name}": key for name, key in stored.items() if name.rsplit(".", 2)[-1] in endings}


def _prefixes(names: Iterable[str]) -> set[str]:
    """Every beginning of every name that ends at a dot."""
    return {name[: at + 1] for name in names for at, letter in enumerate(name) if letter == "."}

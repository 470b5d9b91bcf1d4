"""An edited LoRA adapter in PEFT's format: new factors where the edit made some, every other tensor as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectra.checkpoints import Adapter, Checkpoint, open_checkpoint
from spectra.checkpoints.adapter_folder import ADAPTER_CONFIG
from spectra.checkpoints.lora_factors import FACTOR, PREFIX
from spectra.checkpoints.weights_file import open_weights_file
from spectra.checkpoints.wording import quoted
from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank
from spectra.tensor_files import write_tensors, write_torch

SLICES = "spectra_slices.json"  # what a slice's adapter started from, which no edited factors fit


@dataclass(frozen=True)
class Factors:
    """The two factors of one module: their names in the file, and as what PEFT stores them."""

    module: str
    A: str
    B: str
    is_embedding: bool

    def stored(self, update: LowRank, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The factors of an update, shaped as those that were there, A and B; in their dtypes where these hold them."""
        if update.rank == 0:  # the module stays adapted, by nothing
            return {self.A: A, self.B: torch.zeros_like(B)}
        if self.is_embedding:
            new_A, new_B = update.B.T, update.A.T  # (r, entries), (dimension, r)
        else:
            r = update.rank
            new_A = update.A.reshape(r, *A.shape[1:])
            new_B = update.B.reshape(B.shape[0], r, *B.shape[2:])
        if _holds(A.dtype, new_A) and _holds(B.dtype, new_B):
            new_A, new_B = new_A.to(A.dtype), new_B.to(B.dtype)
        return {self.A: new_A.contiguous(), self.B: new_B.contiguous()}

    def read(self, tensors: Mapping[str, Tensor], c: float) -> LowRank:
        """The update that stored factors make."""
        A, B = tensors[self.A], tensors[self.B]
        if self.is_embedding:
            return LowRank(A.T, B.T, c)
        return LowRank(B.flatten(1), A.flatten(1), c)


def factors_of(raw: Checkpoint, adapter: Adapter) -> dict[str, Factors]:
    """The factors behind every update of an adapter, from the names in its file: base tensor -> names."""
    sides: dict[tuple[str, bool], dict[str, str]] = {}
    for name in raw:
        if match := FACTOR.fullmatch(name.removeprefix(PREFIX)):
            sides.setdefault((match["module"], bool(match["embedding"])), {})[match["side"]] = name
    found = {}
    for (module, is_embedding), names in sides.items():
        plain = re.sub(r"(?<=\.)base_layer\.", "", module)
        base = next((n for n in (f"{plain}.in_proj_weight", f"{plain}.weight") if n in adapter.updates), None)
        if base is not None:
            found[base] = Factors(module, names["A"], names["B"], is_embedding)
    return found


def rounded(update: LowRank, dtype: torch.dtype) -> LowRank:
    """The update as its factors will be stored: in `dtype` where that holds them exactly, else at least in float32.

    Half precision would round what an edit adds by up to 0.4 %. PEFT computes with half-precision factors in float32,
    and loads wider ones as they are.

    Raises: SpectraError where they overflow.
    """
    if not (_holds(dtype, update.A) and _holds(dtype, update.B)):
        dtype = torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype
    factors = LowRank(update.B.to(dtype), update.A.to(dtype), update.c)
    if not all(bool(torch.isfinite(factor).all()) for factor in (factors.A, factors.B)):
        raise SpectraError(f"its edited factors overflow {str(dtype).removeprefix('torch.')}")
    return factors


def _holds(dtype: torch.dtype, factor: Tensor) -> bool:
    """Whether a dtype has every value of a factor."""
    return torch.equal(factor.to(dtype).to(factor.dtype), factor)


def write_factors(adapter: Adapter, updates: Mapping[str, LowRank], folder: Path) -> None:
    """Put new updates into a copied adapter: its weights file and adapter_config.json below `folder` are rewritten.

    The scaling c of each module is what its update says: `rank_pattern` and `alpha_pattern` get an entry for it.
    """
    weights = folder / next(path.name for path in adapter.files if path.name != ADAPTER_CONFIG)
    raw = open_weights_file(weights)
    named = factors_of(raw, adapter)
    tensors = {name: raw[name] for name in raw}
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    ranks, alphas = {}, {}
    for base, update in updates.items():
        factors = named[base]
        tensors |= factors.stored(update, raw[factors.A], raw[factors.B])
        rank = update.rank or adapter.updates[base].rank
        pattern = "^" + re.escape(factors.module)
        ranks[pattern] = rank
        alphas[pattern] = _whole(update.c * (sqrt(rank) if config.get("use_rslora") else rank))
    config["rank_pattern"] = _before(ranks, config.get("rank_pattern"))
    config["alpha_pattern"] = _before(alphas, config.get("alpha_pattern"))
    for tied, name in raw.tied.items():
        tensors[tied] = tensors[name]
    _save(tensors, weights)
    again = open_weights_file(weights)
    for name, tensor in tensors.items():
        if not torch.equal(again[again.tied.get(name, name)], tensor):
            raise SpectraError(f"tensor {quoted(name)} read back otherwise than it was written; check the disk")
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_adapter(adapter: Adapter, updates: Mapping[str, LowRank], folder: Path) -> None:
    """Raise SpectraError unless the folder reads as the adapter with these updates in the place of its own.

    The bytes were held against the tensors before: what differs here is how the configuration is read.
    """
    try:
        found = open_checkpoint(folder)
    except SpectraError as error:
        raise _misread(str(error).replace(str(folder), "it")) from error
    if not isinstance(found, Adapter) or set(found.updates) != set(adapter.updates) or set(found) != set(adapter):
        raise _misread("it reads as other tensors")
    for name, info in adapter.updates.items():
        before, after = updates.get(name), found.update(name)
        if before is None:
            before = adapter.update(name)
        if before.rank == 0:  # stored as the factors that were there, one of them zero
            same = after.rank == info.rank and not (after.A.any() and after.B.any())
        else:
            same = torch.equal(before.B.to(after.B.dtype), after.B) and torch.equal(before.A.to(after.A.dtype), after.A)
        if not (same and isclose(before.c, after.c, rel_tol=1e-12)):
            raise _misread(f"the factors for {quoted(name)} read as another update")


def _misread(what: str) -> SpectraError:
    return SpectraError(
        f"the edited adapter is not read as what it was meant to be, and nothing was written ({what}); "
        "merge it with merge_and_unload() and edit the merged model"
    )


def _before(new: dict[str, Any], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """Patterns of modules with the new ones in front, for the first that fits decides; an edit of an edit has both."""
    return new | {pattern: value for pattern, value in (old or {}).items() if pattern not in new}


def _whole(alpha: float) -> float | int:
    """An integer where it is one: PEFT's own type for lora_alpha."""
    return int(alpha) if alpha == int(alpha) else alpha


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    if path.suffix != ".safetensors":
        write_torch(dict(tensors), path)
    else:
        write_tensors(tensors, path, metadata={"format": "pt"})

"""A LoRA adapter out of a base and a tuned checkpoint: the updates of exactly low rank, or truncations on request."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import hypot, isfinite, nan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from spectra.checkpoints import Adapter, Checkpoint, open_checkpoint
from spectra.engines import local
from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.products import matmul
from spectra.linalg.recognise import Recognised, low_rank, truncated
from spectra.linalg.triplets import singular_values
from spectra.lora.modules import Module, modules
from spectra.lora.peft_folder import check_place, write_adapter
from spectra.matrices import find_matrices
from spectra.matrices.names import unwrapped
from spectra.measures.rounding import rounding
from spectra.pairing import Pairing, pair
from spectra.pairing.matching import match_names

if TYPE_CHECKING:
    import pandas as pd

Source = Any  # a path, a hub id, a state dict, an nn.Module, or an open Checkpoint

COLUMNS = (
    "name", "rank", "update_norm", "residual", "relative_residual", "noise", "recognised", "written", "reason",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1 << 22  # entries that are held in float64 at once
FILTERED = ("excluded by '", "not included by '")
UNCHANGED = "unchanged"
NOT_LOW = "not of low rank; a rank or a share of energy would truncate it"
BELOW = "no more than twice the rounding of its storage, which has no rank of its own"


def extract(
    base: Source,
    tuned: Source,
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float32,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    transposed: Sequence[str] | None = None,
    names: Literal["base", "tuned"] = "base",
    force: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> pd.DataFrame:
    """Write what fine-tuning did to the weights as a PEFT LoRA adapter of the base.

    Updates D = W' - W of exactly low rank (a merged LoRA) are recognised from the rounding of their storage and written
    at their own rank. Others are written only where `rank` or `energy` asks for a truncation. A tensor that holds
    several matrices (fused q, k, v) gets one pair of factors, as its module does.

    Args:
        base, tuned: checkpoint files or folders, hub ids in the local cache, state dicts, modules, open checkpoints.
        folder: of the adapter. It is written whole or not at all, and only where something is to be written.
        rank: truncate every update to at most this rank.   energy: to the least rank that keeps this share of
            ||D||_F^2. Of the two one at most; an update of exactly low rank never gets more than its own.
        dtype: of the written factors: float32, bfloat16 or float16. The residuals are those of the factors as written.
        include, exclude, transposed: as in `compare`.
        names: whose module names the adapter bears, where the two differ by a prefix. PEFT takes an adapter whose names
            are not those of the model for one that changes nothing.
        force: replace an adapter that is in `folder`.
        workers: matrices at a time, one a core by default.   progress: called with (cost done, cost in all, name).

    Returns: a row per tensor of the base: `name`; `rank` of what was found or written (NA without); `update_norm`
        ||D||_F; `residual` ||D - c B A||_F, in float64, of the stored values; `relative_residual`; `noise`, the
        expected norm of storage rounding in D; `recognised`; `written`; `reason`. Unmatched tensors, and vectors that
        changed and no LoRA carries, have rows without norms. `attrs["notes"]` says how names were matched.
    Raises: SpectraError for input that cannot be read or matched, for a folder that is taken, and for contradictions.
    """
    _check_options(rank, energy, dtype, names, workers)
    place = Path(folder).expanduser().absolute()
    check_place(place, force)
    checkpoints = open_checkpoint(base), open_checkpoint(tuned)
    for checkpoint in checkpoints:
        if isinstance(checkpoint, Adapter):
            raise SpectraError(f"{checkpoint.source} is an adapter already; give the whole model, merged into its base")
    pairing = pair(*checkpoints, include, exclude, transposed)
    parts = modules(pairing, *checkpoints)
    named = checkpoints[names == "tuned"]
    order = sorted(range(len(parts)), key=lambda index: -parts[index].cost)  # the longest first fills the cores
    total, done = sum(part.cost for part in parts), 0
    lines: list[_Line | None] = [None] * len(parts)
    for position, line in local.run(
        lambda index: _extracted(parts[index], rank, energy, dtype), order, workers or local.available_cores()
    ):
        lines[order[position]] = line
        done += parts[order[position]].cost
        if progress:
            progress(done, total, line.name)
    found = [line for line in lines if line is not None]
    written = {parts[i].module(names): line.factors for i, line in enumerate(found) if line.factors is not None}
    notes = list(pairing.notes)
    if written:
        every = {unwrapped(name).removesuffix(".weight") for name in (*named.tensors, *named.tied)}
        write_adapter(
            place,
            written,
            others=every - written.keys(),
            is_transposed=any(part.is_transposed for part in parts if part.module(names) in written),
            base_model=_loadable(base),
            architectures=named.config.get("architectures") or (),
        )
        if any(part.module("base") != part.module("tuned") for part in parts):
            notes.append(
                f"the adapter fits a model whose modules are named as in {named.source}: the other side's differ"
            )
    return _report([*found, *_not_compared(pairing, *checkpoints)], notes)


def _check_options(rank: int | None, energy: float | None, dtype: torch.dtype, names: str, workers: int | None) -> None:
    if rank is not None and energy is not None:
        raise SpectraError("a rank and a share of energy were both given; give one of them")
    if (rank is not None and rank < 1) or (workers is not None and workers < 1):
        raise SpectraError("the rank and the number of workers must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise SpectraError(f"{energy:g} is no share of energy; give one above 0 and up to 1, such as 0.99")
    if dtype not in DTYPES:
        raise SpectraError(f"factors are not written in {dtype}; give float32, bfloat16 or float16")
    if names not in ("base", "tuned"):
        raise SpectraError(f"{names!r} names no side; take the names of the base or tuned")


def _loadable(base: Source) -> str | None:
    """What `from_pretrained` of the base would take: a folder or a hub id, and no single file."""
    if not isinstance(base, str | os.PathLike) or Path(base).is_file():
        return None
    return os.fspath(base)


@dataclass(frozen=True)
class _Line:
    """A row of the report, with the factors that are to be written."""

    name: str
    reason: str
    rank: int | None = None
    update_norm: float = nan
    residual: float = nan
    noise: float = nan
    recognised: bool = False
    factors: LowRank | None = field(default=None, repr=False)


def _extracted(module: Module, rank: int | None, energy: float | None, dtype: torch.dtype) -> _Line:
    """The row of one tensor, with its factors where they are to be written."""
    reason = module.why_not()
    if reason:
        norm = sqrt(sum(_distance(W, tuned) ** 2 for W, tuned in module.matched()))
        return _Line(module.name, reason if norm else UNCHANGED, update_norm=norm)
    W, tuned = module.load()
    update_norm = _distance(W, tuned)
    if update_norm == 0:
        return _Line(module.name, UNCHANGED, update_norm=0.0)
    if not isfinite(update_norm):
        return _Line(module.name, "NaN or infinite entries", update_norm=update_norm)
    D = _wide(tuned) - _wide(W)
    values = singular_values(D)
    noises = _noises(W, tuned, D, update_norm)
    found = next(filter(None, (low_rank(D, noise, values) for noise in noises)), None)
    line = _Line(module.name, "", None, update_norm, noise=found.noise if found else noises[0])
    r, reason = _rank(values, found, rank, energy)
    if r is None:
        below = update_norm <= 2 * noises[0]
        return replace(line, reason=BELOW if below else NOT_LOW)
    best = truncated(D, r)
    factors = LowRank(best.B.to(dtype), best.A.to(dtype))
    line = replace(line, rank=r, recognised=found is not None)
    if not all(bool(torch.isfinite(factor).all()) for factor in (factors.A, factors.B)):
        return replace(line, reason=f"its factors overflow {_word(dtype)}")
    return replace(line, residual=_distance(W, tuned, factors), factors=factors, reason=reason)


def _rank(values: Tensor, found: Recognised | None, rank: int | None, energy: float | None) -> tuple[int | None, str]:
    """The rank to write and what to say of it; None where the update is not of low rank and nothing was asked for."""
    most = found.rank if found else len(values)
    if rank is not None:
        asked = min(rank, most)
    elif energy is not None:
        share = torch.cumsum(values.square(), 0) / values.square().sum()
        asked = min(int((share < energy * (1 - 1e-12)).sum()) + 1, most)
    else:
        return (found.rank, "") if found else (None, "")
    return asked, "" if found and asked == found.rank else "truncated as asked"


def _noises(W: Tensor, tuned: Tensor, D: Tensor, update_norm: float) -> tuple[float, float]:
    """The expected norms of rounding in D, if training started from the stored base, and if from a finer one.

    In the first case only W' was rounded, and the merged product B A before it.
    """
    fine, coarse = _digits(tuned), _digits(W)
    sides = [
        rounding(_wide(X).to(D.dtype), D, torch.float64, dtype).floor * _distance(X)
        for X, dtype in ((tuned, fine), (W, coarse))
    ]
    own = hypot(sides[0], torch.finfo(fine).eps * update_norm / sqrt(12))
    return own, hypot(own, sides[1])


def _digits(stored: Tensor) -> torch.dtype:
    """The narrowest dtype that holds every entry: a model that was merged in bfloat16 may be stored in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        if dtype.itemsize < stored.dtype.itemsize and torch.equal(stored.to(dtype).to(stored.dtype), stored):
            return dtype
    return stored.dtype


def _wide(stored: Tensor) -> Tensor:
    """A stored matrix as the numerics take it."""
    return stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)


def _distance(W: Tensor, tuned: Tensor | None = None, update: LowRank | None = None) -> float:
    """||W' - W - c B A||_F in float64 (||W||_F without W'), by blocks of rows, 2 m n r flops."""
    squares, step = 0.0, max(1, BLOCK // W.shape[1])
    for start in range(0, W.shape[0], step):
        rows = slice(start, start + step)
        rest = W[rows].double()
        if tuned is not None:
            rest = tuned[rows].double() - rest
        if update is not None:
            rest = rest - update.c * matmul(update.B[rows].double(), update.A.double())
        squares += float(torch.linalg.vector_norm(rest)) ** 2
    return sqrt(squares)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_compared(pairing: Pairing, base: Checkpoint, tuned: Checkpoint) -> list[_Line]:
    """Rows for what had no counterpart, and for vectors and the like that changed: the adapter does not carry them."""
    left_out = find_matrices(base.tensors, base.config)[1]
    lines = [
        _Line(item.name, item.reason)
        for item in pairing.unmatched
        if item.reason != left_out.get(item.name) and not item.reason.startswith(FILTERED)
    ]
    shapes = [{name: info.shape for name, info in side.tensors.items()} for side in (base, tuned)]
    for other, name in match_names(*shapes).partners.items():
        if name in left_out and shapes[0][name] == shapes[1][other] and not _are_equal(base[name], tuned[other]):
            lines.append(_Line(name, f"changed, and carried by no LoRA: {left_out[name]}"))
    return lines


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape, of any dtypes, hold the same numbers."""
    if one.is_floating_point() and other.is_floating_point():
        return torch.equal(one.double(), other.double())
    return one.dtype == other.dtype and torch.equal(one, other)


def _report(lines: Sequence[_Line], notes: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {
            "name": line.name,
            "rank": line.rank,
            "update_norm": line.update_norm,
            "residual": line.residual,
            "relative_residual": line.residual / line.update_norm if line.factors else nan,
            "noise": line.noise,
            "recognised": line.recognised,
            "written": line.factors is not None,
            "reason": line.reason,
        }
        for line in lines
    ]
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(
        {"rank": "Int64", "name": "str", "reason": "str", "recognised": "bool", "written": "bool"}
    )
    frame.attrs["notes"] = list(notes)
    return frame

"""One weight matrix: its shift, and everything that is said beside it, from weights and the moments of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spectra.checkpoints import Checkpoint
from spectra.features.accumulator import CovarianceAccumulator, CrossAccumulator
from spectra.features.sites import expanded
from spectra.linalg.lowrank import LowRank
from spectra.linalg.svd import NotFiniteError, describe_not_finite
from spectra.matrices import Matrix
from spectra.measures.covariance import (
    Likeness,
    Shift,
    feature_basis,
    likeness,
    shift,
    slice_shares,
    weight_basis,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spectra.pairing import Pair

    Array = NDArray[np.float64]

MOST_OUTPUTS = 8192  # of a layer all of whose directions are taken
LEADING = 512  # directions of a layer with more outputs
MOST_DECOMPOSED = 4096  # order of the decompositions behind the Bures-Wasserstein distance


@dataclass(frozen=True)
class Question:
    """What the caller chose. top None: all directions, and the leading 512 of a layer with more than 8192 outputs."""

    basis: str
    centred: bool
    top: int | None
    slices: int
    device: torch.device


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's inputs.

    Attributes:
        base: moments of the base's; None for white inputs (mean 0, covariance I).
        tuned: moments of the tuned model's own; None where both see the base's.
        cross: of the two together; None where it was not streamed.
        groups: of a convolution.
    """

    base: CovarianceAccumulator | None = None
    tuned: CovarianceAccumulator | None = None
    cross: CrossAccumulator | None = None
    groups: int = 1


@dataclass(frozen=True)
class MeasuredShift:
    """The rows of one matrix: a value per column of `layers`, an array per column of `components` and `slices`."""

    layer: dict[str, Any]
    components: dict[str, Array | NDArray[np.intp]]
    slices: dict[str, Array | NDArray[np.intp]]


def measure_shift(pair: Pair, inputs: Inputs, question: Question) -> tuple[MeasuredShift, Shift]:
    """Everything that is reported of one matrix, and its Delta in parts.

    Raises: SpectraError where a weight holds NaN or infinite entries.
    Cost: see `spectra.measures.covariance`; float64 throughout.
    """
    stored = pair.load_base().to(question.device)
    W, D = _weights(pair, stored, question.device, inputs.groups)
    b, db = (x.to(question.device) for x in _biases(pair))
    covariance, covariance_tuned = (_covariance(x, question.device) for x in (inputs.base, inputs.tuned))
    if question.centred:
        seen = W, D, covariance, covariance_tuned
    elif not (bool(b.any()) or bool(db.any())):
        seen = W, D, _second_moment(inputs.base, question.device), _second_moment(inputs.tuned, question.device)
    else:
        seen = (
            torch.cat([W, b[:, None]], dim=1),
            torch.cat([D, db[:, None]], dim=1),
            _augmented(inputs.base, W),
            None if inputs.tuned is None else _augmented(inputs.tuned, W),
        )
    Q = _directions(pair, stored, seen[0], seen[2], question)
    found = shift(seen[0], seen[1], Q, seen[2], seen[3])
    alike = _alike(W, D, covariance, covariance_tuned, inputs)
    moved = float(torch.linalg.vector_norm(_mean_shift(W, D, db, inputs)))
    held = float(found.variance.sum()) / found.trace if found.trace > 0 else float("nan")
    note = ""
    if Q.shape[1] < min(W.shape):
        note = f"the {Q.shape[1]} leading of {min(W.shape)} directions, which hold {held:.1%} of trace(Sigma_Y)"
    layer = {
        "note": "; ".join(filter(None, (pair.note, note))),
        "samples": inputs.base.count if inputs.base else 0,
        "directions": Q.shape[1],
        "base_norm": float(torch.linalg.vector_norm(W)),
        "update_norm": float(torch.linalg.vector_norm(D)),
        "held_share": held,
        **_sizes(found),
        "cka": alike.cka,
        "bures_distance": alike.bures,
        "relative_bures_distance": _ratio(alike.bures, sqrt(max(found.trace, 0.0))),
        "mean_shift": moved,
        "relative_mean_shift": _ratio(moved, sqrt(max(found.trace, 0.0))),
    }
    return MeasuredShift(layer, _components(found), _slices(found, question.slices)), found


def _weights(pair: Pair, stored: Tensor, device: torch.device, groups: int) -> tuple[Tensor, Tensor]:
    """W and D (m, n) in float64; of a grouped convolution as the block-diagonal matrices that meet all channels."""
    tuned = pair.load_tuned()
    W = stored.double()
    if isinstance(tuned, LowRank):
        D = LowRank(tuned.B.to(device, torch.float64), tuned.A.to(device, torch.float64), tuned.c).dense()
    else:
        D = tuned.to(device, torch.float64) - W
    for X, what, source in ((W, pair.matrix.tensor, pair.base.source), (D, pair.tuned_tensor, pair.tuned.source)):
        if not bool(torch.isfinite(X).all()):
            raise NotFiniteError(f"{what!r} in {source} holds {describe_not_finite(X)}; save it again from a sound run")
    return expanded(W, groups), expanded(D, groups)


def _biases(pair: Pair) -> tuple[Tensor, Tensor]:
    """b and b' - b (m,), float64; zeros where there is none."""
    base = _bias(pair.base, pair.matrix.tensor, pair.matrix)
    tuned = base if pair.tuned is pair.base else _bias(pair.tuned, pair.tuned_tensor, pair.tuned_matrix)
    none = torch.zeros(pair.matrix.rows, dtype=torch.float64)
    if base is None and tuned is None:
        return none, none
    if tuned is None:  # an adapter holds a bias only where it replaces it
        return (none if base is None else base), (none if pair.is_low_rank or base is None else -base)
    return (none, tuned) if base is None else (base, tuned - base)


def _bias(checkpoint: Checkpoint, tensor: str, matrix: Matrix) -> Tensor | None:
    """The bias beside a weight, its rows cut as the weight's are."""
    if not tensor.endswith("weight"):
        return None
    stem, _, leaf = tensor.removesuffix("weight").rpartition(".")
    attention = {"q_proj_": 0, "k_proj_": 1, "v_proj_": 2}.get(leaf)
    name = tensor.removesuffix("weight") + "bias"
    if attention is not None:  # three weights, and one bias for them
        name = f"{stem}.in_proj_bias" if stem else "in_proj_bias"
    name = checkpoint.tied.get(name, name)
    if name not in checkpoint:
        return None
    bias = checkpoint[name].double()
    if attention is not None:
        return bias.chunk(3)[attention]
    return bias if matrix.block is None else matrix.block.take(bias[:, None])[:, 0]


def _covariance(moments: CovarianceAccumulator | None, device: torch.device) -> Tensor | None:
    return None if moments is None else moments.covariance().to(device)


def _second_moment(moments: CovarianceAccumulator | None, device: torch.device) -> Tensor | None:
    return None if moments is None else moments.covariance(centred=False).to(device)


def _augmented(moments: CovarianceAccumulator | None, W: Tensor) -> Tensor:
    """E[[x; 1] [x; 1]^T] (n + 1, n + 1), which brings the bias into the uncentred features."""
    n = W.shape[1]
    second = torch.eye(n + 1, dtype=torch.float64, device=W.device)
    if moments is not None:
        second[:n, :n] = moments.covariance(centred=False).to(W.device)
        second[:n, n] = second[n, :n] = moments.mean.to(W.device)
    return second


def _directions(pair: Pair, stored: Tensor, W: Tensor, inputs: Tensor | None, question: Question) -> Tensor:
    """Q (m, k). A grouped convolution's weight has the basis of its flattened kernels, as in a comparison."""
    shape = stored.shape if question.basis == "weight" else W.shape
    k = min(shape)
    if question.top is not None:
        k = min(k, question.top)
    elif W.shape[0] > MOST_OUTPUTS:
        k = min(k, LEADING)
    if question.basis == "feature":
        return feature_basis(W, inputs, k)
    return weight_basis(stored if stored.dtype == torch.float64 else stored.float(), k).to(W.device)


def _alike(
    W: Tensor, D: Tensor, covariance: Tensor | None, covariance_tuned: Tensor | None, inputs: Inputs
) -> Likeness:
    """CKA and Bures-Wasserstein distance; where nothing moved they are known."""
    if inputs.tuned is None:
        if not bool(D.any()):
            return Likeness(1.0, 0.0)
        same = torch.eye(W.shape[1], dtype=W.dtype, device=W.device) if covariance is None else covariance
        return likeness(W, W + D, covariance, covariance, same, MOST_DECOMPOSED)
    cross = None if inputs.cross is None else inputs.cross.covariance().to(W.device)
    return likeness(W, W + D, covariance, covariance_tuned, cross, MOST_DECOMPOSED)


def _mean_shift(W: Tensor, D: Tensor, db: Tensor, inputs: Inputs) -> Tensor:
    """E[y'] - E[y] = D mean + W' (mean' - mean) + b' - b, (m,)."""
    if inputs.base is None:
        return db
    mean = inputs.base.mean.to(W.device)
    moved = D @ mean + db
    return moved if inputs.tuned is None else moved + (W + D) @ (inputs.tuned.mean.to(W.device) - mean)


def _sizes(found: Shift) -> dict[str, float]:
    """The columns about the size of the shift and where it lies."""
    energy, inside = found.energy, float(found.total.square().sum())
    diagonal = float(torch.diagonal(found.total).square().sum())
    return {
        "variance_base": found.trace,
        "variance_tuned": found.trace_tuned,
        "shift_norm": sqrt(energy),
        "relative_shift": _ratio(sqrt(energy), found.norm),
        "relative_own": _ratio(sqrt(found.own_energy), found.norm),
        "relative_inherited": _ratio(sqrt(found.inherited_energy), found.norm),
        "own_share": _share(found.own_energy + found.product, energy),
        "inherited_share": _share(found.inherited_energy + found.product, energy),
        "shift_diagonal_share": _share(diagonal, energy),
        "shift_off_diagonal_share": _share(max(inside - diagonal, 0.0), energy),
        "shift_outside_share": _share(max(energy - inside, 0.0), energy),
    }


def _components(found: Shift) -> dict[str, Array | NDArray[np.intp]]:
    delta = found.total
    diagonal = torch.diagonal(delta)
    off = (delta - torch.diag(diagonal)).square().sum(1)
    own = torch.diagonal(found.own)
    inherited = torch.zeros_like(own) if found.inherited is None else torch.diagonal(found.inherited)
    columns = {
        "variance": found.variance,
        "diagonal": diagonal,
        "off_diagonal_energy": off,
        "own_diagonal": own,
        "inherited_diagonal": inherited,
    }
    arrays: dict[str, Array | NDArray[np.intp]] = {"component": np.arange(len(diagonal))}
    arrays |= {name: column.cpu().numpy().copy() for name, column in columns.items()}
    for name in columns:
        normalised = "variance_share" if name == "variance" else f"normalised_{name}"
        by = found.trace**2 if name == "off_diagonal_energy" else found.trace
        arrays[normalised] = arrays[name] / by if by > 0 else np.full(len(diagonal), np.nan)
    return arrays


def _slices(found: Shift, slices: int) -> dict[str, Array | NDArray[np.intp]]:
    shares = slice_shares(found.total, found.variance, slices)
    energy = found.energy or 1.0
    trace = found.trace if found.trace > 0 else float("nan")
    return {
        "slice": np.arange(len(shares.bounds) - 1),
        "start": shares.bounds[:-1],
        "stop": shares.bounds[1:],
        "variance_share": shares.variance / trace,
        "normalised_diagonal": shares.diagonal / trace,
        "shift_share": (shares.block + shares.cross / 2) / energy,
        "shift_block_share": shares.block / energy,
        "shift_cross_share": shares.cross / energy,
    }


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else float("nan")


def _share(energy: float, total: float) -> float:
    return energy / total if total > 0 else 0.0

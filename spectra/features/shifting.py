"""The main job: stream what a model's layers take in, and say how fine-tuning shifted the features' covariance."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

import spectra
from spectra.checkpoints import Adapter, Checkpoint, open_checkpoint
from spectra.engines import local
from spectra.errors import SpectraError
from spectra.features.layer import Inputs, MeasuredShift, Question, measure_shift
from spectra.features.models import is_factory, one_device
from spectra.features.streaming import Ask, Streamed, described, stream
from spectra.linalg.lapack import LapackError
from spectra.measures.covariance import Shift
from spectra.pairing import Pair, Pairing, Unmatched, pair
from spectra.pairing.selection import matches
from spectra.shift import CovarianceShift, KeptMatrices

if TYPE_CHECKING:
    from spectra.features.tables import Row

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


def covariance_shift(
    base: Any,
    tuned: Any,
    batches: Batches | None = None,
    *,
    basis: Literal["weight", "feature"] = "weight",
    mode: Literal["same_inputs", "end_to_end"] = "same_inputs",
    centred: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    transposed: Sequence[str] | None = None,
    top: int | None = None,
    slices: int = 8,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    functional: bool = True,
    matrices: str | Sequence[str] = "*",
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> CovarianceShift:
    """How fine-tuning shifted the covariance of every layer's features, Delta = Q^T (Sigma'_Y - Sigma_Y) Q.

    Features are y = W x + b; the covariance is that of the population, over all positions of all batches. Two parts
    sum to the whole: what the layer's own weights moved, and what it inherited through its inputs.

    Args:
        base, tuned: an `nn.Module`, or a function without arguments that builds one. Where one of them is a function,
            the base runs, is let go of, and then the tuned model is built: they are never in memory together. `tuned`
            may be a `PeftModel` of a copy of the base. With `mode="same_inputs"` and no functional check, and without
            batches, it may be whatever `compare` opens; the base too, without batches.
        batches: an iterable of batches that can be gone through again, or a function that returns one. None: the exact
            answer for white inputs (mean 0, covariance I), from the weights alone.
        basis: "weight": Q = U, the left singular vectors of the base's weight, as in `compare`; "feature": Q = the
            leading eigenvectors of Sigma_Y.
        mode: "same_inputs": both weights see the base's x, so nothing is inherited; "end_to_end": each sees its own.
        centred: covariances about the mean; False: second moments, of which biases are a part.
        include, exclude, transposed: globs, as in `compare`.
        top: directions of Q; by default min(m, n), and the leading 512 of a layer with more than 8192 outputs.
        slices: into how many slices the directions are cut.
        device: "auto" runs modules where they lie; a name moves them there for the run, and back.
        dtype: of the products within a batch. torch.float64 is exact; by default float32, and float64 for float64
            inputs: covariances are then good to 1e-7 as a rule, and what is inherited under 1e-6 of ||Sigma_Y|| is
            rounding.
        forward: called as forward(model, batch) in place of the default: a mapping as keywords (without `labels` where
            the model takes none), of a tuple or list the elements that the model requires, anything else as it is.
        mask: mask(batch) -> (batch, sequence), zero at padding, or None; by default the batch's `attention_mask`. Of an
            encoder with a decoder it is the encoder's; the decoder goes by the batch's `decoder_attention_mask`, or by
            labels of -100. `provenance["notes"]` names the matrices whose inputs a mask does not fit.
        functional: also run the tuned model and compare what the two answer (`FunctionalCheck`).
        matrices: globs on names; the Delta of the matrices that match are kept on disk for `CovarianceShift.matrix`, in
            a temporary folder that goes with the result: 8 k^2 bytes each, 16 k^2 end to end.
        workers: matrices at a time after the run; by default one a core.
        progress: called with (done, in all or 0 where unknown, words) for batches, then for matrices.
    Returns: a `CovarianceShift`; what could not be measured is in its `unmatched`.
    Raises: SpectraError for models that do not match, batches that do not fit, and NaN in a layer's inputs.
    Cost: n^2 flops for each input of n entries of each position; memory 8 n^2 bytes for each distinct input.

    Source: Quercia, Bangun, Assent, Scharr, *Least but not Last* (arXiv 2602.03493), Eq. 11, in our reading.

    >>> import torch
    >>> base, tuned = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = base.weight.copy_(torch.diag(torch.tensor([2.0, 1.0]))), tuned.weight.copy_(2 * base.weight)
    >>> shift = covariance_shift(base, tuned, [torch.tensor([[1.0, 1.0], [-1.0, 1.0]])])
    >>> shift.components[["variance", "diagonal"]].round(6).values.tolist()
    [[4.0, 12.0], [0.0, 0.0]]
    """
    started = time.perf_counter()
    include, exclude = ([given] if isinstance(given, str) else list(given) for given in (include, exclude))
    _check(basis, mode, top, slices, dtype, workers)
    where = one_device(device)
    question = Question(basis, centred, top, slices, where)

    def paired(one: Checkpoint, other: Checkpoint) -> Pairing:
        return pair(one, other, include, exclude, transposed)

    with TemporaryDirectory(prefix="spectra-", ignore_cleanup_errors=True) as folder:
        if batches is None:
            found = _without_data(base, tuned, paired)
        else:
            ask = Ask(mode, device, dtype, forward, mask, functional, Path(folder), paired, progress)
            found = stream(base, tuned, batches, ask)
        kept = KeptMatrices.temporary()
        patterns = [matrices] if isinstance(matrices, str) else list(matrices)
        rows, failed = _measured(found, question, kept, patterns, workers, progress)
    unmatched = [*found.pairing.unmatched, *found.unseen, *failed]
    if not rows:
        reasons = "; ".join(dict.fromkeys(f"{item.name}: {item.reason}" for item in [*found.unseen, *failed][:3]))
        raise SpectraError(f"of no weight matrix the shift could be measured ({reasons}); look at the models given")
    provenance = {
        "spectra": spectra.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": found.base,
        "tuned": found.tuned,
        "mode": mode if batches is not None else "data_free",
        "basis": basis,
        "centred": centred,
        "batches": found.batches,
        "samples": found.samples,
        "options": {
            "include": include,
            "exclude": exclude,
            "transposed": "auto" if transposed is None else list(transposed),
            "top": top,
            "slices": slices,
            "dtype": str(dtype).removeprefix("torch.") if dtype else "auto",
            "functional": functional,
        },
        "device": device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(time.perf_counter() - started, 3),
        "notes": list(dict.fromkeys(found.notes)),
    }
    return _tabulated(rows, unmatched, found, provenance, kept)


def _check(basis: str, mode: str, top: int | None, slices: int, dtype: torch.dtype | None, workers: int | None) -> None:
    if basis not in ("weight", "feature"):
        raise SpectraError(f"basis is {basis!r}; give 'weight' or 'feature'")
    if mode not in ("same_inputs", "end_to_end"):
        raise SpectraError(f"mode is {mode!r}; give 'same_inputs' or 'end_to_end'")
    if dtype not in (None, torch.float32, torch.float64):
        raise SpectraError(f"dtype is {dtype!r}, which the products cannot have; give torch.float32 or torch.float64")
    for name, given in (("slices", slices), ("top", top), ("workers", workers)):
        is_count = given is not None and hasattr(given, "__index__") and given >= 1
        if not is_count and (given is not None or name == "slices"):
            raise SpectraError(f"{name} is {given!r}, and slices, top and workers must be at least 1, in whole numbers")


def _without_data(base: Any, tuned: Any, paired: Callable[[Checkpoint, Checkpoint], Pairing]) -> Streamed:
    """Every pair with white inputs."""
    one, other = (open_checkpoint(each() if is_factory(each) else each) for each in (base, tuned))
    if isinstance(one, Adapter):
        raise SpectraError(f"{one.source} is an adapter and no base; give the model that it was trained on first")
    pairing = paired(one, other)
    inputs: dict[str, Inputs] = {}
    unseen: list[Unmatched] = []
    for item in pairing.pairs:
        if item.matrix.role in ("token_embedding", "position_embedding"):
            reason = "an embedding: its rows are looked up, not multiplied by an input"
            unseen.append(Unmatched(item.matrix.name, "base", reason))
        else:
            inputs[item.matrix.name] = Inputs()
    notes = (*one.notes, *other.notes, *pairing.notes, "without data: for white inputs, of mean 0 and covariance I")
    return Streamed(pairing, inputs, unseen, notes=list(notes), base=described(one), tuned=described(other))


def _measured(
    found: Streamed,
    question: Question,
    kept: KeptMatrices,
    patterns: Sequence[str],
    workers: int | None,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[list[Row], list[Unmatched]]:
    """Every matrix, several at a time; what fails fails alone and says why."""
    pairs = [item for item in found.pairing.pairs if item.matrix.name in found.inputs]
    order = sorted(pairs, key=lambda item: item.matrix.rows * item.matrix.columns, reverse=True)

    def work(item: Pair) -> tuple[MeasuredShift, Shift] | str:
        try:
            return measure_shift(item, found.inputs[item.matrix.name], question)
        except (
            SpectraError,
            LapackError,
            OSError,
            MemoryError,
            torch.OutOfMemoryError,
        ) as error:
            return str(error) or type(error).__name__

    rows: dict[str, Row] = {}
    failed: list[Unmatched] = []
    count = workers or (1 if question.device.type == "cuda" else local.available_cores())
    for done, (index, outcome) in enumerate(local.run(work, order, count), start=1):
        matrix = order[index].matrix
        if isinstance(outcome, str):
            failed.append(Unmatched(matrix.name, "base", outcome))
        else:
            measured, delta = outcome
            rows[matrix.name] = matrix, measured
            if any(matches(matrix, pattern) for pattern in patterns):
                kept.keep(matrix.name, delta.own, delta.inherited)
        if progress:
            progress(done, len(order), matrix.name)
    return [rows[item.matrix.name] for item in pairs if item.matrix.name in rows], failed


def _tabulated(
    rows: Sequence[Row],
    unmatched: Sequence[Unmatched],
    found: Streamed,
    provenance: Mapping[str, Any],
    kept: KeptMatrices,
) -> CovarianceShift:
    import pandas as pd

    from spectra.features.functional import COLUMNS
    from spectra.features.tables import components_frame, layers_frame, slices_frame, unmatched_frame

    how = {key: provenance[key] for key in ("mode", "basis", "centred")}
    nothing = pd.DataFrame({"sample": pd.Series(dtype="int64")} | {c: pd.Series(dtype="float64") for c in COLUMNS[1:]})
    return CovarianceShift(
        layers=layers_frame(rows, how),
        components=components_frame(rows),
        slices=slices_frame(rows),
        unmatched=unmatched_frame(unmatched),
        functional=nothing if found.functional is None else found.functional,
        provenance=provenance,
        matrices=kept,
    )

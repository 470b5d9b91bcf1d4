"""Both models over the data, together or one after the other: the moments of what every layer takes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectra.checkpoints import Adapter, Checkpoint, open_checkpoint
from spectra.errors import SpectraError
from spectra.features.capture import Capture
from spectra.features.functional import FunctionalCheck
from spectra.features.layer import Inputs
from spectra.features.locating import sites_of_matrices
from spectra.features.models import built, is_factory, let_go, lying_on, spilled
from spectra.features.running import Counts, Forward, Mask, Pass, run
from spectra.features.sites import NotCaptured, Site
from spectra.features.together import Together
from spectra.pairing import Pairing, Unmatched

if TYPE_CHECKING:
    import pandas as pd

TUNED_IS_NO_MODEL = "functional check: not made, since the tuned model was given as weights only"

Sites = Mapping[str, Site]  # by name of the matrix


@dataclass(frozen=True)
class Ask:
    """What is to be streamed and how; see `covariance_shift`. `folder` is for what must wait on disk."""

    mode: str
    device: str
    dtype: torch.dtype | None
    forward: Forward | None
    mask: Mask | None
    functional: bool
    folder: Path
    paired: Callable[[Checkpoint, Checkpoint], Pairing]
    progress: Callable[[int, int, str], None] | None

    @property
    def is_end_to_end(self) -> bool:
        return self.mode == "end_to_end"


@dataclass(frozen=True)
class Streamed:
    """The inputs of every matrix that was seen (by name), and why others were not."""

    pairing: Pairing
    inputs: Mapping[str, Inputs]
    unseen: Sequence[Unmatched]
    functional: pd.DataFrame | None = None
    batches: int = 0
    samples: int = 0
    notes: Sequence[str] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)


def stream(base: Any, tuned: Any, batches: Iterable[Any] | Callable[[], Iterable[Any]], ask: Ask) -> Streamed:
    """Run what has to run, and gather the moments by matrix. Raises: SpectraError, see `covariance_shift`."""
    if not (isinstance(tuned, nn.Module) or is_factory(tuned)):
        if ask.is_end_to_end:
            raise SpectraError(
                f"end to end, both models run, and the tuned one was given as a {type(tuned).__name__}; "
                "give a module or a function that builds one, or ask for mode='same_inputs'"
            )
        return _apart(base, None, open_checkpoint(tuned), batches, ask)
    if is_factory(base) or is_factory(tuned):
        return _apart(base, tuned, None, batches, ask)
    return _together(built(base, "base"), built(tuned, "tuned model"), batches, ask)


def _together(base: nn.Module, tuned: nn.Module, batches: Any, ask: Ask) -> Streamed:
    """Both models are at hand: one pass over the batches, the base first on each."""
    one, other = _opened_base(base), open_checkpoint(tuned)
    pairing = ask.paired(one, other)
    sites, unseen = _base_sites(base, pairing)
    sites_tuned, unseen_tuned = _tuned_sites(tuned, pairing, ask)
    streams = [(sites[name].key, site.key) for name, site in sites_tuned.items() if name in sites]
    cross = Together(streams, ask.dtype or torch.float32)
    check = FunctionalCheck(ask.folder) if ask.functional else None
    passes = [
        Pass(
            "base",
            base,
            list(sites.values()),
            check.base if check else None,
            cross.hear_base if ask.is_end_to_end else None,
        )
    ]
    if ask.is_end_to_end or check:
        passes.append(
            Pass("tuned", tuned, list(sites_tuned.values()), check.tuned if check else None, cross.hear_tuned)
        )
    with lying_on(base, ask.device), lying_on(tuned, ask.device):
        captures, counts = _run(passes, batches, ask, "both models", cross.next_batch)
    seen = _Seen(sites, captures[0], sites_tuned, captures[1] if ask.is_end_to_end else None, cross)
    return _gathered(pairing, seen, [*unseen, *unseen_tuned], check, counts, one, other, ())


def _apart(base: Any, tuned: Any, weights: Checkpoint | None, batches: Any, ask: Ask) -> Streamed:
    """One model after the other; the base is let go of before the tuned one is built, or read from `weights`."""
    check = FunctionalCheck(ask.folder) if ask.functional and weights is None else None
    runs_twice = ask.is_end_to_end or check is not None
    if runs_twice and isinstance(batches, Iterator):
        raise SpectraError(
            "the batches are an iterator, which can be gone through once, and both models have to see them; "
            "give a list, a DataLoader, or a function that returns an iterator"
        )
    notes = [TUNED_IS_NO_MODEL] if ask.functional and weights is not None else []
    model = built(base, "base")
    one = _opened_base(model)
    pairing = ask.paired(one, one if weights is None else weights)  # an adapter of factors alone is an empty mapping
    sites, unseen = _base_sites(model, pairing)
    of_base = [Pass("base", model, list(sites.values()), check.base if check else None)]
    with lying_on(model, ask.device):
        (capture, *_), counts = _run(of_base, batches, ask, "base")
    if weights is not None:
        seen = _Seen(sites, capture, {}, None, None)
        return _gathered(pairing, seen, unseen, check, counts, one, weights, notes)
    if is_factory(base):
        del pairing, of_base, model  # all that holds the base's weights
        one = spilled(one, ask.folder)
        let_go()
    model = built(tuned, "tuned model")
    other = open_checkpoint(model)
    pairing = ask.paired(one, other)
    sites_tuned, unseen_tuned = _tuned_sites(model, pairing, ask)
    capture_tuned = None
    if runs_twice:
        of_tuned = [Pass("tuned", model, list(sites_tuned.values()), check.tuned if check else None)]
        with lying_on(model, ask.device):
            (capture_tuned, *_), again = _run(of_tuned, batches, ask, "tuned model")
        if again != counts:
            raise SpectraError(
                f"the base saw {counts.batches} batches of {counts.samples} samples and the tuned model "
                f"{again.batches} of {again.samples}; give batches that come out the same each time"
            )
    if ask.is_end_to_end:
        notes.append("cka: not known, since it takes both models in memory at once; give both as modules")
    seen = _Seen(sites, capture, sites_tuned, capture_tuned if ask.is_end_to_end else None, None)
    known = {item.matrix.name for item in pairing.pairs}
    unseen = [item for item in unseen if item.name in known]
    return _gathered(pairing, seen, [*unseen, *unseen_tuned], check, counts, one, other, notes)


@dataclass(frozen=True)
class _Seen:
    """What was captured, under which names of streams. `tuned` None: both models see the base's inputs."""

    sites: Sites
    base: Capture
    sites_tuned: Sites
    tuned: Capture | None
    cross: Together | None

    def inputs(self, name: str) -> Inputs:
        """Of one matrix. Raises: NotCaptured where its modules were not called."""
        site = self.sites[name]
        moments, tuned, cross = self.base.inputs(site.key), None, None
        if moments is None or not moments.count:
            raise NotCaptured("no batch brought it an input that counts")
        if self.tuned is not None:
            other = self.sites_tuned[name]
            tuned = self.tuned.inputs(other.key)
            if tuned is None or not tuned.count:
                raise NotCaptured("no batch brought it an input that counts in the tuned model")
            cross = self.cross.of(site.key, other.key) if self.cross else None
        return Inputs(moments, tuned, cross, site.groups)

    def notes(self) -> list[str]:
        """Where padding may have been counted."""
        sides = [(self.sites, self.base), *([(self.sites_tuned, self.tuned)] if self.tuned else [])]
        found = {name: None for sites, side in sides for name, site in sites.items() if site.key in side.unmasked}
        if not found:
            return []
        first, more = ", ".join([*found][:3]), len(found) - 3
        return [
            f"mask: not known of the inputs of {first}{f' and {more} more' if more > 0 else ''}, since it fits neither "
            "their shape nor their side of the model: all their positions count, padding among them"
        ]


def _gathered(
    pairing: Pairing,
    seen: _Seen,
    unseen: Sequence[Unmatched],
    check: FunctionalCheck | None,
    counts: Counts,
    one: Checkpoint,
    other: Checkpoint,
    notes: Iterable[str],
) -> Streamed:
    """The moments by matrix."""
    inputs: dict[str, Inputs] = {}
    reasons = list(unseen)
    missing = {item.name for item in unseen}
    for item in pairing.pairs:
        name = item.matrix.name
        if name in missing:
            continue
        try:
            inputs[name] = seen.inputs(name)
        except NotCaptured as reason:
            reasons.append(Unmatched(name, "base", str(reason)))
    return Streamed(
        pairing=pairing,
        inputs=inputs,
        unseen=reasons,
        functional=check.result() if check else None,
        batches=counts.batches,
        samples=counts.samples,
        notes=[*one.notes, *other.notes, *pairing.notes, *notes, *seen.notes(), *(check.notes if check else ())],
        base=described(one),
        tuned=described(other),
    )


def _run(
    passes: Sequence[Pass], batches: Any, ask: Ask, what: str, after: Callable[[], None] | None = None
) -> tuple[list[Capture], Counts]:
    given = batches() if callable(batches) else batches
    if isinstance(given, Tensor | Mapping | str) or not isinstance(given, Iterable):
        raise SpectraError(
            f"the batches are a single {type(given).__name__}; give a list of batches, a DataLoader or the like"
        )
    total = len(given) if isinstance(given, Sized) else 0

    def after_batch(done: int) -> None:
        if after:
            after()
        if ask.progress:
            ask.progress(done, total, what)

    dtype = ask.dtype or torch.float32
    return run(passes, given, forward=ask.forward, mask=ask.mask, dtype=dtype, after_batch=after_batch)


def _opened_base(model: nn.Module) -> Checkpoint:
    checkpoint = open_checkpoint(model)
    if isinstance(checkpoint, Adapter):
        raise SpectraError(f"the base is a {checkpoint.source}, adapter and all; give the model without it")
    return checkpoint


def _base_sites(model: nn.Module, pairing: Pairing) -> tuple[dict[str, Site], list[Unmatched]]:
    """Where the base takes in what its matrices multiply."""
    return sites_of_matrices(
        model, [(item.matrix.name, item.matrix, item.base, item.matrix.tensor) for item in pairing.pairs]
    )


def _tuned_sites(model: nn.Module, pairing: Pairing, ask: Ask) -> tuple[dict[str, Site], list[Unmatched]]:
    """Where the tuned model takes in what the base's matrices do; nowhere, where only the base's inputs count."""
    if not ask.is_end_to_end:
        return {}, []
    return sites_of_matrices(
        model,
        [(item.matrix.name, item.tuned_matrix, item.tuned, item.tuned_tensor) for item in pairing.pairs],
        side="tuned",
    )


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What provenance says of a checkpoint."""
    return {"source": checkpoint.source, "kind": type(checkpoint).__name__.lower(), "tensors": len(checkpoint)}

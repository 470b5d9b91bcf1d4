"""The main job: hold tuned checkpoints against their base, matrix by matrix."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import spectra
from spectra.cache import SpectrumCache
from spectra.checkpoints import Checkpoint, fingerprint
from spectra.comparison import Comparison
from spectra.engines import local
from spectra.engines.batching import batched
from spectra.engines.devices import ieee_products, named_devices, spread
from spectra.engines.studying import opened
from spectra.errors import SpectraError
from spectra.jobs import Job, Outcome, Settings
from spectra.labels import labelled
from spectra.linalg.products import gemm_library
from spectra.loading import grouped
from spectra.pairing import Pairing, Unmatched

Source = Any  # a path, a hub id, a state dict, an nn.Module, or an open Checkpoint
NO_FLOAT64 = "device mps has no float64 arithmetic: the matrices were decomposed on the CPU"


class ComparisonInterrupted(KeyboardInterrupt):
    """Ctrl-C while comparing. `comparison` holds the rows that were finished."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__("interrupted")
        self.comparison = comparison


def compare(
    base: Source,
    tuned: Source | Sequence[Source] | Mapping[str, Source],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    transposed: Sequence[str] | None = None,
    device: str | Sequence[str] = "auto",
    dtype: torch.dtype | None = None,
    slices: int = 8,
    top: int = 10,
    epsilon: float = 0.5,
    fast: bool = False,
    workers: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_limit: int = 20 * 2**30,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """What fine-tuning did to every weight matrix, in the base's own singular basis.

    Args:
        base: a checkpoint file or folder, a state dict, an `nn.Module`, or an open `Checkpoint`.
        tuned: one such thing or a PEFT adapter folder; a sequence of them; or a mapping from labels of your choice.
            All are held against one SVD of the base.
        include, exclude: globs on matrix names (`"*.attention.*"`); what they leave out is listed in `unmatched`.
        transposed: globs on the tensors that are stored (in x out), instead of what config, names and shapes tell;
            an empty sequence: none is.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps"; or several CUDA devices that share the
            work, "cuda:0,cuda:1" or a list.
        dtype: of the products: `torch.float64` for more digits; by default float32, float64 for float64 weights and
            adapters.
        slices: into how many slices of neighbouring components block and cross energies are cut.
        top: leading triplets of the tuned matrix that are held against the base.   epsilon: threshold of an intruder.
        fast: iterate the leading triplets only. Ranks, nuclear norm and spectral shift of dense updates are missing
            then, and the rotation of updates given as factors; everything else stays.
        workers: matrices (or batches of small ones) at a time; by default one a core, and one a CUDA device.
        cache: a folder that keeps the base's spectra for later runs; it is made where there is none. Small matrices,
            which are decomposed as fast as a file is opened, are not kept.
        cache_limit: bytes in it, beyond which the least recently used spectra go.
        progress: called with (cost done, cost in all, matrix name) after each matrix.
    Returns: a `Comparison`. Matrices that cannot be compared are rows of status "failed" with the reason.
    Raises: SpectraError for input that cannot be read or matched; ComparisonInterrupted (a KeyboardInterrupt) on
        Ctrl-C.

    >>> import torch, spectra
    >>> base = {"fc.weight": torch.diag(torch.tensor([3.0, 2.0, 1.0]))}
    >>> tuned = {"fc.weight": torch.diag(torch.tensor([3.3, 2.0, 1.0]))}
    >>> float(spectra.compare(base, tuned).layers.diagonal_share[0].round(6))
    1.0
    """
    started = time.perf_counter()
    include, exclude = ([given] if isinstance(given, str) else given for given in (include, exclude))
    if dtype not in (None, torch.float32, torch.float64):
        raise SpectraError(f"dtype is {dtype!r}, which the products cannot have; give torch.float32 or torch.float64")
    if slices < 1 or top < 1 or not 0 <= epsilon <= 1 or (workers is not None and workers < 1):
        raise SpectraError("slices, top and workers must be at least 1, and epsilon must lie between 0 and 1")
    spectra_kept = SpectrumCache(cache, cache_limit) if cache is not None else None
    devices = named_devices(device)
    settings = Settings(dtype, slices, top, epsilon, fast, spectra_kept)
    models = opened(base, labelled(tuned), include, exclude, transposed)
    base_checkpoint, tuned_checkpoints, pairings = models.base, models.tuned, models.pairings
    on_cpu = devices[0].type == "cpu"
    places = spread(devices, workers or (local.available_cores() if on_cpu else len(devices)))
    units = batched([Job(group.pairs) for group in grouped(pairings)], settings, places)
    total, done = sum(job.cost for unit in units for job in unit.jobs), 0
    finished: list[list[Outcome]] = [[] for _ in units]
    described = {label: _described(checkpoint) for label, checkpoint in tuned_checkpoints.items()}
    of_base = _described(base_checkpoint)
    interrupted = False
    try:
        with ieee_products():
            for index, found in local.run_on(lambda unit, place: unit.run(settings, place), units, places):
                finished[index] = found
                for job in units[index].jobs:
                    done += job.cost
                    if progress:
                        progress(done, total, job.matrix.name)
        of_base |= _hashed(base_checkpoint)
        for label, checkpoint in tuned_checkpoints.items():
            described[label] |= _hashed(checkpoint)
    except KeyboardInterrupt:
        interrupted = True
    outcomes = _in_order(finished, pairings)
    provenance = {
        "spectra": spectra.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": of_base,
        "tuned": described,
        "options": {
            "include": list(include),
            "exclude": list(exclude),
            "transposed": "auto" if transposed is None else list(transposed),
            "dtype": str(dtype).removeprefix("torch.") if dtype else "auto",
            "slices": slices,
            "top": top,
            "epsilon": epsilon,
            "fast": fast,
        },
        "device": ",".join(map(str, devices)),
        "workers": min(len(places), max(len(units), 1)),
        "threads_per_worker": 1,
        "gemm": gemm_library() if on_cpu else "torch",
        **({} if on_cpu else {"tf32": False}),
        "cache": _cache_used(spectra_kept),
        "algorithms": _algorithms(outcomes),
        "versions": _versions(),
        "seconds": round(time.perf_counter() - started, 3),
        "interrupted": interrupted,
        "notes": [
            *dict.fromkeys((*models.notes(), *(spectra_kept.notes if spectra_kept else ()))),
            *_measured_once(outcomes),
            *([NO_FLOAT64] if "mps" in device else []),
        ],
    }
    result = _tabulated(outcomes, pairings, provenance)
    if interrupted:
        raise ComparisonInterrupted(result)
    return result


def _in_order(finished: Sequence[Sequence[Outcome]], pairings: Mapping[str, Pairing]) -> list[Outcome]:
    """Outcomes by tuned model, then in the order of the base's matrices, whatever order they finished in."""
    by_key = {(o.tuned, o.pair.matrix.name): o for outcomes in finished for o in outcomes}
    keys = ((label, item.matrix.name) for label, pairing in pairings.items() for item in pairing.pairs)
    return [by_key[key] for key in keys if key in by_key]


def _tabulated(outcomes: Sequence[Outcome], pairings: Mapping[str, Pairing], provenance: dict[str, Any]) -> Comparison:
    from spectra.frames import components_frame, layers_frame, slices_frame, unmatched_frame

    unmatched = [(label, item) for label, pairing in pairings.items() for item in pairing.unmatched]
    return Comparison(
        layers=layers_frame(outcomes),
        components=components_frame(outcomes),
        slices=slices_frame(outcomes),
        unmatched=unmatched_frame([*unmatched, *_unreached(outcomes, pairings)]),
        provenance=provenance,
    )


def _unreached(outcomes: Sequence[Outcome], pairings: Mapping[str, Pairing]) -> list[tuple[str, Unmatched]]:
    """The matrices that an interrupted run did not come to."""
    reached = {(outcome.tuned, outcome.pair.matrix.name) for outcome in outcomes}
    reason = "not reached: the run was interrupted"
    return [
        (label, Unmatched(item.matrix.name, "base", reason))
        for label, pairing in pairings.items()
        for item in pairing.pairs
        if (label, item.matrix.name) not in reached
    ]


def _hashed(checkpoint: Checkpoint) -> dict[str, Any]:
    """The files with their SHA-256. A file that went away while the work was done costs its hash, not the work."""
    try:
        return fingerprint(checkpoint)
    except (SpectraError, OSError) as error:
        return {"sha256": None, "not_hashed": str(error)}


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"source": checkpoint.source, "kind": type(checkpoint).__name__.lower(), "tensors": len(checkpoint)}


def _cache_used(cache: SpectrumCache | None) -> dict[str, Any] | None:
    if cache is None:
        return None
    return {"folder": str(cache.folder), "hits": cache.hits, "misses": cache.misses}


def _algorithms(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Which solver ran, and for how many matrices."""
    counted = {}
    for side in ("base", "tuned"):
        counted[side] = dict(Counter(o.layer[f"{side}_algorithm"] for o in outcomes if o.measured))
    return counted


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "scipy", "pandas", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _measured_once(outcomes: Sequence[Outcome]) -> list[str]:
    """Which tuned models hold the same matrices."""
    twins = Counter((o.tuned, o.same_as) for o in outcomes if o.same_as)
    return [
        f"{label}: bit-identical to {first} in {count} of the matrices, which were measured once for both"
        for (label, first), count in twins.items()
    ]

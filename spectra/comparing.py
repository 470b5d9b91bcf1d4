"""The main job: hold tuned checkpoints against their base, matrix by matrix."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import spectra
from spectra.checkpoints import Checkpoint, fingerprint, open_checkpoint
from spectra.comparison import Comparison
from spectra.engines import local
from spectra.errors import SpectraError
from spectra.jobs import Job, Outcome, Settings
from spectra.linalg.products import gemm_library
from spectra.pairing import Pairing, pair

Source = Any  # a path, a hub id, a state dict, an nn.Module, or an open Checkpoint


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
    device: str = "auto",
    dtype: torch.dtype | None = None,
    slices: int = 8,
    top: int = 10,
    epsilon: float = 0.5,
    fast: bool = False,
    workers: int | None = None,
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
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps".
        dtype: of the products: `torch.float64` for more digits; by default float32, float64 for float64 weights and
            adapters.
        slices: into how many slices of neighbouring components block and cross energies are cut.
        top: leading triplets of the tuned matrix that are held against the base.   epsilon: threshold of an intruder.
        fast: iterate the leading triplets only. Ranks, nuclear norm and spectral shift of dense updates are missing
            then, and the rotation of updates given as factors; everything else stays.
        workers: matrices at a time; by default one a core.
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
    if slices < 1 or top < 1 or not 0 <= epsilon <= 1 or (workers is not None and workers < 1):
        raise SpectraError("slices, top and workers must be at least 1, and epsilon must lie between 0 and 1")
    settings = Settings(_device(device), dtype, slices, top, epsilon, fast)
    base_checkpoint = open_checkpoint(base)
    tuned_checkpoints = {label: open_checkpoint(source) for label, source in labelled(tuned).items()}
    pairings = {
        label: pair(base_checkpoint, checkpoint, include, exclude, transposed)
        for label, checkpoint in tuned_checkpoints.items()
    }
    jobs = sorted(_jobs(pairings), key=lambda job: job.cost, reverse=True)  # the longest first fills the cores
    count = workers or (1 if settings.device.type == "cuda" else local.available_cores())
    total, done = sum(job.cost for job in jobs), 0
    finished: list[list[Outcome]] = [[] for _ in jobs]
    interrupted = False
    try:
        for index, outcomes in local.run(lambda job: job.run(settings), jobs, count):
            finished[index] = outcomes
            done += jobs[index].cost
            if progress:
                progress(done, total, jobs[index].matrix.name)
    except KeyboardInterrupt:
        interrupted = True
    outcomes = _in_order(finished, pairings)
    provenance = {
        "spectra": spectra.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": {**_described(base_checkpoint), **({} if interrupted else fingerprint(base_checkpoint))},
        "tuned": {
            label: {**_described(checkpoint), **({} if interrupted else fingerprint(checkpoint))}
            for label, checkpoint in tuned_checkpoints.items()
        },
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
        "device": str(settings.device),
        "workers": count,
        "threads_per_worker": 1,
        "gemm": gemm_library() if settings.device.type == "cpu" else "torch",
        "algorithms": _algorithms(outcomes),
        "versions": _versions(),
        "seconds": round(time.perf_counter() - started, 3),
        "interrupted": interrupted,
        "notes": _notes(base_checkpoint, tuned_checkpoints, pairings, device, settings),
    }
    result = _tabulated(outcomes, pairings, provenance)
    if interrupted:
        raise ComparisonInterrupted(result)
    return result


def labelled(tuned: Source | Sequence[Source] | Mapping[str, Source]) -> dict[str, Source]:
    """Give every tuned source a short label: its own, or the end of its path that tells it from the others."""
    if isinstance(tuned, Mapping) and not isinstance(tuned, Checkpoint):
        if tuned and not any(isinstance(value, torch.Tensor) for value in tuned.values()):
            if _is_container(tuned):
                return {"tuned": tuned}
            return {str(label): source for label, source in tuned.items()}
        return {"tuned": tuned}
    sources = list(tuned) if isinstance(tuned, list | tuple) else [tuned]
    if not sources:
        raise SpectraError("no tuned checkpoint was given; name at least one after the base")
    labels = _path_labels([_parts(source, index, len(sources)) for index, source in enumerate(sources)])
    return dict(zip(labels, sources, strict=True))


def _is_container(tuned: Mapping[str, Any]) -> bool:
    """Whether a mapping is one nested checkpoint ({"state_dict": {...}, "epoch": 3}) rather than labels of several."""
    return any(not isinstance(value, str | os.PathLike | Mapping | torch.nn.Module) for value in tuned.values())


def _parts(source: Source, index: int, of: int) -> tuple[str, ...]:
    """The words of a source, the most telling last."""
    if isinstance(source, Checkpoint):
        source = source.source
    if not isinstance(source, str | os.PathLike):
        return ("tuned" if of == 1 else f"tuned {index + 1}",)
    path = Path(source).absolute() if Path(source).exists() else Path(source)
    return tuple(part for part in (*path.parts[:-1], path.stem if path.is_file() else path.name) if part != os.sep)


def _path_labels(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last part that differs between the paths; more of the path, then a number, where one part is not enough."""
    if len(paths) == 1:
        generic = {"pytorch_model", "model", "adapter_model", "checkpoint", "consolidated"}
        return [next((part for part in reversed(paths[0]) if part not in generic), paths[0][-1])]
    for depth in range(1, max(len(path) for path in paths) + 1):
        ends = ["/".join(path[-depth:]) for path in paths]
        single = [path[-depth] if len(path) >= depth else path[0] for path in paths]
        if len(set(single)) == len(paths):
            return single
        if len(set(ends)) == len(paths):
            return ends
    return [f"{path[-1]} {index + 1}" for index, path in enumerate(paths)]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpectraError(f"{name!r} is no device; give auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SpectraError(
            f"device {name!r} was asked for and this machine or this torch has no CUDA; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpectraError(f"device {name!r} was asked for and there are {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda", "mps"):
        raise SpectraError(f"device {name!r} is not supported; give auto, cpu, cuda, cuda:1 or mps")
    return torch.device("cpu") if device.type == "mps" else device


def _jobs(pairings: Mapping[str, Pairing]) -> list[Job]:
    """Pairs of the same base matrix, cut to the same common part, share one job and so one base SVD."""
    groups: dict[tuple[str, int, int], list[tuple[str, Any]]] = {}
    for label, pairing in pairings.items():
        for item in pairing.pairs:
            groups.setdefault((item.matrix.name, item.matrix.rows, item.matrix.columns), []).append((label, item))
    return [Job(tuple(group)) for group in groups.values()]


def _in_order(finished: Sequence[Sequence[Outcome]], pairings: Mapping[str, Pairing]) -> list[Outcome]:
    """Outcomes by tuned model, then in the order of the base's matrices, whatever order they finished in."""
    by_key = {(o.tuned, o.pair.matrix.name): o for outcomes in finished for o in outcomes}
    keys = ((label, item.matrix.name) for label, pairing in pairings.items() for item in pairing.pairs)
    return [by_key[key] for key in keys if key in by_key]


def _tabulated(outcomes: Sequence[Outcome], pairings: Mapping[str, Pairing], provenance: dict[str, Any]) -> Comparison:
    from spectra.frames import components_frame, layers_frame, slices_frame, unmatched_frame

    return Comparison(
        layers=layers_frame(outcomes),
        components=components_frame(outcomes),
        slices=slices_frame(outcomes),
        unmatched=unmatched_frame((label, item) for label, pairing in pairings.items() for item in pairing.unmatched),
        provenance=provenance,
    )


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"source": checkpoint.source, "kind": type(checkpoint).__name__.lower(), "tensors": len(checkpoint)}


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


def _notes(
    base: Checkpoint, tuned: Mapping[str, Checkpoint], pairings: Mapping[str, Pairing], device: str, settings: Settings
) -> list[str]:
    """What was decided on the way, once each."""
    notes = [f"{base.source}: {note}" for note in base.notes]
    for label, checkpoint in tuned.items():
        notes += [f"{label}: {note}" for note in (*checkpoint.notes, *pairings[label].notes)]
    if device == "mps" and settings.device.type == "cpu":
        notes.append("device mps has no float64 arithmetic: the matrices were decomposed on the CPU")
    return list(dict.fromkeys(notes))

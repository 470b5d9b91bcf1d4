"""A study of groups of pairs: run on the devices at hand, with what failed kept as a sentence."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch

import spectra
from spectra.cache import SpectrumCache
from spectra.checkpoints import Adapter, Checkpoint, fingerprint, open_checkpoint
from spectra.engines import local
from spectra.engines.devices import ieee_products, named_devices, spread
from spectra.errors import SpectraError
from spectra.loading import Group, grouped, in_reading_order
from spectra.pairing import Pairing, pair

Found = TypeVar("Found")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Places:
    """Where a study runs: a device for each worker; and the cache of base spectra that it uses, or None."""

    devices: tuple[torch.device, ...]
    cache: SpectrumCache | None


def places(
    device: str | Sequence[str], workers: int | None, cache: str | os.PathLike[str] | None, cache_limit: int
) -> Places:
    """The places that a caller's options mean. Raises SpectraError for options that mean none."""
    if workers is not None and workers < 1:
        raise SpectraError("the number of workers must be at least 1")
    devices = named_devices(device)
    usual = local.available_cores() if devices[0].type == "cpu" else len(devices)
    kept = None if cache is None else SpectrumCache(cache, cache_limit)
    return Places(tuple(spread(devices, workers or usual)), kept)


@dataclass(frozen=True)
class Opened:
    """A base, its tuned models by label, and how their matrices pair up."""

    base: Checkpoint
    tuned: Mapping[str, Checkpoint]
    pairings: Mapping[str, Pairing]

    def notes(self) -> list[str]:
        """What was decided on the way, once each."""
        notes = [f"{self.base.source}: {note}" for note in self.base.notes]
        for label, checkpoint in self.tuned.items():
            notes += [f"{label}: {note}" for note in (*checkpoint.notes, *self.pairings[label].notes)]
        return list(dict.fromkeys(notes))

    def provenance(self, options: Mapping[str, Any], where: Places) -> dict[str, Any]:
        """What was studied and how: files with their SHA-256, options, devices, versions."""
        return {
            "spectra": spectra.__version__,
            "torch": torch.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "base": _described(self.base),
            "tuned": {label: _described(checkpoint) for label, checkpoint in self.tuned.items()},
            "options": dict(options),
            "device": ",".join(sorted({str(device) for device in where.devices})),
            "workers": len(where.devices),
            "notes": [*self.notes(), *(where.cache.notes if where.cache else ())],
        }


def opened(
    base: Any,
    tuned: Mapping[str, Any],
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    transposed: Sequence[str] | None,
) -> Opened:
    """Open a base and its tuned models, and pair their matrices. Raises SpectraError as these steps do."""
    include, exclude = ([given] if isinstance(given, str) else given for given in (include, exclude))
    base_checkpoint = open_checkpoint(base)
    if isinstance(base_checkpoint, Adapter):
        raise SpectraError(
            f"{base_checkpoint.source} is an adapter and no base; give the model that it was trained on first, "
            "and the adapter after it"
        )
    checkpoints = {label: open_checkpoint(source) for label, source in tuned.items()}
    pairings = {label: pair(base_checkpoint, each, include, exclude, transposed) for label, each in checkpoints.items()}
    return Opened(base_checkpoint, checkpoints, pairings)


def study(
    work: Callable[[Group, torch.device], Sequence[Found]],
    pairings: Mapping[str, Pairing],
    where: Places,
    progress: Progress | None = None,
) -> list[Found]:
    """What `work` finds of every pair, by tuned model, then in reading order.

    Args: work: of a group and the device it may use, one finding for each of the group's pairs, in their order.
    """
    groups = grouped(pairings)
    total, done = sum(group.cost for group in groups), 0
    found: list[Sequence[Found]] = [()] * len(groups)
    with ieee_products():
        for index, findings in local.run_on(work, groups, where.devices):
            found[index] = findings
            done += groups[index].cost
            if progress:
                progress(done, total, groups[index].matrix.name)
    return [found[at][place] for at, place in in_reading_order(groups, pairings)]


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """The files with their SHA-256. A file that went away while the work was done costs its hash, not the work."""
    try:
        return fingerprint(checkpoint)
    except (SpectraError, OSError) as error:
        return {"source": checkpoint.source, "sha256": None, "not_hashed": str(error)}

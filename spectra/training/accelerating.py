"""Devices, processes and mixed precision, by `accelerate`; and what the machine gave."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spectra.errors import SpectraError
from spectra.report.wording import counted
from spectra.sources.libraries import library
from spectra.training.settings import TrainSettings
from spectra.training.sharding import is_asked_for

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]


def make_accelerator(settings: TrainSettings, folder: Path) -> Accelerator:
    """The accelerator of a run, also where an earlier run of this process had another. Started by `accelerate launch`
    (or torchrun), it trains on all the devices of that. Raises `SpectraError` for a device that is not there."""
    accelerate = library("accelerate", "training")
    available = [str(name) for name in accelerate.tracking.get_available_trackers()] if settings.trackers else []
    if missing := [name for name in settings.trackers if name not in available]:
        raise SpectraError(
            f"the tracker {missing[0]!r} is not there for accelerate; install it, or leave it out of trackers "
            f"({', '.join(available) or 'none'} can be used)"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not launched:
        accelerate.state.AcceleratorState._reset_state(True)  # it is kept once a process, whatever is asked later
    shard = is_asked_for(settings.shard)
    with _device(None if launched else settings.device), _set("ACCELERATE_USE_FSDP", "false"):  # we shard ourselves
        accelerator: Accelerator = accelerate.Accelerator(
            cpu=settings.device == "cpu",
            mixed_precision=settings.precision,
            log_with=list(settings.trackers) or None,
            project_dir=str(folder),
            kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    if accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise SpectraError(
            f"training under {accelerator.distributed_type} is not supported; use accelerate's multi-GPU mode, which "
            "keeps the whole model on every device, or FSDP (shard), which shares it among them"
        )
    share = settings.optimiser.batch_size * settings.optimiser.accumulate
    if share < accelerator.num_processes:
        raise SpectraError(
            f"a step of {counted(share, 'example')} cannot be shared by {accelerator.num_processes} processes; raise "
            "optimiser.batch_size, which counts the examples of all of them"
        )
    if shard and share % accelerator.num_processes:
        raise SpectraError(
            f"a step of {counted(share, 'example')} cannot be cut alike for {accelerator.num_processes} processes that "
            "share the weights (shard); make optimiser.batch_size a multiple of their number"
        )
    return accelerator


def is_first_process() -> bool:
    """Whether this is the process that writes and reports, of those that `accelerate launch` or torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _device(name: str | None) -> Iterator[None]:
    """Have accelerate take the device that is asked for; "auto" and None leave it the choice."""
    if name in (None, "auto", "cpu"):
        yield
        return
    assert name is not None
    kind = name.split(":")[0]
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise SpectraError(f"device is {name!r}; give auto, cpu, cuda, cuda:1 or mps")
    if not there[kind] or (kind == "cuda" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count()):
        raise SpectraError(f"device is {name!r}, which this machine does not have; give cpu or auto")
    with _set("ACCELERATE_TORCH_DEVICE", name):
        yield


@contextmanager
def _set(variable: str, value: str) -> Iterator[None]:
    """An environment variable, for the block."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def peak_memory(device: torch.device) -> float:
    """MiB: the most that was allocated on a CUDA device; elsewhere the most that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

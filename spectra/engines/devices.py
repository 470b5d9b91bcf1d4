"""Where the arithmetic happens: the devices that a user names, and the precision of their products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from spectra.errors import SpectraError

CHOICES = "give auto, cpu, cuda, cuda:1, cuda:0,cuda:1 or mps"


def named_devices(names: str | Sequence[str]) -> list[torch.device]:
    """The devices of "auto" (CUDA where there is one), "cpu", "cuda:1", "cuda:0,cuda:1" or a list of such names.

    mps becomes the CPU, since it has no float64.   Raises: SpectraError for names of no device of this machine.
    """
    given = names.split(",") if isinstance(names, str) else list(names)
    found = [_device(str(name).strip()) for name in given]
    if not found:
        raise SpectraError(f"no device was named; {CHOICES}")
    if len(found) > 1 and any(device.type != "cuda" for device in found):
        raise SpectraError(f"work is spread over CUDA devices only, and {', '.join(given)} were named; {CHOICES}")
    # "cuda" is whichever device is current, and may be a second name of one in the list.
    numbered = [torch.device("cuda", torch.cuda.current_device()) if d == torch.device("cuda") else d for d in found]
    if len(set(numbered)) < len(numbered):
        raise SpectraError(f"a device is named twice in {', '.join(given)}; name each once")
    return numbered


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpectraError(f"{name!r} is no device; {CHOICES}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SpectraError(
            f"device {name!r} was asked for and this machine or this torch has no CUDA; use --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpectraError(f"device {name!r} was asked for and there are {torch.cuda.device_count()} CUDA devices")
    if device.type not in ("cpu", "cuda", "mps"):
        raise SpectraError(f"device {name!r} is not supported; {CHOICES}")
    return torch.device("cpu") if device.type == "mps" else device


def spread(devices: Sequence[torch.device], workers: int) -> list[torch.device]:
    """The devices of so many workers, in turn; each device has at least one worker."""
    return [devices[index % len(devices)] for index in range(max(workers, len(devices)))]


@contextmanager
def ieee_products() -> Iterator[None]:
    """Float32 products on CUDA are IEEE ones here: TF32, which keeps 10 bits, is off, and as it was afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

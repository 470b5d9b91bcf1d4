"""state.pt: all that a run needs to go on as if it had never stopped, in one file that is either whole or not there."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectra.atomic import replacing
from spectra.errors import SpectraError
from spectra.tensor_files import write_torch
from spectra.training.sharding import shared_like

STATE = "state.pt"
FORMAT = 2


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a run in the place of the last one. Raises `SpectraError` where the disk does not take it."""
    try:
        with replacing(folder / STATE) as path:
            write_torch({"format": FORMAT, **state}, path)
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # the new state is on the disk before the old one goes
    except OSError as error:
        raise SpectraError(
            f"cannot save the state of the run in {folder}: {error.strerror or error}; "
            "free some space, then go on with --resume"
        ) from error


def load_state(folder: Path) -> dict[str, Any] | None:
    """The last saved state, tensors on the CPU; None where none was saved. No code in the file is run."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise SpectraError(
            f"{path} is no saved state of a run ({type(error).__name__}); start anew with --force"
        ) from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise SpectraError(f"{path} is of another version of spectra; start anew with --force")
    return state


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the parameters that ask for a gradient, and all buffers that are saved with a model."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in known}
    return {name: value.detach() for name, value in {**buffers, **parameters}.items() if isinstance(value, Tensor)}


def restore_tensors(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Put saved tensors back. Raises `SpectraError` where the model has others than those that were saved."""
    own = moving_tensors(model)
    wrong = next((name for name in {**own, **saved} if name not in own or name not in saved), None)
    wrong = wrong or next((name for name in own if own[name].shape != saved[name].shape), None)
    if wrong is not None:
        raise SpectraError(f"the saved state does not fit the model at {wrong!r}; start anew with --force")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(shared_like(saved[name], value))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights of a model, by name: whether a run goes on from the base that it started from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def random_state(device: torch.device) -> dict[str, Any]:
    """Where all generators of random numbers stand, in values that a weights-only file may hold."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type in ("cuda", "mps"):
        state["device"] = getattr(torch, device.type).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators back to where they stood."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "device" in state and device.type in ("cuda", "mps"):
        getattr(torch, device.type).set_rng_state(state["device"])


def draw_apart(seed: int, process: int) -> None:
    """Let the generators of one of several processes draw other numbers (masks of dropout) than those of the first."""
    if process:
        own = int(np.random.SeedSequence((seed, process)).generate_state(1)[0])
        random.seed(own)
        np.random.seed(own)
        torch.manual_seed(own)


@contextmanager
def undrawn(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, all generators stand afterwards where they stood before."""
    before = random_state(device)
    try:
        yield
    finally:
        restore_random_state(before, device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All generators start from `seed`; the caller's come back afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with undrawn(torch.device("cpu")), torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield

"""The two models of a shift: given, or built when their turn comes and let go of afterwards."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectra.checkpoints import Checkpoint, open_checkpoint
from spectra.engines.devices import named_devices
from spectra.errors import SpectraError
from spectra.tensor_files import write_tensors


def is_factory(source: Any) -> bool:
    """Whether a model is still to be built: a callable of no arguments, and no module (which can be called too)."""
    return callable(source) and not isinstance(source, nn.Module)


def built(source: Any, side: str) -> nn.Module:
    """The module itself, or what its factory makes. Raises: SpectraError where that is none, or holds open adapters."""
    model = source() if is_factory(source) else source
    if not isinstance(model, nn.Module):
        raise SpectraError(
            f"the {side} is a {type(model).__name__} and no torch.nn.Module; "
            "give a module, or a function without arguments that builds one"
        )
    if side == "base" and _has_adapters(model):
        raise SpectraError(
            "the base holds LoRA layers, since `get_peft_model` changes a model in place; "
            "give a copy of the model from before, or a function that builds one"
        )
    return model


@contextmanager
def lying_on(model: nn.Module, device: str) -> Iterator[None]:
    """Move a model to a device for the time of the block; "auto" leaves it where it is."""
    before = next((parameter.device for parameter in model.parameters()), None)
    if device == "auto" or before is None:
        yield
        return
    try:
        model.to(torch.device(device))
        yield
    finally:
        model.to(before)


def let_go() -> None:
    """Give back the memory of models that nothing refers to any more, cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def spilled(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The same checkpoint from a file in `folder`, so that the module it was opened from can be let go of."""
    path = folder / "base.safetensors"
    try:
        write_tensors({name: checkpoint[name] for name in checkpoint}, path)
    except OSError as error:
        raise SpectraError(
            f"the base's weights cannot be kept in {folder} while the tuned model runs: {error.strerror or error}; "
            "free some space, or give both models as modules"
        ) from error
    return open_checkpoint(path).described(
        checkpoint.source,
        files=(),
        config=checkpoint.config,
        tied=checkpoint.tied,
        refused=checkpoint.refused,
        notes=checkpoint.notes,
    )


def one_device(names: str) -> torch.device:
    """Where float64 matrices are worked on, see `named_devices`. Raises: SpectraError for several devices, or none."""
    found = named_devices(names)
    if len(found) > 1:
        raise SpectraError(f"a model runs on one device here, and {names!r} names several; give one of them")
    return found[0]


def _has_adapters(model: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.tuners_utils")  # a model with such layers has imported it
    layer: Callable[..., Any] | None = getattr(peft, "BaseTunerLayer", None)
    return isinstance(layer, type) and any(isinstance(module, layer) for module in model.modules())

"""What a run leaves: an adapter of the unchanged base, or the whole model, in folders that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from spectra.atomic import replacing_folder
from spectra.errors import SpectraError
from spectra.lora import save_adapter
from spectra.sources.libraries import quietly
from spectra.training.run import ADAPTER, MODEL
from spectra.training.tasks import Task


def save_result(folder: Path, task: Task, model: nn.Module, is_adapter: bool) -> str:
    """Write what was trained into `adapter` or `model` below `folder`. Returns: which. Raises: as `save_trained`."""
    name = ADAPTER if is_adapter else MODEL
    save_trained(folder / name, task, model, is_adapter)
    return name


def save_trained(place: Path, task: Task, model: nn.Module, is_adapter: bool) -> None:
    """Write what was trained into the folder `place`, and the tokenizer (or image processor) beside it.

    A transformers model is written as `save_pretrained` does, any other module as model.safetensors. What is in `place`
    is replaced. Raises `SpectraError` where the disk does not take it.
    """
    try:
        with replacing_folder(place) as temporary:
            if is_adapter:
                save_adapter(model, temporary)
            else:
                _save_model(model, temporary)
            if task.tokenizer is not None:
                task.tokenizer.save_pretrained(temporary)
    except (OSError, SpectraError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        raise SpectraError(
            f"cannot write {place}: {reason.strerror or reason}; free some space, then go on with --resume"
        ) from error


def _save_model(model: Any, place: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    try:
        if hasattr(model, "save_pretrained"):
            with quietly():
                model.save_pretrained(place)
        else:
            save_model(model, str(place / "model.safetensors"))
    except SafetensorError as error:  # of a full disk
        raise OSError(str(error)) from error

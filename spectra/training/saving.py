"""What a run leaves: an adapter of the unchanged base, or the whole model, in folders that are whole or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from spectra.errors import SpectraError
from spectra.lora import save_adapter
from spectra.sources.libraries import quietly
from spectra.training.run import ADAPTER, MODEL
from spectra.training.tasks import Task


def save_result(folder: Path, task: Task, model: nn.Module, is_adapter: bool) -> str:
    """Write what was trained below `folder`; the tokenizer (or image processor) goes with it.

    A transformers model is written as `save_pretrained` does, any other module as model.safetensors. Returns the
    name of the folder in it. Raises `SpectraError` where the disk does not take it.
    """
    name = ADAPTER if is_adapter else MODEL
    try:
        if is_adapter:
            save_adapter(model, folder / name, force=True)
        else:
            with _whole(folder / name) as place:
                _save_model(model, place)
                if task.tokenizer is not None:
                    task.tokenizer.save_pretrained(place)
    except OSError as error:
        raise SpectraError(
            f"cannot write {folder / name}: {error.strerror or error}; free some space, then go on with --resume"
        ) from error
    return name


def _save_model(model: Any, place: Path) -> None:
    if hasattr(model, "save_pretrained"):
        with quietly():
            model.save_pretrained(place)
    else:
        from safetensors.torch import save_model

        save_model(model, str(place / "model.safetensors"))


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends well."""
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

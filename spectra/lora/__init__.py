"""LoRA: adapters that start from any slice of a weight's singular triplets, and adapters out of checkpoints.

The public names are imported on first use. Neither `peft` nor `transformers` is imported before a function needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectra.lora.attaching import attach
    from spectra.lora.configuration import SliceConfig
    from spectra.lora.extracting import extract
    from spectra.lora.gradients import mean_gradients
    from spectra.lora.initialisations import METHODS, lora_ga_init, lora_init, random_init
    from spectra.lora.merging import merge, save_merged
    from spectra.lora.record import Attachment, Slot, attachment
    from spectra.lora.saving import load_adapter, save_adapter
    from spectra.lora.slices import SliceInit, slice_init, slice_start

__all__ = [
    "METHODS",
    "Attachment",
    "SliceConfig",
    "SliceInit",
    "Slot",
    "attach",
    "attachment",
    "extract",
    "load_adapter",
    "lora_ga_init",
    "lora_init",
    "mean_gradients",
    "merge",
    "random_init",
    "save_adapter",
    "save_merged",
    "slice_init",
    "slice_start",
]

# No module here may have the name of a function here: importing it would put the module in the function's place.
_HOMES = {
    "METHODS": "initialisations",
    "Attachment": "record",
    "SliceConfig": "configuration",
    "SliceInit": "slices",
    "Slot": "record",
    "attach": "attaching",
    "attachment": "record",
    "extract": "extracting",
    "load_adapter": "saving",
    "lora_ga_init": "initialisations",
    "lora_init": "initialisations",
    "mean_gradients": "gradients",
    "merge": "merging",
    "random_init": "initialisations",
    "save_adapter": "saving",
    "save_merged": "merging",
    "slice_init": "slices",
    "slice_start": "slices",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spectra.lora' has no attribute {name!r}")
    value = getattr(import_module(f"spectra.lora.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

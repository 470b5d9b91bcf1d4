"""Fine-tune, measure what was learnt and what was forgotten, and repeat it over a grid.

The public names are imported on first use; accelerate, transformers and peft only when something is trained.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectra.training.continual_file import read_continual_file
    from spectra.training.continual_result import Continual, load_continual
    from spectra.training.continual_running import continual
    from spectra.training.examples import Examples, TensorExamples
    from spectra.training.loop import TrainingInterrupted
    from spectra.training.methods import METHODS
    from spectra.training.run import Run, load_run
    from spectra.training.running import train
    from spectra.training.settings import TrainSettings
    from spectra.training.sweep_grid import Grid, read_sweep_file
    from spectra.training.sweep_matching import step_size_factor
    from spectra.training.sweep_result import Sweep, load_sweep
    from spectra.training.sweep_running import SweepInterrupted, sweep
    from spectra.training.tasks import Task, evaluate

__all__ = [
    "METHODS",
    "Continual",
    "Examples",
    "Grid",
    "Run",
    "Sweep",
    "SweepInterrupted",
    "Task",
    "TensorExamples",
    "TrainSettings",
    "TrainingInterrupted",
    "continual",
    "evaluate",
    "load_continual",
    "load_run",
    "load_sweep",
    "read_continual_file",
    "read_sweep_file",
    "step_size_factor",
    "sweep",
    "train",
]

# No module here may have the name of a function here: importing it would put the module in the function's place.
_HOMES = {
    "METHODS": "methods",
    "Continual": "continual_result",
    "Examples": "examples",
    "Grid": "sweep_grid",
    "Run": "run",
    "Sweep": "sweep_result",
    "SweepInterrupted": "sweep_running",
    "Task": "tasks",
    "TensorExamples": "examples",
    "TrainSettings": "settings",
    "TrainingInterrupted": "loop",
    "continual": "continual_running",
    "evaluate": "tasks",
    "load_continual": "continual_result",
    "load_run": "run",
    "load_sweep": "sweep_result",
    "read_continual_file": "continual_file",
    "read_sweep_file": "sweep_grid",
    "step_size_factor": "sweep_matching",
    "sweep": "sweep_running",
    "train": "running",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spectra.training' has no attribute {name!r}")
    value = getattr(import_module(f"spectra.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Spectral analysis of what fine-tuning did to the weights of a model.

The public names are imported on first use: `import spectra` alone loads neither torch nor pandas nor matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectra.errors import SpectraError

if TYPE_CHECKING:
    import spectra.demo as demo
    import spectra.editing as editing
    import spectra.lora as lora
    import spectra.training as training
    from spectra.checkpoints import Checkpoint, CheckpointError, open_checkpoint
    from spectra.comparing import compare
    from spectra.comparison import Comparison, load
    from spectra.features.accumulator import CovarianceAccumulator
    from spectra.features.shifting import covariance_shift
    from spectra.intruding import find_intruders
    from spectra.intrusion import Intrusion
    from spectra.linalg.lowrank import LowRank
    from spectra.overlapping import Overlap, overlap
    from spectra.shift import CovarianceShift

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "CovarianceAccumulator",
    "CovarianceShift",
    "Intrusion",
    "LowRank",
    "Overlap",
    "SpectraError",
    "__version__",
    "compare",
    "covariance_shift",
    "demo",
    "editing",
    "find_intruders",
    "load",
    "lora",
    "open_checkpoint",
    "overlap",
    "training",
]

# A name must not also be the name of a module here: importing `spectra.compare` would put the module in the place of
# the function. Hence `comparing`.
_HOMES = {
    "Checkpoint": "spectra.checkpoints",
    "CheckpointError": "spectra.checkpoints",
    "Comparison": "spectra.comparison",
    "CovarianceAccumulator": "spectra.features.accumulator",
    "CovarianceShift": "spectra.shift",
    "Intrusion": "spectra.intrusion",
    "LowRank": "spectra.linalg.lowrank",
    "Overlap": "spectra.overlapping",
    "compare": "spectra.comparing",
    "covariance_shift": "spectra.features.shifting",
    "find_intruders": "spectra.intruding",
    "load": "spectra.comparison",
    "open_checkpoint": "spectra.checkpoints",
    "overlap": "spectra.overlapping",
}
_ROOMS = ("demo", "editing", "lora", "training")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"spectra.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'spectra' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

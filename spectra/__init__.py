"""Spectral analysis of what fine-tuning did to the weights of a model.

The public names are imported on first use: `import spectra` alone loads neither torch nor pandas nor matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectra.errors import SpectraError

if TYPE_CHECKING:
    import spectra.demo as demo
    from spectra.checkpoints import Checkpoint, CheckpointError, open_checkpoint
    from spectra.comparing import compare
    from spectra.comparison import Comparison, load
    from spectra.linalg.lowrank import LowRank

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "LowRank",
    "SpectraError",
    "__version__",
    "compare",
    "demo",
    "load",
    "open_checkpoint",
]

# A name must not also be the name of a module here: importing `spectra.compare` would put the module in the place of
# the function. Hence `comparing`.
_HOMES = {
    "Checkpoint": "spectra.checkpoints",
    "CheckpointError": "spectra.checkpoints",
    "Comparison": "spectra.comparison",
    "LowRank": "spectra.linalg.lowrank",
    "compare": "spectra.comparing",
    "load": "spectra.comparison",
    "open_checkpoint": "spectra.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name == "demo":
        return import_module("spectra.demo")
    if name not in _HOMES:
        raise AttributeError(f"module 'spectra' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

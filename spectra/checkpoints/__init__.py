"""What is on disk or in memory -> named tensors, described from headers and loaded one at a time."""

from spectra.checkpoints.checkpoint import Adapter, Checkpoint, CheckpointError, LowRankInfo, TensorInfo
from spectra.checkpoints.containers import is_container
from spectra.checkpoints.fingerprint import fingerprint
from spectra.checkpoints.open import open_checkpoint

__all__ = [
    "Adapter",
    "Checkpoint",
    "CheckpointError",
    "LowRankInfo",
    "TensorInfo",
    "fingerprint",
    "is_container",
    "open_checkpoint",
]

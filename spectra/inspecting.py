"""What is in a checkpoint: every tensor, what it is taken for, and what is no weight matrix and why."""

from __future__ import annotations

from typing import Any

from spectra.checkpoints import Adapter, open_checkpoint
from spectra.matrices import find_matrices


def inspect_checkpoint(source: Any) -> dict[str, Any]:
    """Describe a checkpoint from its headers.

    Returns: {"source", "tensors": [{name, shape, dtype, bytes, role, layer, part, note}], "notes": [...]}; a tensor
    that holds several matrices has one row per matrix, with the tensor's bytes on the first.   Raises: CheckpointError
    where it cannot be read.
    """
    checkpoint = open_checkpoint(source)
    matrices, left_out = find_matrices(checkpoint.tensors, checkpoint.config)
    by_tensor: dict[str, list[Any]] = {}
    for matrix in matrices:
        by_tensor.setdefault(matrix.tensor, []).append(matrix)
    rows: list[dict[str, Any]] = []
    for name, info in checkpoint.tensors.items():
        described = {"name": name, "shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch.")}
        parts = by_tensor.get(name, [None])
        rows += [
            {
                **described,
                "bytes": info.bytes if index == 0 else 0,
                "role": part.role if part else "",
                "layer": part.layer if part else None,
                "part": part.part if part else "",
                "note": left_out.get(name, ""),
            }
            for index, part in enumerate(parts)
        ]
    for alias, name in checkpoint.tied.items():
        rows.append(_row(alias, note=f"tied to {name}"))
    for name, reason in checkpoint.refused.items():
        rows.append(_row(name, note=reason))
    if isinstance(checkpoint, Adapter):
        for name, update in checkpoint.updates.items():
            rows.append(
                {
                    **_row(name, note=f"low-rank update, r = {update.rank}"),
                    "shape": list(update.shape),
                    "dtype": str(update.dtype).removeprefix("torch."),
                    "bytes": sum(update.shape) * update.rank * update.dtype.itemsize,
                }
            )
    return {"source": checkpoint.source, "tensors": rows, "notes": list(checkpoint.notes)}


def _row(name: str, note: str) -> dict[str, Any]:
    return {"name": name, "shape": None, "dtype": "", "bytes": 0, "role": "", "layer": None, "part": "", "note": note}

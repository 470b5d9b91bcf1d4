"""Short labels for tuned models: the caller's own, or what tells their paths apart."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spectra.checkpoints import Checkpoint, is_container
from spectra.errors import SpectraError


def labelled(tuned: Any, taken: Collection[str] = ()) -> dict[str, Any]:
    """Give every tuned source a short label: its own, or the end of its path that tells it from the others.

    A path that is given again is counted, and so is one that ends in a name that is `taken`: "step-2", "step-2 (2)".
    """
    if isinstance(tuned, Mapping) and not isinstance(tuned, Checkpoint):
        if tuned and not any(isinstance(value, torch.Tensor) for value in tuned.values()):
            if is_container(tuned) or any(not _is_source(value) for value in tuned.values()):
                return {"tuned": tuned}
            return {str(label): source for label, source in tuned.items()}
        return {"tuned": tuned}
    sources = list(tuned) if isinstance(tuned, list | tuple) else [tuned]
    if not sources:
        raise SpectraError("no tuned checkpoint was given; name at least one after the base")
    paths = [_parts(source, index, len(sources)) for index, source in enumerate(sources)]
    different = list(dict.fromkeys(paths))
    ends = dict(zip(different, _path_labels(different), strict=True))
    return dict(zip(_counted([ends[path] for path in paths], taken), sources, strict=True))


def _counted(labels: Sequence[str], taken: Collection[str]) -> list[str]:
    """The labels, each that is not free any more with a number behind it."""
    used, found = {*taken, *labels}, []
    free = {*labels} - {*taken}
    for label in labels:
        if label in free:
            free.remove(label)
            found.append(label)
            continue
        number = 2
        while f"{label} ({number})" in used:
            number += 1
        found.append(f"{label} ({number})")
        used.add(found[-1])
    return found


def _is_source(value: Any) -> bool:
    """Whether a value can be a checkpoint; in {"my_net": {...}, "epoch": 3} the 3 says that all of it is one."""
    return isinstance(value, str | os.PathLike | Mapping | torch.nn.Module)


def _parts(source: Any, index: int, of: int) -> tuple[str, ...]:
    """The words of a source, the most telling last."""
    if isinstance(source, Checkpoint):
        source = source.source
    if not isinstance(source, str | os.PathLike):
        return ("tuned" if of == 1 else f"tuned {index + 1}",)
    path = Path(source).absolute() if Path(source).exists() else Path(source)
    return tuple(part for part in (*path.parts[:-1], path.stem if path.is_file() else path.name) if part != os.sep)


def _path_labels(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last part that differs between different paths; more of the path where one part is not enough."""
    if len(paths) == 1:
        generic = {"pytorch_model", "model", "adapter_model", "checkpoint", "consolidated"}
        return [next((part for part in reversed(paths[0]) if part not in generic), paths[0][-1])]
    for depth in range(1, max(len(path) for path in paths)):
        ends = ["/".join(path[-depth:]) for path in paths]
        single = [path[-depth] if len(path) >= depth else path[0] for path in paths]
        if len(set(single)) == len(paths):
            return single
        if len(set(ends)) == len(paths):
            return ends
    return ["/".join(path) for path in paths]

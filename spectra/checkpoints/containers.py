"""Which of the nested dicts of a training checkpoint holds the model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from spectra.checkpoints.checkpoint import Checkpoint, CheckpointError
from spectra.checkpoints.wording import listed, quoted

# In order of preference: the plain model before a copy that training kept beside it.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "student",
    "ema",
    "model_ema",
    "ema_model",
    "ema_state_dict",
    "model_ema_state_dict",
    "state_dict_ema",
    "params_ema",
    "teacher",
)
OPTIMISER_STATE = ("optim", "lr_sched", "sched", "scaler", "grad_scaler", "rng", "random", "amp", "callbacks", "loops")
DEEPEST = 4


def find_state_dict(content: object, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The flat dict of tensors inside a checkpoint's object, and what was decided on the way.

    Optimiser state is passed over. Where a plain model lies beside its moving average, the model is taken.
    Raises `CheckpointError` where there is no dict of tensors, or several without a usual name.

    >>> import torch
    >>> state, notes = find_state_dict({"epoch": 3, "model": {"weight": torch.ones(2, 2)}}, "checkpoint.pt")
    >>> list(state), notes
    (['weight'], ("took 'model' of 'epoch', 'model'",))
    """
    notes: list[str] = []
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping):
            break
        items = _items(content)
        inner = _containers(items)
        chosen = next((name for name in CONTAINERS if name in inner), None)
        tensors = {name: value for name, value in items.items() if isinstance(value, Tensor)}
        if chosen is None and tensors:
            left = [name for name in items if name not in tensors]
            if left:
                notes.append(f"{listed(left)} left out: no tensors")
            return tensors, tuple(notes)
        if chosen is None and len(inner) == 1:
            chosen = next(iter(inner))
        if chosen is None:
            raise _nothing_found(items, inner, where)
        notes.append(f"took {quoted(chosen)} of {listed(items, most=12)}")
        content = items[chosen]
    raise CheckpointError(
        f"{where} holds a {type(content).__name__} and no dict of tensors by name; "
        "save the weights with torch.save(model.state_dict(), ...)"
    )


def is_container(mapping: Mapping[Any, Any]) -> bool:
    """Whether a mapping is one training checkpoint around its weights, and not labels with a checkpoint under each.

    It is one where a usual name of a model's weights holds tensors, perhaps some levels down; the values beside it do
    not matter. Open checkpoints are sources under a label, whatever it is. No tensor is loaded.

    >>> import torch
    >>> weights = {"layer.weight": torch.ones(2, 2)}
    >>> is_container({"model": weights, "optimizer": {}}), is_container({"one": weights, "two": weights})
    (True, False)
    """
    if isinstance(mapping, Checkpoint):
        return False
    return any(
        name in CONTAINERS
        and isinstance(value, Mapping)
        and not isinstance(value, Checkpoint)
        and _holds_tensors(value, DEEPEST - 1)
        for name, value in _items(mapping).items()
    )


def _items(content: Mapping[Any, Any]) -> dict[str, Any]:
    # dict.items and not content.items: a pickle can hang an attribute of that name on an OrderedDict.
    pairs = dict.items(content) if isinstance(content, dict) else content.items()
    return {name: value for name, value in pairs if isinstance(name, str)}


def _containers(items: Mapping[str, Any]) -> list[str]:
    """The keys under which a dict of tensors lies, perhaps some levels down."""
    return [
        name
        for name, value in items.items()
        if isinstance(value, Mapping)
        and not name.lower().startswith(OPTIMISER_STATE)
        and _holds_tensors(value, DEEPEST - 1)
    ]


def _holds_tensors(content: Mapping[Any, Any], depth: int) -> bool:
    values = _items(content).values()
    if any(isinstance(value, Tensor) for value in values):
        return True
    return depth > 1 and any(isinstance(value, Mapping) and _holds_tensors(value, depth - 1) for value in values)


def _nothing_found(items: Mapping[str, Any], inner: list[str], where: str) -> CheckpointError:
    if inner:
        return CheckpointError(
            f"{where} holds several dicts of tensors ({listed(inner)}) and none has the usual name of a model; "
            f"save the one you mean: torch.save(torch.load(...)[{quoted(inner[0])}], ...)"
        )
    holds = f"holds {listed(items)} and no weights" if items else "is empty: it holds no weights"
    return CheckpointError(f"{where} {holds}; give the file that torch.save(model.state_dict(), ...) writes")

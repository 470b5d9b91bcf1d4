"""The optimiser, and the learning rate of every step as a pure function of the settings."""

from __future__ import annotations

from fnmatch import fnmatchcase
from math import ceil, cos, pi
from typing import Any

import torch
from torch import nn

from spectra.errors import SpectraError
from spectra.training.settings import OptimiserSettings


def steps_in_all(settings: OptimiserSettings, examples: int, examples_a_batch: int) -> int:
    """How many updates a run makes. Raises `SpectraError` where neither steps nor epochs are given."""
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is None:
        raise SpectraError("the settings say nowhere how long to train; give optimiser.steps or optimiser.epochs")
    # Upwards, so that the last examples of a pass are seen; rounded first, since 0.1 * 30 is a little more than 3.
    return ceil(round(settings.epochs * examples / (examples_a_batch * settings.accumulate), 9))


def learning_rate(settings: OptimiserSettings, step: int, steps: int) -> float:
    """The rate of update number `step`, 1 to `steps`: a linear rise over the warm-up, then the schedule's fall to 0.

    >>> settings = OptimiserSettings(learning_rate=1.0, schedule="linear", warmup=0.5)
    >>> [learning_rate(settings, step, 4) for step in (1, 2, 3, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    rising = round(settings.warmup * steps)
    if step <= rising:
        return settings.learning_rate * step / rising
    done = (step - rising - 1) / (steps - rising)  # share of the fall, 0 at its first step and below 1 at the last
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + cos(pi * done)) / 2}[settings.schedule]
    return settings.learning_rate * factor


def lost_steps(model: nn.Module) -> str | None:
    """A sentence on weights that are trained in bfloat16, where small steps are rounded away; None where none are."""
    narrow = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    if not narrow:
        return None
    return (
        f"{narrow[0]!r} and {len(narrow) - 1} other parameters are trained in bfloat16, which rounds away steps under "
        'a 256th of a weight; model.dtype float32 with precision "bf16" keeps them'
    )


def make_optimiser(settings: OptimiserSettings, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD on the parameters that ask for a gradient, grouped by weight decay and by factor of the rate.

    Matrices decay, biases and norms do not. A group's "factor" multiplies the rate of every step. Raises `SpectraError`
    where nothing is to be trained, for parameters in float16, and for a pattern of learning_rate_pattern that fits no
    trained parameter.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    patterns, used = settings.learning_rate_pattern, set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.dtype == torch.float16:  # in which the smallest terms of both optimisers are zero
                raise SpectraError(
                    f"{name!r} would be trained in float16, which cannot hold small steps; set model.dtype to float32, "
                    'and precision to "bf16" for speed (the factors of an adapter are float32 on any base, new heads '
                    "are of the base's dtype)"
                )
            pattern = next((glob for glob in patterns if fnmatchcase(name, glob)), None)
            used.add(pattern)
            factor = 1.0 if pattern is None else patterns[pattern]
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((decay, factor), []).append(parameter)
    if not groups:
        raise SpectraError("no parameter of the model is to be trained; choose another method or other targets")
    for glob in patterns:
        if glob not in used:
            raise SpectraError(
                f"optimiser.learning_rate_pattern has {glob!r}, which fits no trained parameter; "
                f"one of them is {next(name for name, p in model.named_parameters() if p.requires_grad)!r}"
            )
    listed: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (decay, factor), parameters in groups.items()
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(listed, lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.AdamW(listed, lr=settings.learning_rate)

"""A new head on the body of a transformers model, beside the head that the base came with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spectra.errors import SpectraError
from spectra.sources.libraries import first_line, library, quietly

_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


def with_new_head(base: nn.Module, kind: str, classes: Sequence[str], seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A model for classification whose body is the very body of `base`, and the names of its new modules.

    What the new model's class has and the body lacks (a pooler) is added to the body, and counts as new. New parameters
    are drawn as transformers draws them, from `seed`. `base` keeps its own head and shares the body: what moves in one
    moves in the other.

    Args: base, a transformers model; kind, "text-classification" or "image-classification"; names of the classes.
    Raises: SpectraError where transformers has no such model of this type.
    """
    transformers = library("transformers", "to put a new head on a model")
    if not isinstance(base, transformers.PreTrainedModel):
        raise SpectraError(
            f"{type(base).__name__} is no transformers model, so that spectra cannot give it a head for {kind}; "
            'set task.kind = "custom" with a factory that does'
        )
    config = copy.deepcopy(base.config)
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.problem_type = None
    body: nn.Module = base.base_model
    try:
        with quietly(), torch.device("meta"):
            model = getattr(transformers, _CLASSES[kind]).from_config(config)
    except ValueError as error:
        raise SpectraError(
            f"transformers has no model for {kind} of the type {config.model_type!r}: {first_line(error)}"
        ) from error
    prefix: str = model.base_model_prefix
    new = [name for name, _ in model.named_children() if name != prefix]
    like = next(body.parameters())
    blueprint = getattr(model, prefix)
    setattr(model, prefix, body)
    for name, child in blueprint.named_children():
        if getattr(body, name, None) is None:
            setattr(body, name, child)
            new.append(f"{prefix}.{name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in new:
            _materialise(model, model.get_submodule(name), like)
    return model, tuple(name for name in new if any(True for _ in model.get_submodule(name).parameters()))


def _materialise(model: Any, head: nn.Module, like: nn.Parameter) -> None:
    """Give the parameters of a module that was planned on no device their first values."""
    head.to_empty(device="cpu")
    with torch.no_grad():
        for module in head.modules():
            model._init_weights(module)
    head.to(device=like.device, dtype=like.dtype)

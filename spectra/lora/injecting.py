"""peft's layers in the place of modules, or the model as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from spectra.errors import SpectraError
from spectra.lora.targets import Target

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def inject(
    model: nn.Module,
    targets: Sequence[Target],
    settings: LoraConfig,
    then: Callable[[PeftModel], None] | None = None,
) -> PeftModel:
    """`peft.get_peft_model`, for the modules that `settings` means; `then` is called with the result.

    Raises: SpectraError where peft refuses. The model is then as it was, but for weights that peft changed in place.
    """
    from peft import get_peft_model

    requires = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    parents = {name: (module, dict(module.named_children())) for name, module in model.named_modules()}
    try:
        # What is drawn here is replaced, or asked for with a seed; either way the caller's random numbers stay his.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fan_in_fan_out, which has no one value in a mixed model
            adapted: PeftModel = get_peft_model(model, settings)
            if then is not None:
                then(adapted)
        found = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
        if found != {target.name for target in targets}:
            odd = sorted(found ^ {target.name for target in targets})
            raise SpectraError(f"peft did not adapt the modules that were asked for ({odd[0]!r}); name them otherwise")
        return adapted
    except BaseException as error:
        for module, children in parents.values():
            for name, child in children.items():
                setattr(module, name, child)
        for parameter, required in requires:
            parameter.requires_grad_(required)
        if hasattr(model, "peft_config"):
            del model.peft_config
        if isinstance(error, SpectraError) or not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise SpectraError(f"peft cannot adapt this {type(model).__name__}: {reason}; change the settings") from error

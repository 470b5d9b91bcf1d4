"""The mean gradient of a loss by whole weights, one weight's gradient in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.lora.configuration import SliceConfig
from spectra.lora.layers import matrix_of
from spectra.lora.targets import choose_targets

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")


def mean_gradients(
    model: Model, batches: Iterable[Batch], loss: Callable[[Model, Batch], Tensor], config: SliceConfig
) -> dict[str, Tensor]:
    """Mean over batches of the gradient of a loss by every weight that `attach(model, config)` would adapt.

    The model runs in evaluation mode, without dropout, and is left as it was. As soon as a weight's gradient is known
    it is added to its sum on the CPU and dropped, so that beside the sums only one gradient exists at a time.

    Args:
        model: the base model, without adapters.
        batches: what `loss` takes; each counts the same.
        loss: loss(model, batch) -> scalar, the mean over the batch.
    Returns: name of the module -> G (m, n), float32 (float64 for float64 weights), on the CPU, shaped as W.
    Raises: SpectraError without batches, for a loss that is no finite number, and as `attach` does for targets.
    Cost: a forward and a backward pass per batch.
    """
    targets, _ = choose_targets(model, config)
    sums: dict[str, Tensor] = {}

    def added(name: str) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.to(torch.promote_types(weight.dtype, torch.float32)).cpu()
            sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()
            weight.grad = None

        return add

    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    count = 0
    try:
        model.eval()
        model.requires_grad_(False)
        for parameter, _, _ in before:
            parameter.grad = None
        with ExitStack() as stack, torch.enable_grad():
            for target in targets:
                weight = target.module.get_parameter("weight").requires_grad_(True)
                hook = weight.register_post_accumulate_grad_hook(added(target.name))  # type: ignore[no-untyped-call]
                stack.callback(hook.remove)
            for batch in batches:
                count += 1
                value = loss(model, batch)
                if value.numel() != 1 or not bool(torch.isfinite(value).all()):
                    raise SpectraError(f"the loss of batch {count} is no finite number; check the batch and the loss")
                if value.requires_grad:  # it depends on some target
                    torch.autograd.backward(value)
    finally:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
    if not count:
        raise SpectraError("no batch was given to take gradients from; give at least one")
    unmoved = next((target.name for target in targets if target.name not in sums), None)
    if unmoved is not None:
        raise SpectraError(f"the loss does not depend on {unmoved!r}; exclude it")
    return {target.name: matrix_of(target.kind, sums[target.name] / count) for target in targets}

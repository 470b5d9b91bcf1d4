"""Where in a model a weight matrix meets its inputs: which module, which of its arguments, read in which way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectra.features.views import Patches, Rows, Turned, View
from spectra.matrices.names import unwrapped

Slot = Literal["input", "query", "key", "value", "attended"]

_PEFT_PREFIX = "base_model.model."
_ATTENTION_PARAMETERS: dict[str, Slot] = {"q_proj_weight": "query", "k_proj_weight": "key", "v_proj_weight": "value"}
_ATTENTION_PARTS: dict[str, Slot] = {"q": "query", "k": "key", "v": "value"}


class NotCaptured(Exception):
    """The inputs of a weight cannot be seen by hooks; the text is the reason."""


@dataclass(frozen=True)
class Site:
    """The inputs of a weight matrix.

    Attributes:
        key: names the stream of inputs: the module's name, with `[query]`, `[key]`, `[value]` where it has several.
        module: the name of the module whose call brings the inputs.
        slot: which of them: "input"; for `nn.MultiheadAttention` one of "query", "key", "value", or "attended", what
            its output projection takes in.
        view: how they are read as vectors.
        groups: of a convolution: the weight is block-diagonal with as many blocks.
        is_transposed: whether the module's weight is stored in x out (Conv1D).
    """

    key: str
    module: str
    slot: Slot
    view: View
    groups: int = 1
    is_transposed: bool = False


def holders(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """The name of every parameter, without what wrappers put in -> the module that holds it, with its name."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters:
            name = f"{module_name}.{parameter}" if module_name else parameter
            found.setdefault(unwrapped(name).removeprefix(_PEFT_PREFIX), (module_name, module))
    return found


def holder_of(found: dict[str, tuple[str, nn.Module]], tensor: str) -> tuple[str, nn.Module] | None:
    """The module that holds the tensor of a checkpoint of the same model."""
    return found.get(unwrapped(tensor).removeprefix(_PEFT_PREFIX))


def site_of(model: nn.Module, name: str, module: nn.Module, parameter: str = "weight", part: str = "") -> Site:
    """The inputs of one weight matrix of a module.

    Args:
        model: that the module is part of.   name: the module's name in it.
        parameter, part: which of the module's matrices, where it has several.
    Raises: NotCaptured with the reason.
    """
    parent_name = name.rpartition(".")[0]
    if name.endswith("out_proj") and isinstance(parent := model.get_submodule(parent_name), nn.MultiheadAttention):
        return Site(name, parent_name, "attended", _rows(parent, parent.embed_dim))
    match module:
        case nn.MultiheadAttention():
            slot = _ATTENTION_PARAMETERS.get(parameter) or _ATTENTION_PARTS.get(part)
            if slot is None:
                raise NotCaptured(f"{parameter!r} of a MultiheadAttention takes in nothing that hooks see")
            width = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}[slot]
            return Site(f"{name}[{slot}]", name, slot, _rows(module, width))
        case nn.Linear():
            return Site(name, name, "input", Rows(module.in_features))
        case nn.Conv2d() | nn.Conv1d() if not isinstance(module, nn.modules.conv._ConvTransposeNd):
            return Site(name, name, "input", _patches(module), groups=module.groups)
        case _ if _is_conv1d_of_transformers(module):
            return Site(name, name, "input", Rows(_inputs_of_conv1d(module)), is_transposed=True)
        case _:
            raise NotCaptured(_why_not(module))


def sites_of(model: nn.Module, name: str) -> Iterator[Site]:
    """Every stream of inputs of a module by name. Raises: NotCaptured."""
    module = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        for part in _ATTENTION_PARTS:
            yield site_of(model, name, module, part=part)
        yield site_of(model, f"{name}.out_proj" if name else "out_proj", module.out_proj)
    else:
        yield site_of(model, name, module)


def expanded(W: Tensor, groups: int) -> Tensor:
    """The matrix that meets all channels of a grouped convolution: W's groups of rows as diagonal blocks."""
    return W if groups == 1 else _block_diagonal(W.chunk(groups))


def _rows(attention: nn.MultiheadAttention, width: int) -> View:
    return Rows(width) if attention.batch_first else Turned(width)


def _patches(module: Any) -> Patches:
    is_flat = isinstance(module, nn.Conv1d)
    kernel, stride, dilation = (
        (1, *numbers) if is_flat else tuple(numbers) for numbers in (module.kernel_size, module.stride, module.dilation)
    )
    padding = tuple(module._reversed_padding_repeated_twice) + ((0, 0) if is_flat else ())
    return Patches(module.in_channels, kernel, stride, dilation, padding, module.padding_mode, 1 if is_flat else 2)


def _inputs_of_conv1d(module: Any) -> int:
    return int(module.weight.shape[0])


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    block_diag: Callable[..., Tensor] = torch.block_diag
    return block_diag(*blocks)


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _why_not(module: nn.Module) -> str:
    kind = type(module).__name__
    match module:
        case nn.Embedding() | nn.EmbeddingBag():
            return "an embedding: its rows are looked up, not multiplied by an input"
        case nn.RNNBase():
            return f"of a recurrent {kind}, whose steps run inside one kernel that hooks do not see"
        case nn.modules.conv._ConvTransposeNd():
            return "a transposed convolution, whose outputs are sums over overlapping patches"
        case nn.Conv3d():
            return "a convolution in three dimensions, which is not unfolded here"
        case _:
            return f"held by a {kind}, and inputs are known of Linear, Conv1D, Conv1d, Conv2d and MultiheadAttention"

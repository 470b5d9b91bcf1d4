"""Fully sharded data parallelism: every process keeps its share of each weight, and gathers a block while it runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.sources.libraries import first_line
from spectra.training.tasks import Task

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

# What accelerate's launcher asks FSDP for beside sharding, and this has not.
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "keeping weights in the memory of the CPU",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation checkpointing",
}


def is_asked_for(setting: bool) -> bool:
    """Whether weights are to be shared: by the settings, or by `accelerate launch --use_fsdp`.

    Raises `SpectraError` for options of that launcher that would not be heeded.
    """
    by_launcher = _is_true("ACCELERATE_USE_FSDP")
    for name, what in _REFUSED.items():
        if by_launcher and _is_true(name):
            raise SpectraError(f"{name.lower()} is set, and {what} is not supported; launch without it")
    return setting or by_launcher


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


class Together(nn.Module):
    """Models that share modules, under one root: what is gathered for a call is scattered again after it."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, call: Callable[[], Tensor]) -> Tensor:
        """What `call`, which runs one of the models, gives; no view, whose gradient would not pass through the root."""
        found = call()
        return found.clone() if found._is_view() else found


@dataclass(frozen=True)
class Sharded:
    """Models whose weights are shared among the processes of an accelerator, by torch's `fully_shard` (FSDP2).

    Blocks, the members of the outermost `nn.ModuleList`s and `nn.Sequential`s, are gathered one at a time; what lies
    outside of them is gathered for as long as a call takes. It is the same on GPUs (NCCL) and on a CPU (gloo).
    """

    root: Any  # Together, as fully_shard returns it
    is_adapter: bool
    is_first: bool

    @classmethod
    def over(cls, accelerator: Accelerator, models: Sequence[nn.Module], *, is_adapter: bool) -> Sharded:
        """Share the weights of `models`, the trained one first; they move to the accelerator's device piece by piece.

        Raises: SpectraError where there is one process, and where a block trains parameters of several dtypes.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if accelerator.num_processes == 1:
            raise SpectraError(
                "weights are to be shared among processes (shard), and there is one; start the run with "
                "accelerate launch or torchrun, or leave shard out"
            )
        trained = {parameter for parameter in models[0].parameters() if parameter.requires_grad}
        root = Together(models)
        for parameter in root.parameters():  # a head that is only watched takes no gradient
            parameter.requires_grad_(parameter in trained)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        try:
            own = [*blocks(root.models)]
            for block in (*own, root):  # a group takes the gradients of one dtype only
                for module in of_other_dtypes(block, () if block is not root else own):
                    fully_shard(module, mesh=mesh)
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise SpectraError(
                f"this model cannot be shared among processes ({first_line(error)}); train it without shard"
            ) from error
        return cls(root, is_adapter, accelerator.is_main_process)

    def through(self, task: Task) -> Task:
        """The task with its model called below the root."""
        return replace(task, forward=partial(_below, self.root, task.forward))

    @contextmanager
    def exchanging(self, now: bool) -> Iterator[None]:
        """Whether the backward passes of the block add the gradients up over the processes."""
        self.root.set_requires_gradient_sync(now)
        yield

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The trained model as it is saved, for the block and in the first process alone; all must enter.

        Of an adapter the trained parameters are plain tensors then; of a whole model all are, one by one on the CPU.
        """
        places = [
            (module._parameters, name, parameter)
            for module in self.root.models[0].modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and (parameter.requires_grad or not self.is_adapter)
        ]
        whole: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in dict.fromkeys(parameter for _, _, parameter in places):  # tied weights once, in all processes
            full = whole_tensor(parameter.detach())
            if self.is_first:
                device = own_share(parameter).device if self.is_adapter else full.device
                whole[parameter] = nn.Parameter(full.to(device), parameter.requires_grad)
        try:
            for parameters, name, parameter in places:
                parameters[name] = whole.get(parameter, parameter)
            yield
        finally:
            for parameters, name, parameter in places:
                parameters[name] = parameter


def _below(
    root: Together, forward: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Mapping[str, Any]
) -> Tensor:
    logits: Tensor = root(partial(forward, model, batch))
    return logits


def blocks(root: nn.Module) -> Iterator[nn.Module]:
    """The outermost members, with parameters, of all lists and chains of modules below `root`, each once.

    >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]), "head": nn.Linear(2, 2)})
    >>> [block is model["layers"][0] for block in blocks(model)]
    [True]
    """
    seen: set[nn.Module] = set()

    def below(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if child in seen:
                continue
            seen.add(child)
            if isinstance(module, nn.ModuleList | nn.Sequential) and module is not root:
                if any(True for _ in child.parameters()):
                    yield child
            else:
                yield from below(child)

    return below(root)


def of_other_dtypes(block: nn.Module, without: Sequence[nn.Module] = ()) -> list[nn.Module]:
    """The modules below `block`, and not below those of `without`, that train in another dtype than most of them."""
    left_out = {module for each in without for module in each.modules()}
    dtypes: dict[nn.Module, torch.dtype] = {}
    for module in block.modules():
        trained = [parameter.dtype for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        if trained and module not in left_out:
            dtypes[module] = trained[0]
    if len({*dtypes.values()}) < 2:
        return []
    most = Counter(dtypes.values()).most_common(1)[0][0]
    return [module for module, dtype in dtypes.items() if dtype != most and module is not block]


def whole_tensors(values: Any) -> Any:
    """Nested values with shared tensors put together again on the CPU. All processes must call this."""
    if isinstance(values, Mapping):
        return {name: whole_tensors(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(whole_tensors(value) for value in values)
    return whole_tensor(values) if isinstance(values, Tensor) else values


def whole_tensor(value: Tensor) -> Tensor:
    """A shared tensor put together again on the CPU, any other as it is. All processes must call this."""
    full = getattr(value, "full_tensor", None)
    return value if full is None else full().cpu().clone()  # without the padding that shares are of one length by


def shared_like(value: Tensor, like: Tensor) -> Tensor:
    """The share of a whole tensor that this process keeps, where `like`, of the same shape, is shared."""
    if getattr(like, "full_tensor", None) is None or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    assert hasattr(like, "device_mesh") and hasattr(like, "placements")
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def own_share(value: Tensor) -> Tensor:
    """What of a tensor this process holds: all of one that is not shared."""
    share: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return share


def shared_state(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The state of a torch optimiser, as `whole_tensors` gives it, for these parameters (in the optimiser's order)."""
    spread = {
        number: {
            name: shared_like(value, parameters[number]) if isinstance(value, torch.Tensor) else value
            for name, value in of_one.items()
        }
        for number, of_one in state["state"].items()
    }
    return {**state, "state": spread}

"""Which parameters move: one function a method, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.linalg.svd import Spectrum
from spectra.lora import METHODS as INITIALISATIONS
from spectra.lora import SliceConfig, attach, mean_gradients
from spectra.lora.configuration import ALL_LINEAR, PEFT
from spectra.lora.layers import kind_of
from spectra.training.examples import Batch
from spectra.training.misspelt import closest
from spectra.training.settings import MethodSettings
from spectra.training.tasks import Task, without_labels


@dataclass(frozen=True)
class Preparation:
    """What a method may use: the seed, base spectra kept on disk or shared by a sweep, some training batches."""

    seed: int = 0
    cache: Path | None = None
    spectra: MutableMapping[str, Spectrum] | None = None
    batches: Callable[[], Iterable[Batch]] = lambda: ()


Method = Callable[[Task, MethodSettings, Preparation], nn.Module]


def full(task: Task, method: MethodSettings, preparation: Preparation) -> nn.Module:
    """Every parameter moves."""
    return task.model.requires_grad_(True)


def head(task: Task, method: MethodSettings, preparation: Preparation) -> nn.Module:
    """The new head alone moves: what the unchanged features of the base can do, the floor of every table."""
    if not task.head:
        raise SpectraError("the method head trains a new head, and this task has none; choose another method")
    task.model.requires_grad_(False)
    for name in task.head:
        task.model.get_submodule(name).requires_grad_(True)
    return task.model


def adapter(task: Task, method: MethodSettings, preparation: Preparation) -> nn.Module:
    """The factors of an adapter move, and the new head; the adapter starts where the method's name says."""
    config = adapter_config(method, task, preparation.seed)
    # Some of peft's own initialisations look at what the model is shown, through its forward pass alone.
    shown = [without_labels(batch) for batch in preparation.batches()] if method.name.startswith(PEFT) else None
    return attach(task.model, config, cache=preparation.cache, spectra=preparation.spectra, batches=shown)


def lora_ga(task: Task, method: MethodSettings, preparation: Preparation) -> nn.Module:
    """An adapter that starts from the mean gradient of the first training batches."""
    config = adapter_config(method, task, preparation.seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        total, _, count = task.called_through(model).losses(batch)
        return total / count

    gradients = mean_gradients(task.model, preparation.batches(), loss, config=config)
    return attach(task.model, config, gradients=gradients, cache=preparation.cache, spectra=preparation.spectra)


METHODS: Mapping[str, Method] = {
    "full": full,
    "head": head,
    **dict.fromkeys(INITIALISATIONS, adapter),
    "lora_ga": lora_ga,
    f"{PEFT}lora_ga": lora_ga,
}


def method_named(name: str) -> Method:
    """The method of that name, or the adapter of `peft:<init>`. Raises `SpectraError` naming the closest known."""
    if name not in METHODS and not name.startswith(PEFT):
        raise SpectraError(f"{name!r} is no method{closest(name, [*METHODS, f'{PEFT}<init>'])}")
    return METHODS.get(name, adapter)


def adapter_config(method: MethodSettings, task: Task | None = None, seed: int = 0) -> SliceConfig:
    """The `SliceConfig` of a method that is one of `spectra.lora`'s; the new head of `task` is trained whole beside it.

    Raises `SpectraError` for settings that contradict each other, before anything is loaded.
    """
    head = task.head if task else ()
    inside = [
        name
        for name, module in (task.model.named_modules() if task else ())
        if kind_of(module) and any(name == whole or name.startswith(f"{whole}.") for whole in head)
    ]
    if method.rank is None:
        raise SpectraError(f"the method {method.name} trains no adapter; choose another method")
    return SliceConfig(
        method=method.name,
        rank=method.rank,
        position=method.position,
        start=method.start,
        alpha=method.alpha,
        use_rslora=method.use_rslora,
        scale=method.scale,
        target_modules=ALL_LINEAR if method.targets == (ALL_LINEAR,) else method.targets or None,
        exclude=(*method.exclude, *inside),
        modules_to_save=head,
        rank_pattern=method.rank_pattern,
        alpha_pattern=method.alpha_pattern,
        start_pattern=method.start_pattern,
        position_pattern=method.position_pattern,
        dropout=method.dropout,
        gamma=method.gamma,
        seed=seed,
    )

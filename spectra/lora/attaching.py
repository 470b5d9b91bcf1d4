"""Put slices of their own weights into the modules of a model, as a PEFT adapter that changes nothing at step 0."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectra.cache import SpectrumCache
from spectra.engines import local
from spectra.errors import SpectraError
from spectra.linalg.svd import NotFiniteError, Spectrum, svd
from spectra.lora.configuration import PEFT, SliceConfig
from spectra.lora.initialisations import METHODS, Request
from spectra.lora.injecting import inject
from spectra.lora.layers import peft_factors
from spectra.lora.peft_config import UNFINISHED, lora_config, require_peft
from spectra.lora.peft_inits import inject_initialised
from spectra.lora.record import Attachment, Slot, adapted_layers, fingerprint_of, keep_attachment
from spectra.lora.slices import SliceInit, factor_dtype, slice_start, with_float64
from spectra.lora.targets import Target, choose_targets

if TYPE_CHECKING:
    from peft import PeftModel


def attach(
    model: nn.Module,
    config: SliceConfig,
    *,
    cache: str | os.PathLike[str] | SpectrumCache | None = None,
    spectra: MutableMapping[str, Spectrum] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    batches: Iterable[Any] | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> PeftModel:
    """Give modules of a model LoRA factors that start from a slice of their weights, ready to train.

    The base weights are left as they are, and every module computes W x + c (B A - B0 A0) x. That is W_frozen x +
    c B A x with W_frozen = W - c B0 A0, and gives A and B the same gradients; but no residual has to be rounded to the
    dtype of the base, both terms cancel to the last bit at step 0, and what was trained is at any time a plain LoRA
    of the unchanged base, of rank 2 r: [B, -B0] [A; A0]. Only A, B and `modules_to_save` require gradients; A and B
    are float32 (float64 in a float64 model). A0 and B0 are buffers, `initial_A` and `initial_B` of each layer, and so
    part of the model's state dict. Save the result with `save_adapter`; `save_pretrained` does not know of them.

    Modules may be Linear, transformers' Conv1D, Embedding (its table counts as entries x dimension) and Conv2d (out x
    in height width). The model is adapted in place, as `peft.get_peft_model` does it; where something fails, it is left
    as it was. For another slice of the same model, take `result.unload()` first, which gives the base back.

    Args:
        model: a transformers model or any other module, without adapters.
        config: which modules, which slices.
        cache: a folder for whole decompositions (or a `SpectrumCache`), as `compare(cache=...)` has it.
        spectra: module name -> `Spectrum`, filled here and used again: of a sweep over slices the first one decomposes.
            Without `cache` and `spectra` only the slices themselves are computed, which is cheaper for one.
        gradients: for `lora_ga` (and `peft:lora_ga`): module name -> mean gradient (m, n), as of `mean_gradients`.
        batches: for `peft:corda` and `peft:eva`: what the model is run on, dicts of its arguments, iterable twice.
        device: where to decompose; the weight's own by default, the CPU for MPS.   workers: weights at a time.
        progress: called with (cost done, cost in all, name).
    Returns: a `peft.PeftModel`; `attachment(result)` says what was done.
    Raises: SpectraError where peft is missing, for modules that carry no LoRA, for slices that do not fit, for spectra
        and gradients of other weights.
    Cost: of the decompositions; none where all spectra are there.
    """
    require_peft()
    _check_is_plain(model)
    targets, notes = choose_targets(model, config)
    kinds = {target.name: target.kind for target in targets}
    ranks = {target.name: config.rank_of(target.name) for target in targets}
    scalings = {target.name: config.scaling_of(target.name) for target in targets}
    settings = lora_config(model, config, kinds, ranks, scalings)
    for target in targets:  # before anything is decomposed, so that the first slip is always the same
        _check_slice(target, ranks[target.name], *config.slice_of(target.name))
    if config.method.startswith(PEFT):
        adapted = inject_initialised(model, targets, settings, config, gradients, batches)
        starts: dict[str, SliceInit] = {}
    else:
        store = SpectrumCache(cache) if isinstance(cache, str | os.PathLike) else cache
        supply = _Supply(store, spectra, _device(device))
        starts = _starts(targets, config, supply, gradients, workers or local.available_cores(), progress)
        adapted = inject(model, targets, settings)
        notes += store.notes if store else ()
    slots = {target.name: _slot(target, ranks, scalings, starts.get(target.name)) for target in targets}
    keep_attachment(adapted, Attachment(config, slots, (*notes, *_dead(starts, config))))
    for name, layer in adapted_layers(adapted).items():
        if name in starts:
            A0, B0 = peft_factors(layer.kind, starts[name].B0, starts[name].A0, layer.weight.shape)
            layer.fill(A0, B0)
        A, B = layer.trained()
        if bool(A.any()) and bool(B.any()):
            layer.start_from(A, B)
            settings.init_lora_weights = UNFINISHED  # type: ignore[assignment]
    return adapted


class _Supply:
    """Whole spectra of weights: those that the caller keeps, then those on disk, then new ones."""

    def __init__(
        self,
        cache: SpectrumCache | None,
        spectra: MutableMapping[str, Spectrum] | None,
        device: torch.device | None,
    ) -> None:
        self.cache, self.spectra, self.device = cache, spectra, device

    def placed(self, W: Tensor) -> Tensor:
        """W where it is decomposed."""
        return with_float64(W if self.device is None else W.to(self.device))

    def spectrum(self, target: Target) -> Spectrum | None:
        """The whole spectrum of a target; None where nothing would keep it and a slice is better taken alone."""
        if self.spectra is not None and target.name in self.spectra:
            return self.spectra[target.name]
        if self.spectra is None and self.cache is None:
            return None
        W, dtype = target.W, factor_dtype(target.W)
        if self.cache is None:
            found = svd(self.placed(W), dtype)
        else:
            found = self.cache.spectrum(W.cpu(), dtype, lambda: svd(self.placed(W), dtype))
        if self.spectra is not None:
            self.spectra[target.name] = found
        return found


def _starts(
    targets: list[Target],
    config: SliceConfig,
    supply: _Supply,
    gradients: Mapping[str, Tensor] | None,
    workers: int,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, SliceInit]:
    """A0 and B0 of every target, the costliest first."""
    order = sorted(targets, key=lambda target: -target.cost)
    total, done = sum(target.cost for target in targets), 0
    starts: dict[str, SliceInit] = {}
    for index, start in local.run(lambda target: _start(target, config, supply, gradients), order, workers):
        starts[order[index].name] = start
        done += order[index].cost
        if progress:
            progress(done, total, order[index].name)
    return starts


def _start(target: Target, config: SliceConfig, supply: _Supply, gradients: Mapping[str, Tensor] | None) -> SliceInit:
    name = target.name
    first, position = config.slice_of(name)
    request = Request(
        weight=supply.placed(target.W),
        rank=config.rank_of(name),
        scaling=config.scaling_of(name),
        scale=config.scale,
        start=first,
        position=position,
        seed=seed_of(config.seed, name),
        gamma=config.gamma,
        spectrum=lambda: supply.spectrum(target),
        gradient=lambda: _gradient(gradients, target),
    )
    try:
        return METHODS[config.method](request)
    except NotFiniteError as error:
        raise SpectraError(f"the weight of {name!r} holds {error}; load sound weights") from error
    except SpectraError as error:
        raise SpectraError(f"{name!r}: {error}") from error


def seed_of(seed: int, name: str) -> int:
    """The seed of one module, whatever other modules are adapted."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def _gradient(gradients: Mapping[str, Tensor] | None, target: Target) -> Tensor:
    if gradients is None or target.name not in gradients:
        raise SpectraError("LoRA-GA starts from a mean gradient and none was given; pass those of mean_gradients")
    return gradients[target.name].to(target.stored.device)


def _device(device: str | torch.device | None) -> torch.device | None:
    """The device, once it was seen to take a tensor."""
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that it lacks
        reason = str(error).partition("\n")[0]
        raise SpectraError(f"device {str(device)!r} cannot be used ({reason}); give cpu, cuda or cuda:1") from error


def _check_is_plain(model: nn.Module) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise SpectraError(
            f"this {type(model).__name__} carries an adapter already; merge it with spectra.lora.merge, "
            "or take model.unload(), and attach to what that returns"
        )


def _check_slice(target: Target, rank: int, start: int | None, position: float | None) -> None:
    m, n = target.W.shape
    if rank > min(m, n):
        raise SpectraError(
            f"{target.name!r} is {m} x {n} and has no slice of rank {rank}; "
            f"give it a rank of at most {min(m, n)} with rank_pattern, or exclude it"
        )
    if start is None and position is None:  # of a method that takes none
        return
    try:
        slice_start(target.W, rank, start=start, position=position)
    except SpectraError as error:
        raise SpectraError(f"{target.name!r}: {error}") from error


def _slot(target: Target, ranks: Mapping[str, int], scalings: Mapping[str, float], start: SliceInit | None) -> Slot:
    m, n = target.W.shape
    values = () if start is None or start.singular_values is None else tuple(start.singular_values.tolist())
    first = None if start is None else start.start
    return Slot(
        target.name, target.kind, m, n, ranks[target.name], scalings[target.name], first, values,
        fingerprint_of(target.stored),
    )  # fmt: skip


def _dead(starts: Mapping[str, SliceInit], config: SliceConfig) -> list[str]:
    """What to say of slices that hold components of singular value zero."""
    notes = []
    for name, start in starts.items():
        if config.scale != "sqrt_sigma" or start.singular_values is None:
            continue
        norm = float(torch.linalg.vector_norm(start.weight.float()))
        count = int((start.singular_values <= max(start.weight.shape) * 2.2e-16 * norm).sum())
        if count:
            notes.append(
                f"{count} of the {start.rank} components of {name!r} have singular value zero: their factors start at "
                "zero and never move; scale orthonormal moves them"
            )
    return notes

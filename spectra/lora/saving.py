"""Adapted models as PEFT adapter folders of the unchanged base, and back, to train on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectra.checkpoints import Adapter, open_checkpoint
from spectra.checkpoints.wording import listed
from spectra.errors import SpectraError
from spectra.lora.injecting import inject
from spectra.lora.layers import ADAPTER, INITIAL, AdaptedLayer, kind_of, peft_factors
from spectra.lora.peft_config import as_json, lora_config, require_peft
from spectra.lora.peft_folder import WEIGHTS, check_place, put_adapter
from spectra.lora.record import Attachment, Slot, adapted_layers, attachment, keep_attachment
from spectra.lora.targets import Target, tied_names, why_not
from spectra.sources.adapters import RECORD

if TYPE_CHECKING:
    from peft import PeftModel

FORMAT = 1


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write what was trained as a LoRA adapter that plain `PeftModel.from_pretrained(base, folder)` loads.

    A module that starts from c B0 A0 gets the factors [B, -B0] and [A; A0] of rank 2 r, with lora_alpha adjusted so
    that the scaling stays c; others get B and A. `modules_to_save` are written whole. Beside them `spectra_slices.json`
    keeps the configuration and the slices: with it, `load_adapter` finds A, B, A0 and B0 again. It also has the
    `id2label` of a classification model, its class names by number.

    Args:
        model: what `attach` or `load_adapter` returned, in any state of training.
        folder: written whole or not at all, and read back first.   force: replace an adapter that is there.
    Returns: the folder.
    Raises: SpectraError for a model without slices, a taken folder, a full disk, and factors that are not finite.
    """
    record = attachment(model)
    place = Path(folder).expanduser().absolute()
    check_place(place, force)
    layers = adapted_layers(model)
    updates = {name: layer.update() for name, layer in layers.items()}
    tensors = _whole_modules(model)
    prefix = "base_model.model."
    for name, update in updates.items():
        layer = layers[name]
        if not all(bool(torch.isfinite(factor).all()) for factor in (update.A, update.B)):
            raise SpectraError(f"the factors of {name!r} hold NaN or infinite entries; go back to a sound state")
        A, B = peft_factors(layer.kind, update.B.cpu(), update.A.cpu(), layer.weight.shape)
        form = "lora_embedding_{}" if layer.kind == "embedding" else "lora_{}.weight"
        tensors |= {f"{prefix}{name}.{form.format(side)}": factor for side, factor in (("A", A), ("B", B))}
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    settings = lora_config(
        base,
        record.config,
        {name: layer.kind for name, layer in layers.items()},
        {name: update.rank for name, update in updates.items()},
        {name: update.c for name, update in updates.items()},
    )
    settings.inference_mode = True
    settings.base_model_name_or_path = _loadable(base)
    content: dict[str, Any] = {"format": FORMAT, **record.to_dict()}
    if names := class_names(base):
        content["id2label"] = dict(enumerate(names))
    put_adapter(place, tensors, as_json(settings), updates, content)
    return place


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> PeftModel:
    """Attach what `save_adapter` wrote to its base model again, with the same A, B, A0 and B0, to go on training.

    Nothing is decomposed. The state of an optimiser is not part of the folder. Where the record cannot tell whether
    this is the base (older versions kept no fingerprints, a base may be loaded in a narrower dtype than the adapter was
    trained in), the notes of `attachment` say so.

    Args: model: the unchanged base, without adapters.   folder: of `save_adapter`.
    Raises: SpectraError where the folder is none of `save_adapter`, or was trained on another base.
    """
    require_peft()
    place = Path(folder).expanduser()
    record = _read_record(place)
    adapter = open_checkpoint(place)
    assert isinstance(adapter, Adapter)
    targets = _targets(model, record, place)
    slots = record.slots
    settings = lora_config(
        model,
        record.config,
        {name: slot.kind for name, slot in slots.items()},
        {name: slot.rank for name, slot in slots.items()},
        {name: slot.scaling for name, slot in slots.items()},
    )
    adapted = inject(model, targets, settings)
    untold = [target.name for target in targets if slots[target.name].is_of(target.stored) is None]
    if untold:
        said = f"whether this is the base that {place} was trained on cannot be told from {listed(untold, most=1)}"
        record = replace(record, notes=(*record.notes, said))
    keep_attachment(adapted, record)
    for name, layer in adapted_layers(adapted).items():
        _restore(layer, slots[name], adapter)
    _fill_whole_modules(adapted, place)
    return adapted


def _restore(layer: AdaptedLayer, slot: Slot, adapter: Adapter) -> None:
    update, r = adapter.update(f"{slot.name}.weight"), slot.rank
    shape = layer.weight.shape
    layer.fill(*peft_factors(slot.kind, update.B[:, :r], update.A[:r], shape))
    if update.rank == 2 * r:
        A0, B0 = peft_factors(slot.kind, -update.B[:, r:], update.A[r:], shape)
        layer.start_from(*(factor.to(like) for factor, like in zip((A0, B0), layer.trained(), strict=True)))


def _read_record(folder: Path) -> Attachment:
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpectraError(
            f"{folder} holds no {RECORD} of save_adapter; a plain adapter is loaded with PeftModel.from_pretrained"
        ) from error
    except (OSError, ValueError) as error:
        raise SpectraError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; save it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SpectraError(f"{path} is not of format {FORMAT}, which this version of spectra reads; save it again")
    try:
        return Attachment.from_dict(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise SpectraError(f"{path} is damaged ({error}); save the adapter again") from error


def _targets(model: nn.Module, record: Attachment, folder: Path) -> list[Target]:
    """The modules of the model that the record names, checked."""
    named, ties = dict(model.named_modules()), tied_names(model)
    targets = []
    for slot in record.slots.values():
        module = named.get(slot.name)
        target = Target(slot.name, module, slot.kind) if module is not None and kind_of(module) == slot.kind else None
        if target is None or tuple(target.W.shape) != (slot.rows, slot.columns):
            found = "none of that kind" if target is None else f"one of {' x '.join(map(str, target.W.shape))}"
            raise SpectraError(
                f"{folder} adapts {slot.name!r}, of kind {slot.kind} and {slot.rows} x {slot.columns}, and this "
                f"{type(model).__name__} has {found}; give the base that it was trained on"
            )
        if slot.is_of(target.stored) is False:
            raise SpectraError(
                f"{folder} was trained on another base: {slot.name!r} of this {type(model).__name__} has other "
                "weights; give the base that it was trained on"
            )
        if reason := why_not(slot.name, named, ties):
            raise SpectraError(f"{slot.name!r} carries no LoRA: {reason}")
        targets.append(target)
    return targets


def class_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the classes of a transformers classification model, by number; empty for every other model."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    is_classifier = type(model).__name__.endswith("Classification")
    return tuple(str(names[number]) for number in sorted(names)) if names and is_classifier else ()


def _whole_modules(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `modules_to_save`, under the names that peft saves them by."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    # peft counts the buffers of adapted layers in; those are in the factors already.
    return {
        name: tensor.detach().cpu()
        for name, tensor in state.items()
        if ".lora_" not in name and not name.endswith(INITIAL)
    }


def _fill_whole_modules(model: PeftModel, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    whole = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if ".lora_" not in name}
    if whole:
        set_peft_model_state_dict(model, whole, adapter_name=ADAPTER)


def _loadable(base: nn.Module) -> str | None:
    """What `from_pretrained` of the base would take."""
    name = getattr(base, "name_or_path", None)
    return name if isinstance(name, str) and name else None

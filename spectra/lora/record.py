"""What `attach` did to a model: kept on the model, and written beside its adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.lora.configuration import SliceConfig
from spectra.lora.layers import AdaptedLayer, Kind

_PLACE = "_spectra_attachment"


@dataclass(frozen=True)
class Slot:
    """One adapted module.

    Attributes:
        name: of the module, in the base model.   kind: of it.   rows, columns: m, n.
        rank: r.   scaling: c.   start: first component of its slice, None where its factors are none.
        singular_values: s_i of its slice; empty where its factors are none.
        fingerprint: of the base's weight, see `fingerprint_of`; "" in records of older versions.
    """

    name: str
    kind: Kind
    rows: int
    columns: int
    rank: int
    scaling: float
    start: int | None
    singular_values: tuple[float, ...]
    fingerprint: str = ""

    def is_of(self, weight: Tensor) -> bool | None:
        """Whether this is the weight, as its module stores it, that was adapted; None where that cannot be told.

        A weight in a wider dtype than it was adapted in is rounded to that; of a narrower one nothing can be said.
        """
        dtype = getattr(torch, self.fingerprint.partition(":")[0], None)
        if dtype is None or torch.promote_types(dtype, weight.dtype) != weight.dtype:
            return None
        return fingerprint_of(weight.to(dtype)) == self.fingerprint


def fingerprint_of(weight: Tensor) -> str:
    """The dtype of a weight and the SHA-256 of its bytes."""
    content = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{str(weight.dtype).removeprefix('torch.')}:{hashlib.sha256(content).hexdigest()}"


@dataclass(frozen=True)
class Attachment:
    """What was attached: the configuration, a `Slot` a module in the model's order, and what to tell the user."""

    config: SliceConfig
    slots: Mapping[str, Slot]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Attachment.from_dict` takes them back."""
        return {
            "config": self.config.to_dict(),
            "modules": [asdict(slot) for slot in self.slots.values()],
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Attachment:
        """The record of these values. Raises KeyError, TypeError or SpectraError where they are none."""
        slots = [Slot(**{**slot, "singular_values": tuple(slot["singular_values"])}) for slot in values["modules"]]
        return cls(SliceConfig.from_dict(values["config"]), {slot.name: slot for slot in slots}, tuple(values["notes"]))


def attachment(model: nn.Module) -> Attachment:
    """What `attach` or `load_adapter` did to this model; SpectraError where neither made it."""
    found = getattr(model, _PLACE, None)
    if not isinstance(found, Attachment):
        raise SpectraError(
            f"this {type(model).__name__} carries no slices; give the model that attach or load_adapter returned"
        )
    return found


def keep_attachment(model: nn.Module, record: Attachment) -> None:
    """Leave the record on the model."""
    setattr(model, _PLACE, record)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers by the names of their modules in the base model. SpectraError as `attachment`."""
    record = attachment(model)
    base = model.get_base_model()  # type: ignore[operator]
    return {name: AdaptedLayer(base.get_submodule(name), slot.kind) for name, slot in record.slots.items()}

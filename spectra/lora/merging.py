"""Adapted models as plain ones: W' = W + D, rounded once to the dtype of W."""

from __future__ import annotations

import copy as copying
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectra.atomic import replacing, replacing_folder
from spectra.errors import SpectraError
from spectra.lora.record import adapted_layers, attachment
from spectra.tensor_files import write_tensors, write_torch

TORCH, SAFE = (".pt", ".pth", ".bin"), ".safetensors"


def merge(model: nn.Module, *, copy: bool = True) -> nn.Module:
    """The tuned model without adapters: W' = W + c (B A - B0 A0) of every adapted module, `modules_to_save` in place.

    The sum is made in float64 and rounded once, to the dtype of the base. peft's own `merge_and_unload` gives the same.

    Args:
        model: what `attach` or `load_adapter` returned.
        copy: leave it as it is and merge a copy, which takes the memory of the model once more. False merges it in
            place, after which only the result is of use.
    Returns: a module of the base's own class, whose parameters all require gradients.
    Raises: SpectraError for a model without slices, and where peft has merged its adapter already.
    """
    attachment(model)
    if any(layer.layer.merged for layer in adapted_layers(model).values()):
        raise SpectraError("peft has merged the adapter into the base already; call model.unmerge_adapter() first")
    whole = copying.deepcopy(model) if copy else model
    for layer in adapted_layers(whole).values():
        layer.weight.data = layer.tuned_weight()
    plain: nn.Module = whole.unload()  # type: ignore[operator]
    return plain.requires_grad_(True)


def save_merged(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the tuned model: a model folder for a transformers model, a file of tensors otherwise.

    Args:
        model: what `attach` or `load_adapter` returned; it stays as it is.
        path: a new or empty folder for `save_pretrained`; or a file that ends in .safetensors, .pt, .pth or .bin, for
            the state dict of any model. Written whole or not at all; a file is replaced, a folder is not.
    Returns: the path.
    Raises: SpectraError for a folder that is taken or that the model cannot fill, for another ending, for a full disk.
    """
    attachment(model)
    place = Path(path).expanduser().absolute()
    is_file = place.suffix in (*TORCH, SAFE)
    base: Any = model.get_base_model()  # type: ignore[operator]
    if not is_file and not hasattr(base, "save_pretrained"):
        raise SpectraError(
            f"{type(base).__name__} writes no model folder; give a file that ends in {SAFE}, {' or '.join(TORCH)}"
        )
    if not is_file and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise SpectraError(f"{place} is there already; choose another folder")
    merged = merge(model)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if is_file:
            with replacing(place) as temporary:
                _write(merged.state_dict(), temporary)
        else:
            with replacing_folder(place) as folder:
                merged.save_pretrained(folder)  # type: ignore[operator]
    except OSError as error:
        raise SpectraError(
            f"cannot write the merged model to {place}: {error.strerror or error}; "
            "free some space or choose another place"
        ) from error
    return place


def _write(state: dict[str, Tensor], file: Path) -> None:
    if file.suffix != SAFE:
        write_torch(state, file)
        return
    tensors: dict[str, Tensor] = {}
    places: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        place = tensor.data_ptr(), tensor.shape
        if tensor.numel() and place in places:
            continue  # tied: safetensors holds a storage once
        places.add(place)
        tensors[name] = tensor.detach().cpu()
    write_tensors(tensors, file, metadata={"format": "pt"})

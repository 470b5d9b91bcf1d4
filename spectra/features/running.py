"""Models over batches: how a batch reaches a model, and a pass over all of them with hooks in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.features.capture import Capture, Listener, capturing
from spectra.features.masks import checked, masks_of
from spectra.features.sites import Site

Forward = Callable[[nn.Module, Any], Any]
Mask = Callable[[Any], Tensor | None]


@dataclass(frozen=True)
class Pass:
    """A model that runs over the batches.

    Attributes:
        side: "base" or "tuned", for messages.
        sites: where its inputs are captured; none where only its outputs are wanted.
        on_output: called with (output, batch) for each batch.
        listener: called for each captured input, see `capturing`.
    """

    side: str
    model: nn.Module
    sites: Sequence[Site] = ()
    on_output: Callable[[Any, Any], None] | None = None
    listener: Listener | None = None


@dataclass
class Counts:
    """How much was run: batches, and the entries of their leading dimension."""

    batches: int = 0
    samples: int = 0


def run(
    passes: Sequence[Pass],
    batches: Iterable[Any],
    *,
    forward: Forward | None,
    mask: Mask | None,
    dtype: torch.dtype,
    after_batch: Callable[[int], None],
) -> tuple[list[Capture], Counts]:
    """Run every model over every batch, batch by batch, and capture. `after_batch` is told how many are done.

    Raises: SpectraError where there is no batch, and with the batch's number where a model fails.
    """
    counts = Counts()
    with ExitStack() as stack:
        captures = [
            stack.enter_context(capturing(each.model, each.sites, dtype=dtype, listener=each.listener))
            for each in passes
        ]
        for capture in captures:
            capture.is_paused = True
        for number, batch in enumerate(batches):
            for each, capture in zip(passes, captures, strict=True):
                _run_one(each, capture, batch, number, forward, mask)
            counts.batches += 1
            counts.samples += _samples(batch)
            after_batch(counts.batches)
    if not counts.batches:
        raise SpectraError("there are no batches; give at least one, or None for the answer without data")
    return captures, counts


def _run_one(each: Pass, capture: Capture, batch: Any, number: int, forward: Forward | None, mask: Mask | None) -> None:
    batch = _moved(batch, _device_of(each.model))
    capture.masks = masks_of(each.model, batch)
    if mask:
        capture.masks = replace(capture.masks, whole=checked(mask(batch), number))
    capture.is_masked, capture.misfit = False, None
    capture.is_paused = False
    try:
        output = forward(each.model, batch) if forward else call(each.model, batch)
    except SpectraError:
        raise
    except Exception as error:
        raise SpectraError(
            f"the {each.side} model failed on batch {number}: {type(error).__name__}: {error}; "
            "mend the batch, or say how to call the model on it with `forward`"
        ) from error
    finally:
        capture.is_paused = True
    if mask and capture.masks.whole is not None and not capture.is_masked and capture.misfit:
        stream, shape = capture.misfit
        raise SpectraError(
            f"`mask` returned {tuple(capture.masks.whole.shape)} for batch {number}, which fits no input of the "
            f"{each.side} model ({stream} takes in {shape}); return one number per vector, or None"
        )
    if each.on_output:
        try:
            each.on_output(output, batch)
        except SpectraError:
            raise
        except Exception as error:
            raise SpectraError(
                f"the output of the {each.side} model on batch {number} cannot be measured ({type(error).__name__}: "
                f"{error}); return a tensor of logits or features with `forward`"
            ) from error


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch in the way that its kind suggests.

    A mapping: model(**batch), without `labels` where `forward` has no parameter of that name. A tuple or list: as many
    of its elements as `forward` has parameters without default, at least one (so that the label of (image, label) stays
    out). Anything else: model(batch).
    Raises: SpectraError where `forward` takes no such arguments.
    """
    parameters = inspect.signature(model.forward).parameters
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {str(key): value for key, value in batch.items() if key != "labels" or "labels" in parameters}
    elif isinstance(batch, list | tuple):
        required = [p for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        takes_all = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
        args = tuple(batch) if takes_all else tuple(batch[: max(1, len(required))])
    else:
        args = (batch,)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        given = f"the keys {', '.join(kwargs)}" if kwargs else f"{len(args)} positional arguments"
        raise SpectraError(
            f"{type(model).__name__} cannot be called with {given} of a batch ({error}); "
            "say how to call it with `forward`"
        ) from error
    return model(*args, **kwargs)


def _device_of(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters()), None)


def _moved(batch: Any, device: torch.device | None) -> Any:
    """The batch with its tensors on a device."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_moved(value, device) for value in batch]
    return batch


def _samples(batch: Any) -> int:
    tensor = next(_tensors(batch), None)
    return len(tensor) if tensor is not None and tensor.ndim else 1


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(value)

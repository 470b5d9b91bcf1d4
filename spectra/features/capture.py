"""The moments of what enters and leaves the modules of a running model, by hooks that are gone afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.features.accumulator import CovarianceAccumulator
from spectra.features.masks import Masks
from spectra.features.sharing import Event, Shared
from spectra.features.sites import NotCaptured, Site, sites_of
from spectra.features.views import Channels, Rows, View

Listener = Callable[[str, View, Tensor, Tensor | None], None]


class Capture:
    """What the hooks of `capturing` have seen so far.

    Attributes:
        masks: of the batch that runs, to be set before it does; by default everything counts. Inputs of (batch,
            sequence) vectors, also flattened, count where their mask is not zero; all others count whole.
        unmasked: streams of which padding may have been counted: the mask did not fit what they took in, and that was
            not one vector a sample, which has no padding.
        is_masked, misfit: of the batch that runs: whether an input took its mask, and (stream, shape) of one that
            could not.
        is_paused: while True, nothing is counted: where a module is part of two models, the other one is running.
        calls: stream -> how often its module was called.
    """

    def __init__(self, dtype: torch.dtype, listener: Listener | None = None) -> None:
        self.masks = Masks()
        self.unmasked: dict[str, None] = {}
        self.is_masked = False
        self.misfit: tuple[str, tuple[int, ...]] | None = None
        self.is_paused = False
        self.calls: Counter[str] = Counter()
        self._dtype, self._listener = dtype, listener
        self._inputs: Shared[CovarianceAccumulator] = Shared()
        self._outputs: Shared[CovarianceAccumulator] = Shared()
        self._is_asking = False

    def inputs(self, stream: str) -> CovarianceAccumulator | None:
        """The moments of the inputs of a stream: a module's name, `name[query]`, `name[key]` and `name[value]` of an
        attention. None where it was never called. Streams that received the same tensors share one."""
        return self._inputs.of(stream)

    def outputs(self, module: str) -> CovarianceAccumulator | None:
        """The moments of the outputs of a module, where `capturing` was asked for them."""
        return self._outputs.of(module)

    @property
    def kept(self) -> int:
        """How many distinct moments of inputs are kept: what the memory goes by."""
        return len(self._inputs)

    def _see(self, stream: str, view: View, x: Any) -> None:
        if self._is_asking or self.is_paused:
            return
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested:
            raise SpectraError(f"{stream}: the input is no dense tensor of real numbers; exclude this module")
        x = x.detach()
        self.calls[stream] += 1
        mask = self.masks.of(stream)
        self._look_at(stream, view, x, mask)
        self._inputs.add(stream, Event((x,), view, mask), lambda: self._moments(stream, view, x, mask))
        if self._listener:
            self._listener(stream, view, x, mask)

    def _look_at(self, stream: str, view: View, x: Tensor, mask: Tensor | None) -> None:
        """Note whether the padding of an input could be told."""
        if mask is not None and view.takes(x, mask):
            self.is_masked = True
            return
        samples = self.masks.whole if mask is None else mask
        if samples is None or (mask is None and not self.masks.leaves_open(stream)):
            return
        if x.ndim < 2 or not len(x) == len(samples) == x[..., 0].numel():
            self.unmasked[stream] = None
            self.misfit = stream, tuple(x.shape)

    def _moments(self, stream: str, view: View, x: Tensor, mask: Tensor | None) -> CovarianceAccumulator:
        moments = CovarianceAccumulator(view.width, name=stream, dtype=self._dtype)
        for rows in view.blocks(x, mask):
            moments.update(rows)
        return moments

    def _see_output(self, module: str, view: View, y: Any) -> None:
        if not (self._is_asking or self.is_paused):
            y = (y[0] if isinstance(y, tuple) else y).detach()
            mask = self.masks.of(module)
            self._outputs.add(module, Event((y,), view, mask), lambda: self._moments(module, view, y, mask))

    def _see_attended(self, stream: str, view: View, attention: nn.MultiheadAttention, call: Any) -> None:
        """What the output projection takes in: the attention asked once more, with the identity in its place.

        The projection's weight is multiplied inside the attention's own function, so that no hook sees its input.
        """
        if self._is_asking or self.is_paused:
            return
        weight = attention.out_proj.weight
        swapped = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
        if attention.out_proj.bias is not None:
            swapped["out_proj.bias"] = torch.zeros_like(attention.out_proj.bias)
        self._is_asking = True
        try:
            attended = torch.func.functional_call(attention, swapped, *call)[0]
        finally:
            self._is_asking = False
        self._see(stream, view, attended)


@contextmanager
def capturing(
    model: nn.Module,
    modules: Iterable[str | Site],
    *,
    outputs: bool = False,
    dtype: torch.dtype = torch.float32,
    listener: Listener | None = None,
) -> Iterator[Capture]:
    """While the block runs, accumulate the moments of what chosen modules take in.

    The model is in evaluation mode and keeps no gradients inside; both are as before afterwards, and the hooks are
    gone, whatever ended the block. A module that is called several times in a pass counts each time. Convolutions are
    unfolded. An `nn.MultiheadAttention` runs without its fused kernels, and once more where its output projection is
    captured.

    Args:
        modules: names of Linear, Conv1D, Conv1d, Conv2d and MultiheadAttention modules, as `model.named_modules` gives
            them, or sites.
        outputs: accumulate what comes out as well (not of an attention's single projections).
        dtype: of the products within a batch, see `CovarianceAccumulator`.
        listener: called with (stream, view, x, mask) for every input.
    Raises: SpectraError for a module that is not there or cannot be captured.
    Cost: N n^2 flops for each distinct input of N vectors of n entries; 8 n^2 bytes for each.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> with capturing(model, ["0", "2"]) as capture:
    ...     _ = model(torch.ones(5, 3))
    >>> capture.inputs("0").mean.tolist(), capture.inputs("2").count
    ([1.0, 1.0, 1.0], 5)
    """
    sites = [site for each in modules for site in ([each] if isinstance(each, Site) else _sites(model, each))]
    capture = Capture(dtype, listener)
    with ExitStack() as stack:
        stack.enter_context(_still(model))
        for name, of_module in _by_module(sites).items():
            _hook(capture, stack, model.get_submodule(name), name, of_module, outputs)
        yield capture


def _sites(model: nn.Module, name: str) -> list[Site]:
    try:
        return list(sites_of(model, name))
    except AttributeError as error:
        raise SpectraError(
            f"{type(model).__name__} has no module {name!r}; give names as `model.named_modules()` lists them"
        ) from error
    except NotCaptured as error:
        raise SpectraError(f"the inputs of {name!r} cannot be captured: {error}") from error


def _by_module(sites: Iterable[Site]) -> Mapping[str, list[Site]]:
    found: dict[str, dict[str, Site]] = {}
    for site in sites:
        found.setdefault(site.module, {})[site.key] = site
    return {module: list(by_key.values()) for module, by_key in found.items()}


def _hook(capture: Capture, stack: ExitStack, module: nn.Module, name: str, sites: list[Site], outputs: bool) -> None:
    before = [site for site in sites if site.slot != "attended"]
    attended = next((site for site in sites if site.slot == "attended"), None)

    def see_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for site in before:
            capture._see(site.key, site.view, _argument(site, args, kwargs))

    def see_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if attended is not None and isinstance(module, nn.MultiheadAttention):
            capture._see_attended(attended.key, attended.view, module, (args, kwargs))
        if outputs:
            capture._see_output(name, _output_view(module, output), output)

    if before:
        handle = module.register_forward_pre_hook(see_inputs, with_kwargs=True)
        stack.callback(handle.remove)
    if attended is not None or outputs:
        handle = module.register_forward_hook(see_output, with_kwargs=True)
        stack.callback(handle.remove)


def _argument(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor that a module was called with, however it was passed."""
    if site.slot == "input":
        return args[0] if args else next(iter(kwargs.values()), None)
    position = ("query", "key", "value").index(site.slot)
    return args[position] if len(args) > position else kwargs.get(site.slot)


def _output_view(module: nn.Module, output: Any) -> View:
    y = output[0] if isinstance(output, tuple) else output
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return Channels(module.out_channels, 1 if isinstance(module, nn.Conv1d) else 2)
    return Rows(y.shape[-1])


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients, and none of the fused kernels that pass hooks by; everything as before afterwards."""
    was_training = [(module, module.training) for module in model.modules()]
    was_fused = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fused)
        for module, training in was_training:
            module.training = training

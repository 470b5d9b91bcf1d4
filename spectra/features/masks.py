"""Which positions of a batch are padding: one mask, or one for each side of an encoder with a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spectra.errors import SpectraError
from spectra.features.outputs import IGNORED

_OF_THE_ENCODER = ("k", "v", "kv", "k_proj", "v_proj", "key", "value", "c_attn")  # in attention across, by usual names


@dataclass(frozen=True)
class Masks:
    """The masks of one batch, zero at padding.

    Attributes:
        whole: (batch, sequence); of a model with encoder and decoder, the encoder's. None: nothing is padding.
        decoder: (batch, sequence) of the decoder. None: nothing is padding.
        has_decoder: whether the two sides differ.
        knows_decoder: False where nothing says which of the decoder's positions are padding.
    """

    whole: Tensor | None = None
    decoder: Tensor | None = None
    has_decoder: bool = False
    knows_decoder: bool = True

    def of(self, stream: str) -> Tensor | None:
        """The mask of what a module takes in, by the module's name (or that of one of its streams)."""
        return self.decoder if self.has_decoder and _is_of_decoder(stream) else self.whole

    def leaves_open(self, stream: str) -> bool:
        """Whether a stream may hold padding that no mask tells of."""
        return self.whole is not None and not self.knows_decoder and self.has_decoder and _is_of_decoder(stream)


def masks_of(model: nn.Module, batch: Any) -> Masks:
    """What a batch says of itself: `attention_mask`, and for a decoder beside an encoder `decoder_attention_mask`, or
    the labels, which are -100 at padding."""
    found = batch if isinstance(batch, Mapping) else {}
    whole = _padded(found.get("attention_mask"))
    is_double = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
    if not is_double and not any(str(key).startswith("decoder_") for key in found):
        return Masks(whole)
    given, labels = found.get("decoder_attention_mask"), found.get("labels")
    if not _is_mask(given) and isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        given = labels != IGNORED
    return Masks(whole, _padded(given), has_decoder=True, knows_decoder=_is_mask(given))


def checked(mask: Any, number: int) -> Tensor | None:
    """What a caller's `mask` returned for a batch. Raises: SpectraError where it is no mask."""
    if mask is None or (isinstance(mask, Tensor) and mask.ndim):
        return mask
    raise SpectraError(
        f"`mask` returned {'a number' if isinstance(mask, Tensor) else f'a {type(mask).__name__}'} for batch {number}; "
        "return a tensor (batch, sequence) that is zero at padding, or None"
    )


def _is_mask(found: Any) -> bool:
    return isinstance(found, Tensor) and found.ndim == 2


def _padded(found: Any) -> Tensor | None:
    return found if _is_mask(found) and bool((found == 0).any()) else None


def _is_of_decoder(stream: str) -> bool:
    """Whether a module of a model with both sides sees the decoder's positions, judged by the names in its path."""
    name, _, slot = stream.removesuffix(".base_layer").partition("[")  # of an adapter around a layer
    parts = name.split(".")
    side = next((part for part in parts if part in ("encoder", "decoder")), "")
    if side == "encoder" or "enc_to_dec_proj" in parts:
        return False
    is_across = any("cross" in part.lower() or part in ("encoder_attn", "EncDecAttention") for part in parts)
    if parts[-1] == "multihead_attn":  # of torch's own decoder
        return slot not in ("key]", "value]")
    return not (is_across and parts[-1] in _OF_THE_ENCODER)

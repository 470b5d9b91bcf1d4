"""The four kinds of modules that carry a LoRA, and how each of them stores W, A and B.

W (m x n) is what `compare` takes for the matrix: out x in; an embedding's table as it is stored (entries x dimension);
a convolution's kernel as out x (in height width).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectra.linalg.lowrank import LowRank

Kind = Literal["linear", "conv1d", "embedding", "conv2d"]
ADAPTER = "default"  # peft's own name for the only adapter of a model
INITIAL = ("initial_A", "initial_B")  # buffers of a layer that starts from c B0 A0


def kind_of(module: nn.Module) -> Kind | None:
    """Which of the kinds a module is; None for all others."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    # Without importing transformers.
    names = [(cls.__name__, cls.__module__.partition(".")[0]) for cls in type(module).mro()]
    return "conv1d" if ("Conv1D", "transformers") in names else None


def matrix_of(kind: Kind, stored: Tensor) -> Tensor:
    """W (m x n) of a stored weight, without a copy where its strides allow."""
    return stored.T if kind == "conv1d" else stored.flatten(1)


def stored_as(kind: Kind, W: Tensor, shape: torch.Size) -> Tensor:
    """A matrix (m x n) as a module of this kind stores it."""
    return W.T if kind == "conv1d" else W.reshape(shape)


def peft_factors(kind: Kind, B: Tensor, A: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(A, B) as peft stores them, of B (m x r), A (r x n) and the shape of the stored weight.

    An embedding adds (B' A')^T with A' (r x entries) and B' (dimension x r); a convolution has kernels.
    """
    if kind == "embedding":
        return B.T.contiguous(), A.T.contiguous()
    if kind == "conv2d":
        return A.reshape(-1, *shape[1:]), B[:, :, None, None]
    return A, B


def plain_factors(kind: Kind, peft_A: Tensor, peft_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A), matrices m x r and r x n, of the factors as peft stores them."""
    if kind == "embedding":
        return peft_A.T, peft_B.T
    return peft_B.flatten(1), peft_A.flatten(1)


@dataclass(frozen=True)
class AdaptedLayer:
    """A handle on one layer of peft: W, the factors in training, and those that they started from."""

    layer: Any  # peft.tuners.lora.LoraLayer
    kind: Kind

    @property
    def weight(self) -> nn.Parameter:
        """The base's weight as it is stored."""
        weight: nn.Parameter = self.layer.get_base_layer().weight
        return weight

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[ADAPTER])

    def trained(self) -> tuple[Tensor, Tensor]:
        """A and B as peft stores them."""
        if self.kind == "embedding":
            return self.layer.lora_embedding_A[ADAPTER], self.layer.lora_embedding_B[ADAPTER]
        return self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight

    def initial(self) -> tuple[Tensor, Tensor] | None:
        """A0 and B0 as peft stores A and B; None where B0 A0 = 0 and nothing is to be taken off."""
        if not hasattr(self.layer, "initial_A"):
            return None
        return self.layer.initial_A, self.layer.initial_B

    @torch.no_grad()
    def fill(self, A: Tensor, B: Tensor) -> None:
        """Put A and B, as peft stores them, into the factors in training."""
        for factor, value in zip(self.trained(), (A, B), strict=True):
            factor.copy_(value)

    def start_from(self, A0: Tensor, B0: Tensor) -> None:
        """Take c B0 A0 off the layer's update from now on."""
        # Buffers: they move and are saved with the model, and nothing that unfreezes parameters reaches them.
        for name, value in zip(INITIAL, (A0, B0), strict=True):
            self.layer.register_buffer(name, value.detach().clone())
        self.layer.lora_variant[ADAPTER] = Difference()

    def update(self) -> LowRank:
        """D = c (B A - B0 A0) = c [B, -B0] [A; A0], m x n of rank 2 r (c B A of rank r where B0 A0 = 0); no copies."""
        B, A = plain_factors(self.kind, *(factor.detach() for factor in self.trained()))
        initial = self.initial()
        if initial is None:
            return LowRank(B, A, self.scaling)
        B0, A0 = plain_factors(self.kind, *initial)
        return LowRank(torch.cat([B, -B0], 1), torch.cat([A, A0]), self.scaling)

    def tuned_weight(self, sign: int = 1) -> Tensor:
        """W + sign D as the weight is stored: summed in float64 (float32 on MPS) and rounded once to its dtype."""
        wide = torch.float32 if self.weight.device.type == "mps" else torch.float64
        D = self.update()
        W = matrix_of(self.kind, self.weight.detach()).to(wide)
        tuned = torch.addmm(W, D.B.to(W), D.A.to(W), alpha=sign * D.c)
        return stored_as(self.kind, tuned.to(self.weight.dtype), self.weight.shape)


class Difference:
    """How a layer of peft adds c (B A - B0 A0) x: the base's weight stays as it is, in every dtype.

    Both terms are the same operations on the same x, so that they cancel to the last bit at step 0. It stands in the
    layer's `lora_variant`, where peft keeps updates that are no plain B A, and so has a part in its merging, too.
    """

    @staticmethod
    def forward(layer: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """result + c (B A - B0 A0) x, x as peft gives it: of the factors' dtype, or indices."""
        if active_adapter in layer.lora_embedding_A:
            A, B = layer.lora_embedding_A[active_adapter], layer.lora_embedding_B[active_adapter]
            difference = _looked_up(layer, x, A, B) - _looked_up(layer, x, layer.initial_A, layer.initial_B)
            scale = getattr(layer, "_get_embed_scale", lambda: None)()  # Gemma's; not in every version of peft
            if scale is not None:
                difference = difference * scale.to(difference.dtype)
        else:
            A, B = layer.lora_A[active_adapter], layer.lora_B[active_adapter]
            x = layer.lora_dropout[active_adapter](x)
            difference = B(A(x)) - _applied(B, layer.initial_B, _applied(A, layer.initial_A, x))
        tuned: Tensor = result + difference * layer.scaling[active_adapter]
        return tuned

    @staticmethod
    def merge_safe(layer: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W + D, where peft merges a copy."""
        return _adapted(layer).tuned_weight()

    @staticmethod
    def merge_unsafe(layer: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """W becomes W + D."""
        orig_weight.data = _adapted(layer).tuned_weight()

    @staticmethod
    def unmerge(layer: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """W + D - D, which is W to the rounding of its dtype."""
        return _adapted(layer).tuned_weight(sign=-1)

    @staticmethod
    def supports_lora_conversion() -> bool:
        """The update is additive, and of low rank."""
        return True


def _adapted(layer: Any) -> AdaptedLayer:
    kind = kind_of(layer.get_base_layer())
    assert kind is not None
    return AdaptedLayer(layer, kind)


def _looked_up(layer: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    found: Tensor = layer._embed(x, A.T) @ B.T
    return found


def _applied(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the module, a Linear or a convolution without bias, gives with another weight."""
    if isinstance(module, nn.Linear):
        product: Tensor = nn.functional.linear(x, weight)
        return product
    assert isinstance(module, nn.Conv2d)
    result: Tensor = nn.functional.conv2d(x, weight, None, module.stride, module.padding)
    return result

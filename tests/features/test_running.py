"""How a batch reaches a model, how two models' inputs are paired, and architectures as `transformers` builds them."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spectra
from spectra.errors import SpectraError
from spectra.features.running import call


class Plain(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale


class Labelled(nn.Module):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x, labels


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_a_batch_reaches_the_model_as_its_kind_suggests() -> None:
    x, label = torch.ones(2, 3), torch.tensor([0, 1])
    assert torch.equal(call(Plain(), x), x)
    assert torch.equal(call(Plain(), (x, label)), x)  # and not x * label
    assert torch.equal(call(Two(), [x, x, label]), x + x)
    assert torch.equal(call(Plain(), {"x": x, "labels": label}), x)
    assert call(Labelled(), {"x": x, "labels": label})[1] is label
    with pytest.raises(SpectraError, match="Two cannot be called with 1 positional arguments"):
        call(Two(), [x])


class Sometimes(nn.Module):
    """Calls its layer as often as its own weight says, so that two models may disagree."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return self.last(x)


def test_inputs_that_do_not_come_in_pairs_have_no_alignment() -> None:
    torch.manual_seed(0)
    base, tuned = Sometimes(1), Sometimes(2)
    shift = spectra.covariance_shift(base, tuned, [torch.randn(20, 3)], mode="end_to_end", functional=False)
    layers = shift.layers.set_index("name")
    assert np.isnan(layers.loc["layer.weight", "cka"])
    assert layers.loc["last.weight", "cka"] > 0
    assert layers.loc["layer.weight", "relative_shift"] > 0


def test_models_that_share_a_part_do_not_count_it_twice() -> None:
    torch.manual_seed(0)
    stem = nn.Linear(3, 3)
    base, tuned = nn.Sequential(stem, nn.Linear(3, 2)), nn.Sequential(stem, nn.Linear(3, 2))
    shift = spectra.covariance_shift(base, tuned, [torch.randn(20, 3)], mode="end_to_end")
    assert (shift.layers["samples"] == 20).all()
    assert shift.layers.set_index("name").loc["0.weight", "relative_shift"] == 0


def tiny(kind: str) -> tuple[Any, dict[str, Tensor]]:
    import transformers

    ids = {
        "input_ids": torch.randint(0, 50, (3, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6]),
    }
    match kind:
        case "gpt2":
            config = transformers.GPT2Config(vocab_size=50, n_positions=8, n_embd=12, n_layer=2, n_head=2)
            return transformers.GPT2LMHeadModel(config), ids
        case "llama":
            config = transformers.LlamaConfig(
                vocab_size=50, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
                num_key_value_heads=1, max_position_embeddings=8, tie_word_embeddings=False,
            )  # fmt: skip
            return transformers.LlamaForCausalLM(config), ids
        case _:
            config = transformers.ViTConfig(
                hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=8,
                patch_size=4,
            )  # fmt: skip
            return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(3, 3, 8, 8)}


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit"])
def test_every_multiplied_matrix_of_usual_models_is_measured(kind: str) -> None:
    """Fused and transposed projections under the names of `compare`; only tables of embeddings are left out."""
    torch.manual_seed(0)
    base, batch = tiny(kind)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    shift = spectra.covariance_shift(base, tuned, [batch], mode="end_to_end")
    compared = spectra.compare(base, tuned).layers
    left_out = compared[~compared["name"].isin(shift.names)]
    assert set(left_out["role"]) <= {"token_embedding", "position_embedding"}
    assert set(shift.names) <= set(compared["name"])
    assert (shift.layers["relative_shift"] > 0).all()
    in_blocks = shift.layers[shift.layers["layer"].notna()]
    assert set(in_blocks["samples"]) == {15 if kind == "vit" else 16}  # of 3 x 5 places; of 3 x 6 less two of padding
    if kind == "gpt2":  # its head multiplies by the table of the tokens
        assert shift.layers.set_index("name").loc["transformer.wte.weight", "samples"] == 16
    assert (shift.functional["kl"] > 0).all()

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
        case "opt":  # flattens (batch, sequence) before its wide layers
            config = transformers.OPTConfig(
                vocab_size=50, hidden_size=12, ffn_dim=20, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=8, word_embed_proj_dim=12,
            )  # fmt: skip
            return transformers.OPTForCausalLM(config), ids
        case _:
            config = transformers.ViTConfig(
                hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=8,
                patch_size=4,
            )  # fmt: skip
            return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(3, 3, 8, 8)}


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "vit"])
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


def encoder_with_decoder(kind: str) -> Any:
    import transformers

    match kind:
        case "bart":
            return transformers.BartForConditionalGeneration(
                transformers.BartConfig(
                    vocab_size=50, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                    decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=16,
                )
            )  # fmt: skip
        case "t5":
            config = transformers.T5Config(vocab_size=50, d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2)
            return transformers.T5ForConditionalGeneration(config)
        case _:
            part = transformers.BertConfig(
                vocab_size=50, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
            )
            both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(part, part)
            return transformers.EncoderDecoderModel(both)


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("kind", ["bart", "t5", "bert2bert"])
@pytest.mark.parametrize("length", [6, 7])  # as long as the encoder's, and not
def test_each_side_of_an_encoder_with_a_decoder_goes_by_its_own_mask(kind: str, length: int) -> None:
    torch.manual_seed(0)
    base = encoder_with_decoder(kind)
    labels = torch.randint(3, 50, (2, length))
    labels[1, 2:] = -100
    batch = {
        "input_ids": torch.randint(3, 50, (2, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
        "decoder_input_ids": torch.randint(3, 50, (2, length)),
    }
    given = {"decoder_attention_mask": (labels != -100).long()}
    of_encoder, of_decoder = 9, length + 2
    across = ("encoder_attn.k_proj", "encoder_attn.v_proj", "EncDecAttention.k", "EncDecAttention.v",
              "crossattention.self.key", "crossattention.self.value")  # fmt: skip
    for more, decoded in ((given, of_decoder), ({"labels": labels}, of_decoder), ({}, 2 * length)):
        shift = spectra.covariance_shift(base, base, [batch | more], functional=False)
        for name, samples in shift.layers.set_index("name")["samples"].items():
            is_encoded = str(name).removeprefix("model.").startswith("encoder.") or any(
                part in str(name) for part in across
            )
            if "pooler" in str(name):  # one token of each
                assert samples == 2
                continue
            assert samples == (of_encoder if is_encoded else decoded), name
        notes = [note for note in shift.provenance["notes"] if note.startswith("mask: ")]
        assert len(notes) == (not more)
        assert not more or not notes
        assert all("decoder" in note and "encoder.layers" not in note for note in notes)


class Windows(nn.Module):
    """Gives its layers padded positions in shapes that no mask can follow, and one vector a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.pairs, self.head = nn.Linear(4, 4), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        pairs = self.pairs(self.each(x).reshape(len(x), -1, 8))
        return self.head(pairs[:, 0])


def test_inputs_that_a_mask_does_not_fit_are_named() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(3, 6, 4), Windows()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    shift = spectra.covariance_shift(model, model, [{"x": x, "attention_mask": mask}], functional=False)
    assert shift.layers.set_index("name")["samples"].to_dict() == {
        "each.weight": 16, "pairs.weight": 9, "head.weight": 3
    }  # fmt: skip
    (note,) = [note for note in shift.provenance["notes"] if note.startswith("mask: ")]
    assert "the inputs of pairs.weight, since" in note


def test_a_mask_of_ones_own_counts_or_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 3), nn.Linear(3, 2))
    x = torch.randn(5, 20)
    shift = spectra.covariance_shift(model, model, [x], mask=lambda x: torch.tensor([1, 1, 0, 0, 0]), functional=False)
    assert set(shift.layers["samples"]) == {2}
    with pytest.raises(SpectraError, match=r"\(5, 3\) for batch 0, which fits no input of the base model"):
        spectra.covariance_shift(model, model, [torch.randn(5, 4, 20)], mask=lambda x: torch.ones(5, 3))
    with pytest.raises(SpectraError, match=r"`mask` returned a list for batch 0"):
        spectra.covariance_shift(model, model, [x], mask=lambda x: [1])  # type: ignore[arg-type, return-value]

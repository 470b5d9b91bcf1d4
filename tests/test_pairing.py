"""Base matrices beside their tuned counterparts: through prefixes, ties, grown vocabularies and adapters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from spectra import SpectraError
from spectra.checkpoints import Checkpoint, TensorInfo, open_checkpoint
from spectra.checkpoints.checkpoint import Adapter, Entry, LowRankEntry, LowRankInfo
from spectra.linalg.lowrank import LowRank
from spectra.pairing import Pairing, pair
from spectra.pairing.matching import match_names

Weights = dict[str, Tensor]


def checkpoint(source: str, tensors: Mapping[str, Tensor], **described: Any) -> Checkpoint:
    entries = {
        name: Entry(TensorInfo(name, tuple(tensor.shape), tensor.dtype), tensor.clone)
        for name, tensor in tensors.items()
    }
    return Checkpoint(source, entries, **described)


def random(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def of(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], **options: Any) -> Pairing:
    return pair(checkpoint("base.pt", base), checkpoint("tuned.pt", tuned), **options)


def names(pairing: Pairing) -> dict[str, str]:
    return {pair.matrix.name: pair.tuned_tensor for pair in pairing.pairs}


def reasons(pairing: Pairing, side: str) -> dict[str, str]:
    return {line.name: line.reason for line in pairing.unmatched if line.side == side}


BERT = {
    "bert.embeddings.word_embeddings.weight": (30, 8),
    "bert.embeddings.position_embeddings.weight": (12, 8),
    **{
        f"bert.encoder.layer.{n}.attention.self.{p}.weight": (8, 8)
        for n in range(11)
        for p in ("query", "key", "value")
    },
    **{f"bert.encoder.layer.{n}.attention.output.LayerNorm.weight": (8,) for n in range(11)},
    "bert.pooler.dense.weight": (8, 8),
}


# --------------------------------------------------------------------------------------------------------- real weights


@pytest.mark.parametrize(
    ("tuned", "missing", "extra"),
    [("bert_ft_10k_25s", 7, {"classifier.weight", "classifier.bias"}), ("bert_ft", 7, set())],
)
def test_rxnfp(rxnfp: Path, tuned: str, missing: int, extra: set[str]) -> None:
    """199 tensors are common: 76 matrices and 123 vectors. One of the two has no `bert.` before its names."""
    base = open_checkpoint(rxnfp / "bert_pretrained")
    found = pair(base, open_checkpoint(rxnfp / tuned))
    assert len(found.pairs) == 76
    assert all(pair.matrix.name.startswith("bert.") for pair in found.pairs)
    assert all(
        pair.tuned_tensor.removeprefix("bert.") == pair.matrix.name.removeprefix("bert.") for pair in found.pairs
    )
    of_base = Counter(reasons(found, "base").values())
    assert of_base == {"a vector: it has no singular basis": 123, "missing in the tuned checkpoint": missing}
    assert reasons(found, "tuned").keys() == extra
    assert [bool(note) for note in found.notes] == ([True] if tuned == "bert_ft" else [])
    assert [p.matrix.layer for p in found.pairs if p.matrix.role == "query"] == list(range(12))
    one = next(pair for pair in found.pairs if pair.matrix.name == "bert.encoder.layer.3.output.dense.weight")
    W, tuned_W = one.load_base(), one.load_tuned()
    assert isinstance(tuned_W, Tensor)
    assert torch.equal(W, base["bert.encoder.layer.3.output.dense.weight"])
    assert 0 < float((tuned_W - W).norm() / W.norm()) < 1  # another matrix would be more than its own norm away


# ------------------------------------------------------------------------------------------------------------- prefixes


@given(st.data())
def test_any_nesting_of_prefixes_is_seen_through(data: st.DataObject) -> None:
    """On either side; wrappers also in the middle. Every tensor finds itself again."""
    prefixes = [
        "module",
        "_orig_mod",
        "model",
        "base_model",
        "backbone",
        "student",
        "transformer",
        "net",
        "_fsdp_wrapped_module",
    ]
    wrappers = ["module", "_orig_mod", "_checkpoint_wrapped_module"]
    nesting = st.lists(st.sampled_from(prefixes), max_size=4).map(lambda parts: "".join(f"{part}." for part in parts))
    middle = data.draw(
        st.lists(st.sampled_from(wrappers), max_size=2).map(lambda parts: "".join(f"{p}." for p in parts))
    )
    before_base, before_tuned = data.draw(nesting), data.draw(nesting)
    strip = data.draw(st.sampled_from(["", "bert."]))

    def renamed(name: str) -> str:
        return before_tuned + name.removeprefix(strip).replace("attention.", f"attention.{middle}")

    base = {before_base + name: shape for name, shape in BERT.items()}
    tuned = {renamed(name): shape for name, shape in data.draw(st.permutations(list(BERT.items())))}
    matching = match_names(base, tuned)
    assert matching.partners == {renamed(name): before_base + name for name in BERT}
    assert not matching.ambiguous_base and not matching.ambiguous_tuned


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        ("model.language_model.", "language_model.model."),
        ("", "base_model.model.model."),
        ("my_lightning_attribute.", "bert."),  # a prefix that no table knows, shared by all names
        ("roberta.", "model.encoder."),
    ],
)
def test_prefixes_of_the_wild_are_reported(base: str, tuned: str) -> None:
    shapes = {"layers.0.q_proj.weight": (4, 4), "layers.1.q_proj.weight": (4, 4), "embed.weight": (9, 4)}
    found = of(
        random({base + name: s for name, s in shapes.items()}), random({tuned + name: s for name, s in shapes.items()})
    )
    assert names(found) == {base + name: tuned + name for name in shapes}
    assert any(note.endswith("(names matched so: 3)") for note in found.notes)


def test_two_foreign_prefixes_are_not_taken_for_each_other() -> None:
    shapes = {"0.weight": (4, 4), "1.weight": (5, 4)}
    with pytest.raises(SpectraError, match="different architectures"):
        of(
            random({f"generator_a.{n}": s for n, s in shapes.items()}),
            random({f"critic.{n}": s for n, s in shapes.items()}),
        )


def test_a_name_that_could_be_two_is_never_guessed() -> None:
    shapes = {"blocks.0.fc.weight": (4, 4), "blocks.1.fc.weight": (4, 4), "norm.weight": (4,)}
    base = random({"head.weight": (3, 4), **shapes})
    both = random(
        {f"{who}.{name}": s for who in ("student", "teacher") for name, s in shapes.items()} | {"head.weight": (3, 4)}
    )
    found = of(base, both)
    assert names(found) == {"head.weight": "head.weight"}
    assert "student" in reasons(found, "base")["blocks.0.fc.weight"]
    assert "teacher" in reasons(found, "base")["blocks.0.fc.weight"]
    del both["head.weight"]
    with pytest.raises(SpectraError, match=r"student\.blocks.*teacher\.blocks"):
        of(base, both)


def test_an_exact_name_is_not_given_away() -> None:
    base = random({"norm.proj.weight": (4, 4), "model.norm.proj.weight": (4, 4), "a.weight": (5, 4)})
    found = of(base, dict(base))
    assert all(matrix == tuned for matrix, tuned in names(found).items())
    assert len(found.pairs) == 3


def test_old_layer_norm_names() -> None:
    base = random({"encoder.layer.0.output.LayerNorm.weight": (4,), "encoder.layer.0.output.dense.weight": (4, 4)})
    tuned = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): W for name, W in base.items()}
    assert reasons(of(base, tuned), "base") == {
        "encoder.layer.0.output.LayerNorm.weight": "a vector: it has no singular basis"
    }
    assert not reasons(of(base, tuned), "tuned")


@given(st.randoms())
def test_the_order_in_the_files_changes_nothing(shuffler: Any) -> None:
    base, tuned = random(BERT), random({f"module.{name}": shape for name, shape in BERT.items()}, seed=1)
    order = list(BERT)
    shuffler.shuffle(order)
    one = of(base, tuned)
    other = of(
        {name: base[name] for name in order}, {f"module.{name}": tuned[f"module.{name}"] for name in reversed(order)}
    )
    assert list(names(one).items()) == list(names(other).items())
    assert one.unmatched == other.unmatched
    assert one.notes == other.notes


# ----------------------------------------------------------------------------------- what memory and disk call the same


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "config", "sizes"),
    [
        ("MixtralForCausalLM", "MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 3}),
        (
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            {"num_experts": 3, "moe_intermediate_size": 24, "num_key_value_heads": 2},
        ),
        ("ViTForImageClassification", "ViTConfig", {"image_size": 16, "patch_size": 8}),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
        ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20}),
    ],
)
def test_a_model_in_memory_against_its_own_files(
    model: str, config: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    shared = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    if model != "GPT2LMHeadModel":
        sizes = shared | sizes
    if "ViT" not in model:
        sizes["vocab_size"] = 50
    torch.manual_seed(0)
    in_memory = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    on_disk = open_checkpoint(saved(in_memory, tmp_path / "model"))
    for found in (pair(on_disk, open_checkpoint(in_memory)), pair(open_checkpoint(in_memory), on_disk)):
        for one in found.pairs:
            tuned = one.load_tuned()
            assert isinstance(tuned, Tensor)
            assert torch.equal(one.load_base(), tuned), one.matrix.name
        matrices = {line.name for line in found.unmatched if line.reason.startswith(("missing", "not in", "shaped"))}
        assert not {name for name in matrices if "norm" not in name and not name.endswith("bias")}


def test_experts_that_only_one_side_has_are_listed() -> None:
    stacked = random({"layers.0.mlp.experts.gate_up_proj": (3, 8, 4), "layers.0.mlp.experts.down_proj": (3, 4, 4)})
    shapes = {f"layers.0.mlp.experts.{e}.{p}_proj.weight": (4, 4) for e in range(2) for p in ("gate", "up", "down")}
    found = of(stacked, random(shapes))
    assert len(found.pairs) == 6
    assert reasons(found, "base").keys() == {
        "layers.0.mlp.experts.down_proj[2]",
        "layers.0.mlp.experts.gate_up_proj[2.gate]",
        "layers.0.mlp.experts.gate_up_proj[2.up]",
    }


# ----------------------------------------------------------------------------------------------- ties and vocabularies

HEADED = {"model.embed_tokens.weight": (10, 4), "model.layers.0.mlp.up_proj.weight": (6, 4)}


def test_tied_on_both_sides_is_compared_once(tmp_path: Path) -> None:
    """In whichever order the files hold the two names."""
    base, tuned = random(HEADED), random(HEADED, seed=1)
    torch.save({**base, "lm_head.weight": base["model.embed_tokens.weight"]}, tmp_path / "base.pt")
    torch.save({"lm_head.weight": tuned["model.embed_tokens.weight"], **tuned}, tmp_path / "tuned.pt")
    found = pair(open_checkpoint(tmp_path / "base.pt"), open_checkpoint(tmp_path / "tuned.pt"))
    assert [one.matrix.name for one in found.pairs] == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
    ]
    assert torch.equal(found.pairs[0].load_tuned(), tuned["model.embed_tokens.weight"])  # type: ignore[arg-type]
    assert any("compared once" in note for note in found.notes)
    assert not found.unmatched


def test_a_tied_tensor_is_not_missing_under_its_other_name(tmp_path: Path) -> None:
    base, tuned = random(HEADED), random(HEADED, seed=1)
    torch.save({**base, "lm_head.weight": base["model.embed_tokens.weight"]}, tmp_path / "base.pt")
    tuned["lm_head.weight"] = tuned.pop("model.embed_tokens.weight")
    with_both_names = open_checkpoint(tmp_path / "base.pt")
    for found in (pair(with_both_names, checkpoint("one", tuned)), pair(checkpoint("one", tuned), with_both_names)):
        assert {one.matrix.name for one in found.pairs} == {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"}
        assert not found.unmatched


def test_untied_by_tuning_is_compared_twice_against_the_one_base(tmp_path: Path) -> None:
    base, tuned = random(HEADED), random({**HEADED, "lm_head.weight": (10, 4)}, seed=1)
    torch.save({**base, "lm_head.weight": base["model.embed_tokens.weight"]}, tmp_path / "base.pt")
    found = pair(open_checkpoint(tmp_path / "base.pt"), checkpoint("tuned", tuned))
    by_name = {one.matrix.name: one for one in found.pairs}
    assert by_name.keys() == tuned.keys()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(by_name[name].load_base(), base["model.embed_tokens.weight"])
        assert torch.equal(by_name[name].load_tuned(), tuned[name])  # type: ignore[arg-type]
    assert by_name["lm_head.weight"].matrix.role == "head"
    assert "tied to 'model.embed_tokens.weight'" in by_name["lm_head.weight"].note


def test_a_tie_that_safetensors_does_not_store_is_known_from_the_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 20}
    tied = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    untied = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=False))
    base, tuned = open_checkpoint(saved(tied, tmp_path / "tied")), open_checkpoint(saved(untied, tmp_path / "untied"))
    assert "lm_head.weight" not in base
    head = next(one for one in pair(base, tuned).pairs if one.matrix.name == "lm_head.weight")
    assert torch.equal(head.load_base(), base["transformer.wte.weight"])
    assert torch.equal(head.load_tuned(), tuned["lm_head.weight"])  # type: ignore[arg-type]
    encoder = checkpoint("encoder", {name: base[name] for name in base}, config={"architectures": ["GPT2Model"]})
    assert reasons(pair(encoder, tuned), "tuned")["lm_head.weight"] == "not in the base"


@pytest.mark.parametrize(("base_rows", "tuned_rows"), [(10, 13), (13, 10), (10, 11)])
def test_a_grown_vocabulary_is_compared_on_its_common_rows(base_rows: int, tuned_rows: int) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (6, 4), "score.weight": (2, 4)}
    base = random({**shapes, "model.embed_tokens.weight": (base_rows, 4), "lm_head.weight": (base_rows, 4)})
    tuned = random({**shapes, "model.embed_tokens.weight": (tuned_rows, 4), "lm_head.weight": (tuned_rows, 4)}, seed=1)
    found = of(base, tuned)
    common = min(base_rows, tuned_rows)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        one = next(one for one in found.pairs if one.matrix.name == name)
        assert (one.matrix.rows, one.matrix.columns) == (common, 4)
        assert torch.equal(one.load_base(), base[name][:common])
        assert torch.equal(one.load_tuned(), tuned[name][:common])  # type: ignore[arg-type]
        assert f"first {common} rows" in one.note
        reason = reasons(found, "base" if base_rows > common else "tuned")[name]
        last = max(base_rows, tuned_rows) - 1
        assert reason.startswith(f"row {common} has" if last == common else f"rows {common} to {last} have")
        assert any(name in note for note in found.notes)


def test_a_new_head_and_resized_patches_are_no_vocabulary() -> None:
    shapes = {"embed_tokens.weight": (10, 4), "vision_model.layers.0.fc1.weight": (6, 4)}
    base = random({**shapes, "classifier.weight": (2, 4), "vision_model.position_embedding.weight": (5, 4)})
    tuned = random({**shapes, "classifier.weight": (3, 4), "vision_model.position_embedding.weight": (7, 4)})
    found = of(base, tuned)
    assert names(found).keys() == shapes.keys()
    assert reasons(found, "base") == {
        "classifier.weight": "shaped 2 x 4 in the base and 3 x 4 in the tuned checkpoint",
        "vision_model.position_embedding.weight": "shaped 5 x 4 in the base and 7 x 4 in the tuned checkpoint: "
        "positions that were resized do not answer to each other row by row",
    }


def test_text_positions_are_compared_on_their_common_rows() -> None:
    base, tuned = random(BERT), random({**BERT, "bert.embeddings.position_embeddings.weight": (20, 8)})
    found = of(base, tuned)
    one = next(one for one in found.pairs if one.matrix.role == "position_embedding")
    assert one.matrix.rows == 12
    assert reasons(found, "tuned") == {one.matrix.name: "rows 12 to 19 have no counterpart in the base checkpoint"}


# ------------------------------------------------------------------------------------------------------------- adapters


def build_bert(**sizes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "vocab_size": 50,
    }
    return transformers.BertForSequenceClassification(transformers.BertConfig(**small | sizes))


def adapted(model: Any, folder: Path, **options: Any) -> tuple[Path, Callable[[], Mapping[str, Tensor]]]:
    """A trained-looking LoRA adapter of `model`, saved by peft; and a way to the merged weights."""
    peft = pytest.importorskip("peft")
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **options))
    for name, parameter in adapter.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(folder)

    def merge() -> Mapping[str, Tensor]:
        merged: Mapping[str, Tensor] = adapter.merge_and_unload().state_dict()
        return merged

    return folder, merge


def check_against_merged(found: Pairing, merged: Mapping[str, Tensor]) -> None:
    for one in found.pairs:
        W, tuned = one.load_base(), one.load_tuned()
        expected = one.matrix.extract(merged[one.matrix.tensor])
        D = tuned.dense() if isinstance(tuned, LowRank) else tuned - W
        assert tuple(D.shape) == (one.matrix.rows, one.matrix.columns)
        torch.testing.assert_close(W + D, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_gives_its_factors_and_its_whole_tensors(tmp_path: Path) -> None:
    model = build_bert()
    base = open_checkpoint(saved(model, tmp_path / "base"))
    folder, merge = adapted(
        model, tmp_path / "adapter", target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    found = pair(base, open_checkpoint(folder))
    queries = [f"bert.encoder.layer.{n}.attention.self.{p}.weight" for n in range(2) for p in ("query", "value")]
    touched = [one for one in found.pairs if not one.is_untouched]
    assert [one.matrix.name for one in touched] == [*queries, "classifier.weight"]
    assert [one.rank for one in touched] == [3, 3, 3, 3, None]
    assert [one.is_low_rank for one in touched] == [True] * 4 + [False]
    assert len(found.pairs) == 17
    assert all(one.load_tuned().equal(one.load_base()) for one in found.pairs if one.is_untouched)
    assert reasons(found, "base") == {"classifier.bias": "a vector: it has no singular basis"}
    assert any(
        note.startswith("left as they are by the adapter: 12 matrices") for note in found.notes
    )  # 17, less the 5 pairs
    check_against_merged(found, merge())


def test_an_adapter_of_the_bare_model_finds_its_base_under_a_prefix(tmp_path: Path) -> None:
    model = build_bert()
    base = open_checkpoint(saved(model, tmp_path / "base"))
    folder, _ = adapted(model.bert, tmp_path / "adapter", target_modules=["query"])
    found = pair(base, open_checkpoint(folder))
    assert [one.matrix.name for one in found.pairs if not one.is_untouched] == [
        f"bert.encoder.layer.{n}.attention.self.query.weight" for n in range(2)
    ]


def test_an_adapter_of_a_fused_and_transposed_projection(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 20}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    base = open_checkpoint(saved(model, tmp_path / "base"))
    targets = ["c_attn", "c_proj", "wte"]
    folder, merge = adapted(model, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True)
    found = pair(base, open_checkpoint(folder))
    by_name = {one.matrix.name: one for one in found.pairs}
    assert {f"transformer.h.1.attn.c_attn.weight[{part}]" for part in "qkv"} <= by_name.keys()
    assert all(one.rank == 3 for one in found.pairs if not one.is_untouched)
    check_against_merged(found, merge())


def test_an_adapter_of_another_base_is_refused_with_both_shapes(tmp_path: Path) -> None:
    folder, _ = adapted(build_bert(), tmp_path / "adapter", target_modules=["query"])
    base = open_checkpoint(saved(build_bert(hidden_size=32), tmp_path / "base"))
    with pytest.raises(SpectraError, match=r"16 x 16.*32 x 32.*base it was trained on"):
        pair(base, open_checkpoint(folder))
    with pytest.raises(SpectraError, match="different architectures"):
        pair(checkpoint("llama", random({"model.layers.0.self_attn.q_proj.weight": (16, 16)})), open_checkpoint(folder))


def test_factors_without_a_target_are_listed(tmp_path: Path) -> None:
    model = build_bert()
    base = saved(model, tmp_path / "base")
    folder, _ = adapted(model, tmp_path / "adapter", target_modules=["query", "dense"])
    partial = {name: W for name, W in open_checkpoint(base).items() if "pooler" not in name}
    found = pair(checkpoint("partial", partial), open_checkpoint(folder))
    assert reasons(found, "tuned") == {"bert.pooler.dense.weight": "not in the base"}


def test_one_pair_of_factors_cannot_update_a_stack() -> None:
    shapes = {"layers.0.mlp.experts.down_proj": (3, 6, 4), "layers.0.self_attn.q_proj.weight": (4, 4)}
    updates = {
        name: LowRankEntry(
            LowRankInfo(name, (m, n), 1, torch.float32), lambda: LowRank(torch.ones(4, 1), torch.ones(1, 4))
        )
        for name, (*_, m, n) in shapes.items()
    }
    found = pair(checkpoint("base", random(shapes)), Adapter("adapter", {}, updates))
    assert [one.matrix.name for one in found.pairs] == ["layers.0.self_attn.q_proj.weight"]
    assert "a stack of matrices" in reasons(found, "tuned")["layers.0.mlp.experts.down_proj"]


# ------------------------------------------------------------------------------------------ shapes, orientation, dtypes

GPT2 = {
    "h.0.attn.c_attn.weight": (8, 24),
    "h.0.attn.c_proj.weight": (8, 8),
    "h.0.mlp.c_fc.weight": (8, 32),
    "h.0.mlp.c_proj.weight": (32, 8),
}


def test_conv1d_against_linear_compares_the_same_map() -> None:
    """The square c_proj gives no clue of its own: its neighbours tell how each side stores it."""
    base = random(GPT2)
    found = of(base, {name: W.T.contiguous() for name, W in base.items()})
    assert len(found.pairs) == 6
    for one in found.pairs:
        assert torch.equal(one.load_base(), one.load_tuned()), one.matrix.name  # type: ignore[arg-type]
        assert "stored in x out in the base and out x in in the tuned checkpoint" in one.note


def test_transposed_shapes_that_nothing_explains_are_not_compared() -> None:
    found = of(random({"a.weight": (4, 6), "b.weight": (4, 4)}), random({"a.weight": (6, 4), "b.weight": (4, 4)}))
    assert names(found) == {"b.weight": "b.weight"}
    assert "transposed" in reasons(found, "base")["a.weight"]


def test_dtypes_may_differ_and_are_kept() -> None:
    base = random({"a.weight": (4, 6)})
    (one,) = of(base, {name: W.bfloat16() for name, W in base.items()}).pairs
    assert (one.base_dtype, one.tuned_dtype) == (torch.float32, torch.bfloat16)
    tuned = one.load_tuned()
    assert isinstance(tuned, Tensor)
    assert tuned.dtype == torch.bfloat16


def test_parts_are_compared_with_the_layout_of_the_config_that_one_side_has() -> None:
    tensors = {"layers.0.attention.query_key_value.weight": (24, 8), "layers.0.attention.dense.weight": (8, 8)}
    config = {"model_type": "gpt_neox", "hidden_size": 8, "num_attention_heads": 2}
    base, tuned = checkpoint("base", random(tensors), config=config), checkpoint("tuned", random(tensors, seed=1))
    for found in (pair(base, tuned), pair(tuned, base)):
        fused = [one for one in found.pairs if one.matrix.part]
        assert [one.matrix.part for one in fused] == ["q", "k", "v"]
        key = found.pairs[1]
        rows = [4, 5, 6, 7, 16, 17, 18, 19]  # of each head's 12 rows, the second 4
        assert torch.equal(key.load_base(), key.base[key.matrix.tensor][rows])
        assert torch.equal(key.load_tuned(), key.tuned[key.tuned_tensor][rows])  # type: ignore[arg-type]


def test_refused_tensors_are_listed_once_with_their_reason() -> None:
    base = checkpoint("base", random({"a.weight": (4, 4), "b.weight": (4, 4)}))
    tuned = checkpoint("tuned", random({"a.weight": (4, 4)}), refused={"b.weight": "packed by bitsandbytes"})
    found = pair(base, tuned)
    assert names(found) == {"a.weight": "a.weight"}
    assert [(line.name, line.side, line.reason) for line in found.unmatched] == [
        ("b.weight", "tuned", "packed by bitsandbytes")
    ]


def test_everything_is_accounted_for() -> None:
    base = random({**BERT, "cls.weight": (3, 8), "bert.embeddings.position_ids": (1, 12)})
    tuned = random({**BERT, "classifier.weight": (3, 8)})
    found = of(base, tuned)
    paired = {one.matrix.tensor for one in found.pairs}
    assert paired | reasons(found, "base").keys() == base.keys()
    assert {one.tuned_tensor for one in found.pairs} | reasons(found, "tuned").keys() == {
        "classifier.weight",
        *(name for name in paired),
    }


# ------------------------------------------------------------------------------------------------------------ selection


def test_include_and_exclude() -> None:
    tensors = {"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.c_fc.weight": (8, 32), "wte.weight": (20, 8)}
    base, tuned = random(tensors), random(tensors, seed=1)
    queries = of(base, tuned, include=["*c_attn.weight[q]"])
    assert list(names(queries)) == ["h.0.attn.c_attn.weight[q]"]
    assert reasons(queries, "base")["wte.weight"] == "not included by '*c_attn.weight[q]'"
    whole = of(base, tuned, include=["*c_attn*"], exclude=["*[v]"])
    assert [one.matrix.part for one in whole.pairs] == ["q", "k"]
    assert reasons(whole, "base")["h.0.attn.c_attn.weight[v]"] == "excluded by '*[v]'"
    with pytest.raises(SpectraError, match=r"include pattern 'query' matches no weight matrix of base\.pt.*c_attn"):
        of(base, tuned, include=["query"])
    with pytest.raises(SpectraError, match="leave no weight matrix"):
        of(base, tuned, exclude=["*"])


def test_transposed_by_the_caller() -> None:
    base, tuned = random({"odd.weight": (4, 6)}), random({"odd.weight": (4, 6)}, seed=1)
    (one,) = of(base, tuned, transposed=["odd.*"]).pairs
    assert (one.matrix.rows, one.matrix.columns) == (6, 4)
    assert torch.equal(one.load_tuned(), tuned["odd.weight"].T)  # type: ignore[arg-type]
    with pytest.raises(SpectraError, match="transposed pattern 'off"):
        of(base, tuned, transposed=["off.*"])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_different_sizes_of_one_architecture_are_refused() -> None:
    with pytest.raises(
        SpectraError, match=r"different shapes.*is 12 x 8 in the base and 24 x 16 in the tuned checkpoint; give"
    ):
        of(random(BERT), random({name: tuple(2 * side for side in shape) for name, shape in BERT.items()}))


def test_nothing_in_common_names_a_few_of_each(tmp_path: Path) -> None:
    save_file(random({"a.weight": (4, 4)}), tmp_path / "a.safetensors")
    save_file(random({"b.weight": (5, 4)}), tmp_path / "b.safetensors")
    with pytest.raises(
        SpectraError, match=r"a\.safetensors.*b\.safetensors.*'a\.weight'.*'b\.weight'.*fine-tuned from"
    ):
        pair(open_checkpoint(tmp_path / "a.safetensors"), open_checkpoint(tmp_path / "b.safetensors"))


def test_a_few_tables_of_equal_size_do_not_make_two_models_a_pair() -> None:
    blocks = {f"encoder.layer.{n}.output.dense.weight": (8, 8) for n in range(10)}
    bert = checkpoint(
        "bert", random({**blocks, **{f"a.{n}.weight": (8, 8) for n in range(20)}}), config={"model_type": "bert"}
    )
    vit = checkpoint(
        "vit", random({**blocks, **{f"b.{n}.weight": (8, 8) for n in range(20)}}), config={"model_type": "vit"}
    )
    with pytest.raises(SpectraError, match=r"\(bert and vit\).*only 10 of 30"):
        pair(bert, vit)


def test_a_part_of_a_model_matches_the_whole() -> None:
    part = {name: W for name, W in random(BERT).items() if "layer.3.attention.self.key" in name}
    assert len(of(random(BERT), part).pairs) == 1


def test_only_packed_weights_are_refused_by_their_scheme() -> None:
    packed = checkpoint("q.safetensors", {}, refused={"a.weight": "packed by GPTQ: dequantise first"})
    with pytest.raises(SpectraError, match=r"q\.safetensors holds no weight matrix \(packed by GPTQ"):
        pair(checkpoint("base", random({"a.weight": (4, 4)})), packed)


def test_messages_are_plain_text(tmp_path: Path) -> None:
    """What pairing says goes into a table and into JSON."""
    found = of(random(BERT), random({f"module.{name}": shape for name, shape in BERT.items()}))
    assert json.loads(json.dumps([vars(line) for line in found.unmatched])) == [vars(line) for line in found.unmatched]

"""PEFT adapters, trained-looking and saved by peft itself: the factors give exactly what peft merges."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from spectra.checkpoints import Adapter, CheckpointError, fingerprint, open_checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


class Small(nn.Module):
    """One module of each kind that peft adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 8), "v": nn.Linear(6, 4)}) for _ in range(3))
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.attention = nn.MultiheadAttention(8, 2)
        self.fused = transformers.pytorch_utils.Conv1D(12, 6)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x


def adapted(**options: Any) -> tuple[nn.Module, Any]:
    """A base and a PeftModel of it with factors that are not zero."""
    torch.manual_seed(0)
    base = Small()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    model.before = before
    return base, model


def merged(model: Any) -> dict[str, Tensor]:
    return dict(model.merge_and_unload().state_dict())


def assert_adapter_is_the_merge(adapter: Adapter, model: Any, *, transposed: tuple[str, ...] = ()) -> None:
    """Base plus update equals peft's own merge, for every tensor; tensors that are not named have not changed."""
    after = merged(model)
    for name, before in model.before.items():
        if name in adapter.updates:
            update = adapter.update(name)
            assert update.shape == adapter.updates[name].shape and update.rank == adapter.updates[name].rank
            dense = update.dense()
            expected = (after[name] - before).reshape(dense.T.shape if name in transposed else dense.shape)
            torch.testing.assert_close(dense.T if name in transposed else dense, expected, rtol=1e-4, atol=1e-5)
            assert expected.abs().max() > 0.1
        elif name in adapter:
            assert torch.equal(adapter[name], after[name]) and not torch.equal(after[name], before)
        else:
            assert torch.equal(after[name], before), name


@pytest.mark.parametrize("is_safetensors", [True, False])
@pytest.mark.parametrize(
    ("options", "expected_updates"),
    [
        ({"r": 2, "lora_alpha": 3, "target_modules": ["q", "v"]}, 6),
        ({"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q"]}, 3),
        (
            {
                "r": 2,
                "lora_alpha": 3,
                "target_modules": ["q", "v", "head"],
                "rank_pattern": {"layers.1.q": 3, "^head": 1, r"layers\.[02]\.v": 4},
                "alpha_pattern": {"v": 10, "layers.1.q": 7},
                "use_rslora": True,
            },
            7,
        ),
        ({"r": 2, "lora_alpha": 3, "target_modules": ["q"], "modules_to_save": ["head"]}, 3),
        ({"r": 2, "target_modules": ["q"], "bias": "all"}, 3),
        ({"r": 2, "target_modules": ["q"], "bias": "lora_only"}, 3),
        ({"r": 2, "lora_alpha": 5, "target_modules": ["embed"]}, 1),
        ({"r": 2, "lora_alpha": 5, "target_modules": ["conv"]}, 1),
        ({"r": 2, "lora_alpha": 5, "target_modules": ["fused"], "fan_in_fan_out": True}, 1),
        ({"r": 2, "target_modules": ["q"], "init_lora_weights": "gaussian"}, 3),
    ],
)
def test_a_saved_adapter_is_what_peft_merges(
    tmp_path: Path, options: dict[str, Any], expected_updates: int, is_safetensors: bool
) -> None:
    _, model = adapted(**options)
    model.save_pretrained(tmp_path, safe_serialization=is_safetensors)
    adapter = open_checkpoint(tmp_path)
    assert isinstance(adapter, Adapter) and len(adapter.updates) == expected_updates
    assert adapter.config["peft_type"] == "LORA"
    assert_adapter_is_the_merge(adapter, model, transposed=("fused.weight",))


def test_modules_to_save_and_biases_bear_the_names_of_the_base(tmp_path: Path) -> None:
    _, model = adapted(target_modules=["q"], modules_to_save=["head"], bias="all")
    model.save_pretrained(tmp_path)
    adapter = open_checkpoint(tmp_path)
    assert isinstance(adapter, Adapter)
    assert set(adapter) >= {"head.weight", "head.bias", "layers.0.q.bias", "layers.2.v.bias"}
    assert set(adapter) <= set(model.before) and set(adapter.updates) <= set(model.before)


def test_a_bias_that_is_stored_twice_is_the_one_that_peft_loads(tmp_path: Path) -> None:
    """With bias="all", once under its plain name and once as a part of the module that was trained whole."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        layers = {"fc": nn.Linear(4, 4), "head": nn.Linear(4, 3), "tail": nn.Sequential(nn.Linear(3, 3))}
        return nn.Sequential(OrderedDict(layers))

    config = peft.LoraConfig(r=2, target_modules=["fc"], bias="all", modules_to_save=["head", "tail"])
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    copies = [name for name in tensors if ".modules_to_save." in name]
    assert len(copies) == 2
    tensors |= {name: tensors[name] + 1 for name in copies}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    adapter = open_checkpoint(tmp_path)
    whole = {f"{module}.{kind}" for module in ("head", "tail.0") for kind in ("weight", "bias")}
    assert set(adapter) == whole | {"fc.bias"}
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).merge_and_unload()
    assert all(torch.equal(adapter[name], loaded.state_dict()[name]) for name in adapter)


@pytest.mark.parametrize("options", [{"target_modules": ["q", "embed"]}, {"target_modules": ["v"], "use_rslora": True}])
def test_a_peft_model_in_memory_is_its_adapter(options: dict[str, Any]) -> None:
    _, model = adapted(modules_to_save=["head"], **options)
    adapter = open_checkpoint(model)
    assert isinstance(adapter, Adapter) and adapter.source == "PeftModel in memory"
    digest = fingerprint(adapter)["sha256"]
    assert_adapter_is_the_merge(adapter, model)
    _, other = adapted(modules_to_save=["head"], lora_alpha=9, **options)
    assert fingerprint(open_checkpoint(other))["sha256"] != digest


def test_a_merged_peft_model_is_refused() -> None:
    _, model = adapted(target_modules=["q"])
    model.merge_adapter()
    with pytest.raises(CheckpointError, match=r"unmerge_adapter\(\)"):
        open_checkpoint(model)


def test_an_adapter_in_an_mixed_precision_file_keeps_the_wider_dtype(tmp_path: Path) -> None:
    _, model = adapted(target_modules=["q"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {name: t.to(torch.bfloat16) if "lora_A" in name else t for name, t in tensors.items()}
    safetensors.torch.save_file(tensors, path)
    adapter = open_checkpoint(path)
    assert isinstance(adapter, Adapter)
    assert adapter.update("layers.0.q.weight").dense().dtype == torch.float32


def test_a_raw_state_dict_with_the_adapters_name_in_its_keys_is_read(tmp_path: Path) -> None:
    _, model = adapted(target_modules=["q", "embed"], modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    raw = {name: t for name, t in model.state_dict().items() if "lora_" in name or "modules_to_save" in name}
    torch.save(raw, tmp_path / "adapter_model.bin")
    adapter = open_checkpoint(tmp_path)
    assert isinstance(adapter, Adapter) and set(adapter) == {"head.weight", "head.bias"}
    assert_adapter_is_the_merge(adapter, model)


def test_of_an_attention_module_the_input_projection_is_read_and_the_output_refused(tmp_path: Path) -> None:
    _, model = adapted(r=2, target_modules=["attention"])
    model.save_pretrained(tmp_path)
    adapter = open_checkpoint(tmp_path)
    assert isinstance(adapter, Adapter)
    assert list(adapter.updates) == ["attention.in_proj_weight"] and list(adapter.refused) == [
        "attention.out_proj.weight"
    ]
    expected = merged(model)["attention.in_proj_weight"] - model.before["attention.in_proj_weight"]
    torch.testing.assert_close(adapter.update("attention.in_proj_weight").dense(), expected, rtol=1e-4, atol=1e-5)


def test_a_language_model_names_its_tensors_as_the_base_does(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=4)
    base = transformers.GPT2LMHeadModel(config)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    model.save_pretrained(tmp_path)
    adapter = open_checkpoint(tmp_path)
    assert isinstance(adapter, Adapter)
    assert set(adapter.updates) == {"transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"}
    # Stored (8, 24) by Conv1D; the update is out x in.
    assert adapter.updates["transformer.h.0.attn.c_attn.weight"].shape == (24, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True, "init_lora_weights": True}, "biases in B"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changed the base"),
        ({"init_lora_weights": "pissa_niter_2"}, "'pissa_niter_2', which changed the base"),
        ({"init_lora_weights": "olora"}, "'olora', which changed the base"),
    ],
)
def test_variants_that_are_no_plain_update_are_refused_by_name(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    _, model = adapted(target_modules=["q"], **options)
    model.save_pretrained(tmp_path)
    for source in (tmp_path, model):
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(source)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["q"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q"]),
        peft.VeraConfig(target_modules=["q"]),
        peft.OFTConfig(target_modules=["q"], oft_block_size=2, r=0),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_are_refused_by_type(tmp_path: Path, config: Any) -> None:
    model = peft.get_peft_model(Small(), config)
    model.save_pretrained(tmp_path)
    for source in (tmp_path, model):
        with pytest.raises(CheckpointError, match=f"type '{config.peft_type.value}' and not LORA"):
            open_checkpoint(source)


Edit = Callable[[Path], None]


def _config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _tensors(change: Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file(dict(pair for item in tensors.items() for pair in change(*item)), path)

    return edit


def _without_b(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if "layers.0.q.lora_B" not in name:
        yield name, tensor


def _emptied(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield name, torch.empty(0)


def _twice(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for adapter in ("one", "two"):
        yield name.replace(".weight", f".{adapter}.weight"), tensor.clone()


def _with_magnitude(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield name, tensor
    yield name.partition(".lora_")[0] + ".lora_magnitude_vector", torch.ones(3)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_config(r=3), r"of rank 2, and its adapter_config\.json says 3"),
        (_config(r="two"), "gives 'two' as r"),
        (_config(lora_alpha=None), "gives 'None' as lora_alpha"),
        (_config(r=0), "gives '0' as r"),
        (_config(rank_pattern={"(": 2}), "invalid rank_pattern '\\('"),
        (_config(target_parameters=["mlp.experts"]), "target_parameters"),
        (_config(layer_replication=[[0, 2]]), "replicated layers"),
        (_config(init_lora_weights="corda"), "'corda', which changed the base"),
        (_config(init_lora_weights="lora_ga"), "'lora_ga', which changed the base"),
        (_tensors(_without_b), r"lacks factor B of 'layers\.0\.q'"),
        (_tensors(_emptied), "holds empty factors"),
        (_tensors(_twice), "several adapters \\('one', 'two'\\)"),
        (_tensors(_with_magnitude), "DoRA"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "and no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "no JSON object"),
    ],
)
def test_a_damaged_adapter_is_refused_in_words(tmp_path: Path, edit: Edit, said: str) -> None:
    _, model = adapted(r=2, target_modules=["q"])
    model.save_pretrained(tmp_path)
    edit(tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_adapters_in_folders_below_are_named(tmp_path: Path) -> None:
    for name in ("de", "fr"):
        _, model = adapted(target_modules=["q"])
        model.save_pretrained(tmp_path / name)
    with pytest.raises(CheckpointError, match="adapters in its folders 'de', 'fr'"):
        open_checkpoint(tmp_path)


def test_of_an_adapter_beside_a_model_the_file_decides(tmp_path: Path) -> None:
    _, model = adapted(target_modules=["q"])
    model.save_pretrained(tmp_path)
    torch.save(model.before, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="an adapter and also a whole model"):
        open_checkpoint(tmp_path)
    assert isinstance(open_checkpoint(tmp_path / "adapter_model.safetensors"), Adapter)
    assert set(open_checkpoint(tmp_path / "pytorch_model.bin")) == set(model.before)
    # A merged model with its adapter's configuration left behind is a model.
    (tmp_path / "adapter_model.safetensors").unlink()
    assert not isinstance(open_checkpoint(tmp_path), Adapter)


def test_factors_without_their_config_are_refused(tmp_path: Path) -> None:
    _, model = adapted(target_modules=["q"])
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            open_checkpoint(source)


def test_rows_of_an_embedding_that_were_replaced_are_refused_by_name(tmp_path: Path) -> None:
    _, model = adapted(target_modules=["q"], trainable_token_indices={"embed": [1, 3]})
    model.save_pretrained(tmp_path)
    adapter = open_checkpoint(tmp_path)
    assert len(adapter.refused) == 1 and "trainable tokens" in next(iter(adapter.refused.values()))

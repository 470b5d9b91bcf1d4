"""What was trained, as an adapter of the unchanged base, as a merged model, and back to train on."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import spectra
from spectra.checkpoints import Adapter, open_checkpoint
from spectra.errors import SpectraError
from spectra.lora import SliceConfig, attach, attachment, load_adapter, merge, save_adapter, save_merged
from spectra.lora.record import adapted_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.lora.zoo import KINDS, bert, gpt2, inputs, llama, train, vit, woken, zoo, zoo_loss  # noqa: E402

IDS = torch.arange(12).reshape(2, 6)
# model, its inputs, its targets (None: what is chosen without), of rank 3 but for rank_pattern
MODELS: list[tuple[Callable[[], Any], dict[str, Tensor], list[str] | None, dict[str, int]]] = [
    (bert, {"input_ids": IDS}, ["query", "output.dense"], {"layer.1.*": 5}),
    (gpt2, {"input_ids": IDS}, ["c_attn", "c_proj"], {"h.0.attn.c_attn": 6}),
    (llama, {"input_ids": IDS}, None, {}),
    (vit, {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}, None, {"fc1": 2}),
]
CONFIGS: list[dict[str, Any]] = [
    {"position": 0.5},
    {"position": 0.0, "use_rslora": True, "alpha": 7.0},
    {"method": "lora", "alpha": 6.0},
]


def logits_of(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        output = model(**arguments)
    result: Tensor = output if isinstance(output, Tensor) else output.logits
    return result


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm()) <= 1e-5 * float(other.norm())


@pytest.mark.parametrize("settings", CONFIGS, ids=["slice", "rslora", "lora"])
@pytest.mark.parametrize(("make", "arguments", "targets", "ranks"), MODELS, ids=["bert", "gpt2", "llama", "vit"])
def test_a_trained_transformers_model_goes_out_and_comes_back(
    tmp_path: Path,
    make: Callable[[], Any],
    arguments: dict[str, Tensor],
    targets: list[str] | None,
    ranks: dict[str, int],
    settings: dict[str, Any],
) -> None:
    base = woken(make)
    untouched = copy.deepcopy(base)
    before = logits_of(base, arguments)
    config = SliceConfig(rank=3, target_modules=targets, rank_pattern=ranks, **settings)
    adapted = attach(base, config)
    assert close(logits_of(adapted, arguments), before)
    train(adapted, lambda model: (model(**arguments).logits - 1).square().mean(), rate=0.02)
    after = logits_of(adapted, arguments)
    assert float((after - before).norm()) > 1e-3 * float(before.norm())

    save_adapter(adapted, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        kept = set(file.keys())
    sides = ("lora_A.weight", "lora_B.weight")
    assert kept == {f"base_model.model.{name}.{side}" for name in adapted_layers(adapted) for side in sides}
    plain = peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "adapter")
    assert close(logits_of(plain, arguments), after)
    merged = merge(adapted)
    assert type(merged) is type(untouched)
    assert close(logits_of(merged, arguments), after)
    assert close(logits_of(plain.merge_and_unload(), arguments), after)
    assert torch.equal(logits_of(adapted, arguments), after)  # merging took a copy

    again = load_adapter(copy.deepcopy(untouched), tmp_path / "adapter")
    assert torch.equal(logits_of(again, arguments), after)
    for model in (adapted, again):  # and it goes on training the same A and B from the same A0 and B0
        train(model, lambda model: (model(**arguments).logits - 1).square().mean(), rate=0.02)
    for (name, one), other in zip(adapted_layers(adapted).items(), adapted_layers(again).values(), strict=True):
        for mine, theirs in zip(
            (*one.trained(), *(one.initial() or ())), (*other.trained(), *(other.initial() or ())), strict=True
        ):
            assert torch.equal(mine, theirs), name

    folder = save_merged(again, tmp_path / "merged")
    loaded = type(untouched).from_pretrained(folder)
    assert close(logits_of(loaded, arguments), logits_of(again, arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_every_kind_of_module_survives_export_merging_and_import(
    tmp_path: Path, alpha: float | None, dtype: torch.dtype
) -> None:
    config = SliceConfig(
        rank=2, position=0.4, alpha=alpha, target_modules=KINDS, modules_to_save=["head"],
        rank_pattern={"bare": 4}, alpha_pattern={"kernel": 3.0},
    )  # fmt: skip
    adapted = attach(zoo(dtype), config)
    train(adapted, zoo_loss, rate=0.5)
    adapted.eval()
    after = adapted(**inputs(dtype))
    save_adapter(adapted, tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(zoo(dtype), tmp_path / "adapter").eval()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-12}[dtype]
    for other in (plain, merge(adapted), load_adapter(zoo(dtype), tmp_path / "adapter").eval()):
        torch.testing.assert_close(other(**inputs(dtype)), after, atol=tolerance, rtol=tolerance)
    adapter = open_checkpoint(tmp_path / "adapter")
    assert isinstance(adapter, Adapter)
    base, merged = zoo(dtype), merge(adapted)
    for name, layer in adapted_layers(adapted).items():
        update, D = adapter.update(f"{name}.weight"), layer.update()
        assert update.rank == 2 * config.rank_of(name)
        assert update.c == pytest.approx(config.scaling_of(name), rel=1e-12)
        torch.testing.assert_close(update.dense(), D.dense())
        stored = base.get_submodule(name).weight.detach()
        W = stored.T if name == "turned" else stored.flatten(1)
        exact = (W.double() + D.c * D.B.double() @ D.A.double()).to(dtype)  # one rounding
        got = merged.get_submodule(name).weight.detach()
        tolerance = 1e-15 if dtype == torch.float64 else 0.0  # sums in another order
        torch.testing.assert_close(got.T if name == "turned" else got.flatten(1), exact, atol=tolerance, rtol=tolerance)


def test_pefts_own_merging_rounds_once_too_and_undoes_itself() -> None:
    adapted = attach(zoo(torch.bfloat16), SliceConfig(rank=2, position=0.0, target_modules=KINDS))
    train(adapted, zoo_loss, rate=0.5)
    ours = merge(adapted).state_dict()
    for safe in (False, True):
        theirs = copy.deepcopy(adapted).merge_and_unload(safe_merge=safe).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    wide = attach(zoo(), SliceConfig(rank=2, position=0.0, target_modules=KINDS))
    train(wide, zoo_loss, rate=0.5)
    wide.eval()
    expected = wide(**inputs())
    wide.merge_adapter()
    torch.testing.assert_close(wide(**inputs()), expected)
    wide.unmerge_adapter()
    torch.testing.assert_close(wide(**inputs()), expected)


def test_compare_reads_what_was_exported(tmp_path: Path) -> None:
    base = woken(bert)
    untouched = copy.deepcopy(base)
    adapted = attach(base, SliceConfig(rank=3, position=0.5, target_modules=["query"]))
    train(adapted, lambda model: (model(input_ids=IDS).logits - 1).square().mean(), rate=0.02)
    save_adapter(adapted, tmp_path / "adapter")
    layers = spectra.compare(untouched, tmp_path / "adapter").layers.set_index("name")
    for name, layer in adapted_layers(adapted).items():
        row = layers.loc[f"{name}.weight"]
        assert row.status == "compared"
        assert row.update_norm == pytest.approx(float(layer.update().dense().norm()), rel=1e-5)
        assert row.numerical_rank <= 6


def test_scalings_survive_the_doubling_of_the_rank(tmp_path: Path) -> None:
    for is_stable in (False, True):
        folder = tmp_path / str(is_stable)
        save_adapter(attach(zoo(), SliceConfig(rank=3, start=1, alpha=5.0, use_rslora=is_stable)), folder)
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["r"] == 6
        assert written["use_rslora"] is is_stable
        c = 5.0 / (math.sqrt(3) if is_stable else 3)
        assert written["lora_alpha"] == pytest.approx(c * (math.sqrt(6) if is_stable else 6))
        assert written["init_lora_weights"] is True


def test_names_that_end_other_names_adapt_only_their_own_modules(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(6, 6), "inner": nn.ModuleDict({"fc": nn.Linear(6, 6)})})

    adapted = attach(model(), SliceConfig(rank=2, start=0, target_modules=["fc"], exclude=["inner.fc"]))
    assert [*attachment(adapted).slots] == ["fc"]
    train(adapted, lambda m: m.get_base_model()["fc"](torch.ones(1, 6)).square().sum())
    save_adapter(adapted, tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(plain["fc"].weight, merge(adapted)["fc"].weight)  # type: ignore[index]
    assert torch.equal(plain["inner"]["fc"].weight, model()["inner"]["fc"].weight)  # type: ignore[index]


def test_what_save_pretrained_writes_is_never_taken_for_what_was_trained(tmp_path: Path) -> None:
    adapted = attach(zoo(), SliceConfig(rank=2, start=3, target_modules=["biased"]))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"spectra\.lora\.save_adapter"):
        peft.PeftModel.from_pretrained(zoo(), tmp_path)
    for wrong in (tmp_path, adapted):
        with pytest.raises(SpectraError, match=r"spectra\.lora\.save_adapter"):
            spectra.compare(zoo(), wrong)


def test_files_of_merged_models(tmp_path: Path) -> None:
    adapted = attach(zoo(), SliceConfig(rank=2, start=3))
    train(adapted, zoo_loss)
    expected = merge(adapted).state_dict()
    for name in ("tuned.safetensors", "tuned.pt"):
        found = open_checkpoint(save_merged(adapted, tmp_path / name))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(SpectraError, match="Zoo writes no model folder"):
        save_merged(adapted, tmp_path / "folder")
    torch.manual_seed(0)
    tied = attach(gpt2(), SliceConfig(rank=2, start=3))
    assert "transformer.wte.weight" in open_checkpoint(save_merged(tied, tmp_path / "tied.safetensors"))
    save_merged(tied, tmp_path / "folder")
    with pytest.raises(SpectraError, match="is there already"):
        save_merged(tied, tmp_path / "folder")
    tied.merge_adapter()
    with pytest.raises(SpectraError, match="unmerge_adapter"):
        merge(tied)
    tied.unmerge_adapter()
    in_place = merge(tied, copy=False)
    assert in_place is tied.get_base_model()


def test_folders_that_cannot_be_written_or_read_are_refused(tmp_path: Path) -> None:
    adapted = attach(zoo(), SliceConfig(rank=2, start=3))
    save_adapter(adapted, tmp_path / "adapter")
    with pytest.raises(SpectraError, match="holds an adapter already"):
        save_adapter(adapted, tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")  # as training lays it beside
    save_adapter(adapted, tmp_path / "adapter", force=True)
    assert (tmp_path / "adapter" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(SpectraError, match="Zoo carries no slices"):
        save_adapter(zoo(), tmp_path / "other")
    with pytest.raises(SpectraError, match=r"holds no spectra_slices\.json"):
        load_adapter(zoo(), tmp_path)
    with pytest.raises(SpectraError, match=r"adapts 'biased', of kind linear and 20 x 12, and this BertFor.* has none"):
        load_adapter(bert(), tmp_path / "adapter")
    wider = zoo()
    wider.biased = nn.Linear(12, 21)
    with pytest.raises(SpectraError, match="has one of 21 x 12"):
        load_adapter(wider, tmp_path / "adapter")
    with torch.no_grad():
        next(iter(adapted_layers(adapted).values())).trained()[0][0, 0] = torch.inf
    with pytest.raises(SpectraError, match="hold NaN or infinite"):
        save_adapter(adapted, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    for content, words in (("{", "cannot read"), ('{"format": 9}', "format 1"), ('{"format": 1}', "is damaged")):
        (tmp_path / "adapter" / "spectra_slices.json").write_text(content)
        with pytest.raises(SpectraError, match=words):
            load_adapter(zoo(), tmp_path / "adapter")


def test_another_base_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    adapted = attach(zoo(), SliceConfig(rank=2, start=3, target_modules=["biased", "turned"]))
    save_adapter(adapted, tmp_path / "adapter")
    other = zoo()
    with torch.no_grad():
        other.turned.weight[0, 0] += 1e-6
    with pytest.raises(SpectraError, match=r"was trained on another base: 'turned' of this Zoo has other weights"):
        load_adapter(other, tmp_path / "adapter")
    assert load_adapter(zoo(), tmp_path / "adapter") is not None
    narrow = attachment(load_adapter(zoo(torch.bfloat16), tmp_path / "adapter"))
    assert narrow.notes[-1].endswith("was trained on cannot be told from 'biased' and 1 more")
    record = tmp_path / "adapter" / "spectra_slices.json"
    content = json.loads(record.read_text())
    for slot in content["modules"]:
        del slot["fingerprint"]
    record.write_text(json.dumps(content))
    assert "cannot be told" in attachment(load_adapter(zoo(), tmp_path / "adapter")).notes[-1]  # as it was once written


def test_base_in_a_wider_dtype_is_still_the_base(tmp_path: Path) -> None:
    base = zoo(torch.bfloat16)
    save_adapter(attach(copy.deepcopy(base), SliceConfig(rank=2, start=3, target_modules=["bare"])), tmp_path / "a")
    assert not attachment(load_adapter(copy.deepcopy(base).float(), tmp_path / "a")).notes
    with torch.no_grad():
        base.bare.weight[0, 0] += 1.0
    with pytest.raises(SpectraError, match="another base"):
        load_adapter(base.float(), tmp_path / "a")


def test_class_names_go_with_the_adapter_of_a_classifier(tmp_path: Path) -> None:
    base = woken(bert)
    base.config.id2label = {0: "apple", 1: "pear"}
    untouched = copy.deepcopy(base)
    adapted = attach(base, SliceConfig(rank=3, position=0.5, modules_to_save=["classifier"]))
    train(adapted, lambda model: (model(input_ids=IDS).logits - 1).square().mean(), rate=0.02)
    save_adapter(adapted, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "spectra_slices.json").read_text())["id2label"] == {
        "0": "apple",
        "1": "pear",
    }
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    after = logits_of(adapted, {"input_ids": IDS})
    for loaded in (
        peft.PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "adapter"),
        load_adapter(copy.deepcopy(untouched), tmp_path / "adapter"),
    ):
        assert close(logits_of(loaded, {"input_ids": IDS}), after)
    save_adapter(attach(untouched, SliceConfig(rank=3, position=0.5)), tmp_path / "headless")
    assert json.loads((tmp_path / "headless" / "adapter_config.json").read_text())["task_type"] is None

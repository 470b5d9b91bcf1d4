"""Models from folders and adapters: the right class, the right weights, and a sentence for what cannot be run."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectra.checkpoints import open_checkpoint
from spectra.errors import SpectraError
from spectra.sources.models import load_config, load_model, task_of
from spectra.sources.preprocessing import load_image_processor, load_tokenizer

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


def small_bert(kind: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **options
    )
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(12).reshape(2, 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("BertForMaskedLM", "masked-lm"),
        ("BertForSequenceClassification", "classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertLMHeadModel", "causal-lm"),
        ("BertModel", "encoder"),
    ],
)
def test_the_class_is_that_of_the_architecture(kind: str, task: str, tmp_path: Path) -> None:
    folder = small_bert(kind, tmp_path)
    model = load_model(folder)
    assert type(model).__name__ == kind
    assert not model.training
    assert task_of(load_config(folder), folder) == task
    stored = open_checkpoint(folder)
    own = model.state_dict()
    assert all(torch.equal(own[name], stored[name]) for name in stored)


def test_parameters_have_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}


def test_random_parameters_are_refused(tmp_path: Path) -> None:
    folder = small_bert("BertModel", tmp_path)
    with pytest.raises(SpectraError, match=r"lacks \d+ of the parameters of a model for masked-lm \(cls.predictions"):
        load_model(folder, "masked-lm")
    encoder = load_model(small_bert("BertForMaskedLM", tmp_path / "mlm"), "encoder")
    assert type(encoder).__name__ == "BertModel"
    assert not any("pooler" in name for name in encoder.state_dict())  # the file has none


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(SpectraError, match=r"no config\.json.*\(package\.module:function\)"):
            load_model(source)
    folder = small_bert("BertModel", tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"model_type": "of_another_world"}, "makes no model of"),
        ({"architectures": ["BertForQuestionAnswering"]}, r"'BertForQuestionAnswering'; say for which task it is"),
        ({"architectures": None}, "names no architecture"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(SpectraError, match=words):
            load_model(folder)
    with pytest.raises(SpectraError, match="'poetry' is no task"):
        load_model(folder, "poetry")
    with pytest.raises(SpectraError, match="nowhere"):
        load_model(tmp_path / "nowhere")


def test_early_folders_are_known_by_the_names_of_their_tensors(rxnfp: Path) -> None:
    model = load_model(rxnfp / "bert_pretrained")  # its config.json says neither type nor architecture
    assert type(model).__name__ == "BertForMaskedLM"
    stored = open_checkpoint(rxnfp / "bert_pretrained")
    name = "bert.encoder.layer.3.attention.self.query.weight"
    assert torch.equal(model.state_dict()[name], stored[name])


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base folder, an adapter folder with a new head, and what the adapter's merged weights must be."""
    peft = pytest.importorskip("peft")
    base = small_bert("BertForSequenceClassification", tmp_path / "base", num_labels=3)
    model = load_model(base)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "dense"], task_type="SEQ_CLS")
    adapter = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapter.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", dict(adapter.merge_and_unload().state_dict())


def test_an_adapter_is_its_base_with_the_updates_of_its_factors(adapted: Any) -> None:
    base, adapter, expected = adapted
    before = {path: path.read_bytes() for path in base.iterdir()}
    model = load_model(adapter, base=base)
    state, stored, factors = model.state_dict(), open_checkpoint(base), open_checkpoint(adapter)
    assert list(state) == list(load_model(base).state_dict())  # names are the base's
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7)
    for name in factors.updates:  # c B A, by hand
        update = factors.update(name)
        D = update.c * update.B.double() @ update.A.double()
        torch.testing.assert_close(state[name].double(), stored[name].double() + D, rtol=1e-5, atol=1e-6)
    assert not torch.equal(state["classifier.weight"], stored["classifier.weight"])  # the new head
    assert before == {path: path.read_bytes() for path in base.iterdir()}


def test_an_adapter_may_bring_the_head_that_its_base_lacks(adapted: Any, tmp_path: Path) -> None:
    base, adapter, expected = adapted
    from transformers import BertForSequenceClassification

    BertForSequenceClassification.from_pretrained(base).bert.save_pretrained(tmp_path / "headless")
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    (tmp_path / "headless" / "config.json").write_text(json.dumps({**config, "num_labels": 3}))
    state = load_model(adapter, base=tmp_path / "headless").state_dict()
    torch.testing.assert_close(state["classifier.weight"], expected["classifier.weight"])


@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"^bert.encoder.layer.1.output.dense": 5}}])
def test_an_adapter_trained_around_a_body_fits_the_body_alone(tmp_path: Path, patterns: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    base = small_bert("BertForSequenceClassification", tmp_path / "base", num_labels=3)
    targets = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    config = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=["classifier"], **patterns)
    adapter = peft.get_peft_model(load_model(base), config)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3)
    adapter.save_pretrained(tmp_path / "adapter")
    whole = adapter.merge_and_unload()
    body = load_model(tmp_path / "adapter", base=load_model(base).bert)
    expected = dict(whole.bert.state_dict())
    torch.testing.assert_close(dict(body.state_dict()), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(
        body.state_dict()["encoder.layer.0.attention.self.query.weight"],
        load_model(base).bert.state_dict()["encoder.layer.0.attention.self.query.weight"],
    )


def test_an_adapter_on_a_module_leaves_the_module_alone(adapted: Any) -> None:
    base, adapter, expected = adapted
    module = load_model(base)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    merged = load_model(adapter, base=module)
    torch.testing.assert_close(merged.state_dict(), expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_adapter_needs_its_own_base(adapted: Any, tmp_path: Path) -> None:
    base, adapter, _ = adapted
    with pytest.raises(SpectraError, match="give the base, too"):
        load_model(adapter)
    with pytest.raises(SpectraError, match="is an adapter and no base"):
        load_model(adapter, base=adapter)
    other = small_bert("BertForMaskedLM", tmp_path / "other")
    with pytest.raises(SpectraError, match=r"lacks .* of the parameters of a model for classification"):
        load_model(adapter, base=other, task="classification")
    wide = tmp_path / "wide"
    shutil.copytree(base, wide)
    small_bert("BertForSequenceClassification", wide, num_labels=5)
    with pytest.raises(SpectraError, match="give the base that it was trained on"):
        load_model(adapter, base=wide)


def test_the_global_random_state_is_left_alone(adapted: Any) -> None:
    base, adapter, _ = adapted
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    load_model(adapter, base=base)
    assert torch.equal(torch.rand(1), expected)


def test_tokenizer_and_processor_come_from_the_folder(minilm: Path, vit_folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(minilm)(["Two words"])["input_ids"][0][0] == 101
    assert load_image_processor(vit_folder).size["height"] == 32
    folder = small_bert("BertModel", tmp_path / "bare")
    with pytest.raises(SpectraError, match="no tokenizer is in"):
        load_tokenizer(folder)
    with pytest.raises(SpectraError, match=r"no image processor is in .*preprocessor_config\.json"):
        load_image_processor(folder)


def test_loading_says_nothing_on_stderr(minilm: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(minilm)
    load_tokenizer(minilm)
    with torch.no_grad():
        assert torch.isfinite(model(**batch()).last_hidden_state).all()
    assert capfd.readouterr() == ("", "")

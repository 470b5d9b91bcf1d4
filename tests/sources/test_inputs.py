"""Options that contradict each other, and which models and batches the others mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectra.errors import SpectraError
from spectra.sources.inputs import inputs_from
from spectra.sources.models import load_model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": Path("a.csv"), "images": Path("b")}, "--data and --images both say"),
        ({"data": Path("a.csv"), "batches": "a:b"}, "--data and --batches both say"),
        ({"model": "a:b"}, "nothing to run the models on"),
        ({"limit": 3}, "nothing to run the models on"),
        ({"label_column": "label"}, "nothing to run the models on"),
        ({"batch_size": 16, "task": "encoder"}, "leave out --task and --batch-size"),
        ({"batches": "a:b", "limit": 3}, "the batches are those of a:b, for which --limit would do nothing"),
        ({"batches": "a:b", "label_column": "label"}, "--label-column would do nothing"),
        ({"batches": "a:b", "batch_size": 16}, "--batch-size would do nothing"),
        ({"batches": "a:b", "text_column": "text", "max_length": 8}, "--text-column and --max-length would do nothing"),
        ({"images": Path("b"), "max_length": 8}, "b is a folder of images, for which --max-length would do nothing"),
        ({"data": Path(), "label_column": "label"}, "a folder of images, for which --label-column would do nothing"),
        ({"model": "a:b", "batches": "a:b", "task": "encoder"}, "--task would do nothing"),
        ({"model": "a:b", "data": Path("a.csv")}, "give --batches, too"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpectraError, match=words):
        inputs_from("base", "tuned", **options)


def test_without_data_nothing_is_opened() -> None:
    inputs = inputs_from("nowhere", "neither")
    assert inputs.models() == ("nowhere", "neither")
    assert inputs.batches is None


def test_models_are_built_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "things_of_inputs.py").write_text(
        "import torch\nbuilt = []\ndef build():\n    built.append(1)\n    return torch.nn.Linear(3, 2)\n"
        "def batches(): return [torch.ones(1, 3)]\n"
    )
    for side, value in (("base", 1.0), ("tuned", 2.0)):
        save_file({"weight": torch.full((2, 3), value), "bias": torch.zeros(2)}, tmp_path / f"{side}.safetensors")
    inputs = inputs_from(
        "base.safetensors", "tuned.safetensors", model="things_of_inputs:build", batches="things_of_inputs:batches"
    )
    import things_of_inputs

    assert not things_of_inputs.built
    apart = inputs.models(together=False)
    assert not things_of_inputs.built
    assert torch.equal(apart[1]().weight.detach(), torch.full((2, 3), 2.0))
    base, tuned = inputs.models()
    assert isinstance(base, nn.Module)
    assert torch.equal(2 * base.weight.detach(), tuned.weight.detach())
    assert inputs.bytes == 2 * 8 * 4


def test_labels_need_a_model_of_classes(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\na,1\n")
    with pytest.raises(SpectraError, match="--label-column label has no use"):
        inputs_from(str(minilm), str(minilm), data=tmp_path / "rows.csv", label_column="label")


def test_an_adapter_is_no_base(minilm: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from spectra.sources.models import load_model

    config = peft.LoraConfig(r=1, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    peft.get_peft_model(load_model(minilm), config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "rows.txt").write_text("a\n")
    with pytest.raises(SpectraError, match="is an adapter and no base"):
        inputs_from(str(tmp_path / "adapter"), str(minilm), data=tmp_path / "rows.txt")


def test_an_adapter_runs_as_its_base_does(minilm: Path, tmp_path: Path) -> None:
    """Also one that was trained under a new head, of which the base knows nothing."""
    lora, heads = pytest.importorskip("spectra.lora"), pytest.importorskip("spectra.training.heads")
    base = load_model(minilm)
    model, head = heads.with_new_head(base, "text-classification", ("a", "b", "c"), seed=0)
    config = lora.SliceConfig(rank=2, position=0.0, target_modules=["layer.0.*.query"], modules_to_save=head)
    lora.save_adapter(lora.attach(model, config), tmp_path / "adapter")
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    found = inputs_from(str(minilm), str(tmp_path / "adapter"), data=tmp_path / "rows.txt")
    one, other = found.models(together=True)
    assert type(one) is type(other)
    assert list(one.state_dict()) == list(other.state_dict())
    whole = load_model(tmp_path / "adapter", base=minilm)
    assert (type(whole).__name__, whole.config.id2label) == ("BertForSequenceClassification", {0: "a", 1: "b", 2: "c"})

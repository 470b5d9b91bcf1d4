"""BERT, GPT-2, Llama and ViT of transformers: a new head on their body, a few steps, an adapter that peft loads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectra import SpectraError
from spectra.training import Task, TensorExamples, train
from spectra.training.building import build
from spectra.training.heads import with_new_head
from spectra.training.settings import TrainSettings
from spectra.training.tasks import next_token_logits, next_tokens

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TOKENS: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": 0}
GPT2: dict[str, Any] = {
    "vocab_size": 40,
    "n_positions": 24,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The base, the modules that are new under a new head, and where the head stands.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TOKENS, **SIZES)),
        ("classifier", "bert.pooler"),
    ),
    "bert with a head": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TOKENS, **SIZES, num_labels=5)),
        ("classifier",),
    ),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), ("score",)),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOKENS, **SIZES, num_key_value_heads=2)),
        ("score",),
    ),
    "vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=5)
        ),
        ("classifier",),
    ),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def columns(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(48) % 3
    if name == "vit":
        pixels = torch.randn(48, 3, 16, 16, generator=generator)
        pixels[:, 0] += labels[:, None, None]
        return {"pixel_values": pixels, "labels": labels}
    ids = torch.randint(5, 40, (48, 10), generator=generator)
    ids[:, 1:6] = (labels + 5)[:, None]
    mask = torch.ones_like(ids)
    mask[::4, 8:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def make_task(name: str) -> Callable[[nn.Module], Task]:
    def task(base: nn.Module) -> Task:
        kind = "image-classification" if name == "vit" else "text-classification"
        model, head = with_new_head(base, kind, ("a", "b", "c"), seed=0)
        assert set(head) == set(MODELS[name][1])
        examples = TensorExamples(columns(name))
        return Task(model, train=examples, test=examples, head=head)

    return task


def logits(model: nn.Module, name: str) -> Tensor:
    inputs = {key: value[:8] for key, value in columns(name).items() if key != "labels"}
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_new_head_shares_the_body_and_leaves_the_own_head(name: str) -> None:
    base = make(name)
    before = logits(base, name)
    model, _ = with_new_head(base, "image-classification" if name == "vit" else "text-classification", "abc", seed=3)
    again, _ = with_new_head(
        make(name), "image-classification" if name == "vit" else "text-classification", "abc", seed=3
    )
    assert torch.equal(logits(base, name), before)
    assert logits(model, name).shape == (8, 3)
    assert torch.equal(logits(model, name), logits(again, name))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.base_model is base.base_model
    assert model.config.num_labels == 3
    assert (base.config.num_labels == 5) == (name in ("vit", "bert with a head"))


@pytest.mark.parametrize("name", MODELS)
def test_slice_trains_exports_and_peft_loads_it_on_the_unchanged_base(tmp_path: Path, name: str) -> None:
    base = make(name)
    settings = {
        "method": {"name": "slice", "rank": 4, "position": 0.5},
        "optimiser": {"steps": 12, "learning_rate": 1e-2, "batch_size": 16},
        "out": str(tmp_path),
    }
    run = train(settings, base=base, task=make_task(name))
    losses = run.metrics.query("split == 'test'").loss
    assert losses.iloc[-1] < losses.iloc[0]
    assert run.model is not None
    fresh = make_task(name)(copy.deepcopy(base)).model
    loaded = peft.PeftModel.from_pretrained(fresh, run.result)
    assert torch.allclose(logits(loaded, name), logits(run.model, name), atol=1e-5)
    moved = run.comparison.layers.query("status == 'compared'")
    assert len(moved) >= 4
    assert (moved.numerical_rank <= 8).all()
    assert not any(matrix.startswith(MODELS[name][1]) for matrix in moved.name)


@pytest.mark.parametrize("name", ["bert with a head", "gpt2"])
def test_full_result_is_a_model_folder(tmp_path: Path, name: str) -> None:
    settings = {"method": {"name": "full"}, "optimiser": {"steps": 2, "batch_size": 16}, "out": str(tmp_path)}
    run = train(settings, base=make(name), task=make_task(name))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(run.result)
    assert run.model is not None
    assert torch.allclose(logits(loaded, name), logits(run.model, name), atol=1e-6)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_causal_language_model_learns_with_its_own_head(tmp_path: Path) -> None:
    examples = TensorExamples({name: column for name, column in columns("llama").items() if name != "labels"})

    def task(base: nn.Module) -> Task:
        return Task(base, examples, examples, metric="log_likelihood", forward=next_token_logits, targets=next_tokens)

    settings = {
        "method": {"name": "slice", "rank": 4, "position": 0.0},
        "optimiser": {"steps": 20, "learning_rate": 2e-2, "batch_size": 16},
        "out": str(tmp_path),
        "compare": False,
    }
    run = train(settings, base=make("llama"), task=task)
    assert run.summary["score"] > run.summary["score_before"] + 0.1
    test = run.metrics.query("split == 'test'")
    assert test.perplexity.tolist() == pytest.approx([2.718281828459045**loss for loss in test.loss])
    with pytest.raises(SpectraError, match="head trains a new head, and this task has none"):
        train(settings, base=make("llama"), task=task, method={"name": "head"}, out=str(tmp_path / "head"))


def test_bfloat16_base_starts_where_it_was(tmp_path: Path) -> None:
    base = make("llama").to(torch.bfloat16)

    def retained(body: nn.Module) -> Task:
        inputs = {key: value for key, value in columns("llama").items() if key != "labels"}
        with torch.no_grad():
            said = base(**inputs).logits.argmax(-1)
        return Task(body, TensorExamples({**inputs, "labels": said}))

    settings = {
        "method": {"name": "slice", "rank": 4, "position": 0.5},
        "optimiser": {"steps": 2, "batch_size": 16},
        "out": str(tmp_path),
        "compare": False,
    }
    run = train(settings, base=base, task=make_task("llama"), retain={"own": retained})
    assert run.summary["retained"]["own"]["before"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the settings name no training data"),
        ({"data.train": "none.csv", "model.source": "BASE"}, "tokenizer"),
        ({"data.train": "none.csv"}, "needs the tokenizer beside the model; give model.source"),
        ({"task.kind": "masked-lm"}, "masked language modelling is only a task to retain"),
        ({"task.kind": "custom"}, r'needs task\.factory = "package\.module:function"'),
        ({"task.kind": "causal-lm", "data.train": "a.csv", "model.source": "BASE"}, "tokenizer"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base = make("bert")
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    changes = {key: str(tmp_path / "base") if value == "BASE" else value for key, value in changes.items()}
    with pytest.raises(SpectraError, match=message):
        build(TrainSettings().changed(changes), base=None if "model.source" in changes else base)


def test_head_that_the_base_lacks_cannot_be_retained() -> None:
    settings = TrainSettings().changed({"retain.kind": "text-classification", "retain.test": "x.csv"})
    with pytest.raises(SpectraError, match="BertForMaskedLM with a head for masked-lm, so that text-classification"):
        build(settings, base=make("bert"), task=make_task("bert"))

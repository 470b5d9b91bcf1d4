"""Tasks from files: folders of images, texts for language models, masked tokens to retain, labels of every spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spectra import SpectraError
from spectra.sources.models import load_model
from spectra.training import TrainSettings, train
from spectra.training.building import build
from spectra.training.datasets import classes_of_column, classes_of_folder
from spectra.training.settings import DataSettings

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
for package in ("accelerate", "datasets", "peft"):
    pytest.importorskip(package)

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "red", "blue"]


def save_tokenizer(folder: Path) -> None:
    """Whole words, as the sentences below are made of."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(WORDS), (count, 7), generator=generator)
    return [" ".join(WORDS[place] for place in row[: 4 + number % 4]) for number, row in enumerate(chosen.tolist())]


def write_rows(path: Path, count: int, **label: Any) -> str:
    rows = [{"text": text, **{key: make(text) for key, make in label.items()}} for text in sentences(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SMALL: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


@pytest.fixture
def masked(tmp_path: Path) -> str:
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    model.save_pretrained(tmp_path / "masked")
    save_tokenizer(tmp_path / "masked")
    return str(tmp_path / "masked")


def test_text_task_retains_masked_tokens_of_the_base(tmp_path: Path, masked: str) -> None:
    settings = {
        "model": {"source": masked},
        "data": {
            "train": write_rows(tmp_path / "new.jsonl", 60, label=lambda text: "cat" if "cat" in text else "none")
        },
        "retain": {"test": write_rows(tmp_path / "old.jsonl", 30)},
        "method": {"name": "full"},
        "optimiser": {"epochs": 1.0, "batch_size": 8, "learning_rate": 5e-3},
        "out": str(tmp_path / "run"),
    }
    run = train(settings)
    assert (run.summary["steps"], run.summary["examples"]) == (6, 48)  # a fifth of 60 is kept apart
    scores = run.metrics.query("split == 'retain'")
    assert scores.score.iloc[0] - scores.score.iloc[-1] == pytest.approx(run.summary["forgetting"])
    assert scores.loss.iloc[0] != scores.loss.iloc[-1]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(run.result)
    assert loaded.config.label2id == {"cat": 0, "none": 1}
    assert len(transformers.AutoTokenizer.from_pretrained(run.result)) == 17  # so that the folder is a base again
    assert run.comparison.provenance["base"]["source"] == masked


def test_masked_tokens_are_the_same_each_time_and_never_special(tmp_path: Path, masked: str) -> None:
    settings = TrainSettings.from_mapping(
        {
            "model": {"source": masked},
            "data": {"train": write_rows(tmp_path / "a.jsonl", 30, label=lambda text: len(text) % 2)},
            "retain": {"test": write_rows(tmp_path / "b.jsonl", 40)},
        }
    )
    examples = build(settings).retained["retain"].test
    one, two = examples.batch(range(40)), examples.batch(range(20, 40))
    counted = one["labels"] != -100
    assert torch.equal(one["input_ids"] == 4, counted)
    assert bool(counted.any(1).all())
    assert not bool((counted & (one["attention_mask"] == 0)).any())
    width = two["labels"].shape[1]
    assert torch.equal(one["labels"][20:, :width], two["labels"])  # whatever batch an example is in
    restored = torch.where(counted, one["labels"], one["input_ids"])
    assert bool((restored[one["attention_mask"] == 1] > 4).all())


def test_language_model_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    run = train(
        {
            "model": {"source": str(tmp_path / "base")},
            "task": {"kind": "causal-lm"},
            "data": {"train": rows},
            "retain": {"test": rows},
            "method": {"name": "slice", "rank": 4, "position": 0.0},
            "optimiser": {"steps": 8, "batch_size": 16, "learning_rate": 1e-2, "accumulate": 2},
            "out": str(tmp_path / "run"),
        }
    )
    assert run.summary["metric"] == "log_likelihood"
    assert run.summary["score"] > run.summary["score_before"]
    assert run.summary["forgetting"] < 0  # the very text that it learnt from


def test_images_from_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    draw = pytest.importorskip("PIL.ImageDraw")
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if "size" in key and key != "vocab_size"}
    config = transformers.ViTConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4,
        id2label={0: "dark", 1: "light"}, label2id={"dark": 0, "light": 1},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
    for number in range(24):
        for group, names in {"new": ("circle", "square"), "old": ("dark", "light")}.items():
            name = names[number % 2]
            picture = image.new("RGB", (20, 20), "white" if name == "light" else "black")
            box = (3 + number % 5, 4, 14, 15)
            if group == "new":
                draw.Draw(picture).ellipse(box, "red") if name == "circle" else draw.Draw(picture).rectangle(
                    box, "blue"
                )
            (tmp_path / group / name).mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / group / name / f"{number}.png")
    settings = {
        "model": {"source": str(tmp_path / "base")},
        "task": {"kind": "image-classification"},
        "data": {"train": str(tmp_path / "new")},
        "retain": {"test": str(tmp_path / "old")},
        "method": {"name": "lora", "rank": 2},
        "optimiser": {"steps": 12, "batch_size": 8, "learning_rate": 1e-2},
        "out": str(tmp_path / "run"),
    }
    run = train(settings)
    assert run.summary["score"] == 1.0
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "base").eval()
    files = [
        (file, label) for label, name in enumerate(("dark", "light")) for file in (tmp_path / "old" / name).iterdir()
    ]
    shown = transformers.AutoImageProcessor.from_pretrained(tmp_path / "base")(
        images=[image.open(file) for file, _ in files], return_tensors="pt"
    )
    with torch.no_grad():
        said = model(**shown).logits.argmax(-1)
    right = (said == torch.tensor([label for _, label in files])).double().mean()
    assert run.summary["retained"]["retain"]["before"] == right.item()
    assert classes_of_folder(str(tmp_path / "new")) == ("circle", "square")
    assert run.summary["classes"] == ["circle", "square"]
    kept = transformers.AutoImageProcessor.from_pretrained(run.result)
    assert kept.size["height"] == 16
    with pytest.raises(SpectraError, match=r"images in .*new have no labels: .*'circle'"):
        train({**settings, "retain": {"test": str(tmp_path / "new")}, "out": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([2, 0, 2], ("0", "1", "2")),
        ([True, False], ("0", "1")),
        ([1.0, 0.0], ("0", "1")),
    ],
)
def test_classes_of_a_column(tmp_path: Path, labels: list[Any], classes: tuple[str, ...]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in labels))
    assert classes_of_column(str(file), None, DataSettings()) == classes


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.0], r"row 1 of .*rows\.jsonl has 0\.5 in the column 'label', which names no class"),
        ([0, None], r"row 2 of .*has None"),
        ([-1, 1], "numbers from -1 to 1, which number no classes from 0"),
        ([7, 100000], "numbers from 7 to 100000"),
    ],
)
def test_labels_that_name_no_class(tmp_path: Path, labels: list[Any], message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in labels))
    with pytest.raises(SpectraError, match=message):
        classes_of_column(str(file), None, DataSettings())


def adapter_settings(tmp_path: Path, masked: str, **data: Any) -> dict[str, Any]:
    return {
        "model": {"source": masked},
        "data": data,
        "method": {"name": "slice", "rank": 2, "position": 0.0},
        "optimiser": {"steps": 6, "batch_size": 8},
        "compare": False,
        "out": str(tmp_path / "run"),
    }


def test_texts_are_cut_to_what_the_model_takes(tmp_path: Path, masked: str) -> None:
    file = tmp_path / "long.jsonl"
    rows = [{"text": " ".join(WORDS * 5), "label": number % 2} for number in range(20)] + [{"text": "", "label": 0}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = adapter_settings(tmp_path, masked, train=str(file))
    with pytest.raises(
        SpectraError, match=r"data\.max_length is 600, and BertForMaskedLM has positions for 16 tokens; give at most 16"
    ):
        train({**settings, "data": {"train": str(file), "max_length": 600}})
    run = train(settings)  # into the same folder, which the refusal has left alone
    assert run.summary["notes"][:2] == [
        f"1 of 21 rows of {file} have no text: left out",
        "20 of 20 texts fill the 16 tokens after which texts are cut",
    ]
    retain = {**settings, "retain": {"test": str(file), "max_length": 17}, "out": str(tmp_path / "other")}
    with pytest.raises(SpectraError, match=r"retain\.max_length is 17"):
        train(retain)


def test_adapter_keeps_its_class_names_and_its_tokenizer(tmp_path: Path, masked: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 40, label=lambda text: "cat" if "cat" in text else "none")
    settings = adapter_settings(tmp_path, masked, train=rows)
    run = train({**settings, "keep_every": 3})
    assert run.summary["classes"] == ["cat", "none"]
    for folder in (run.result, run.folder / "step-3"):
        assert json.loads((folder / "spectra_slices.json").read_text())["id2label"] == {"0": "cat", "1": "none"}
        assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
        assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 17
    loaded = load_model(run.result, base=masked)  # whose config knows no classes
    assert loaded.config.id2label == {0: "cat", 1: "none"}
    assert run.model is not None
    shown = {"input_ids": torch.arange(5, 13).reshape(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**shown).logits, run.model.eval()(**shown).logits)


def test_label_of_the_test_alone_is_refused(tmp_path: Path) -> None:
    for name, labels in {"train": ["apple", "pear", "pear"], "test": ["pear", "banana"]}.items():
        rows = [{"text": "x", "label": label} for label in labels]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")
    with pytest.raises(SpectraError, match=r"row 2 of .*test\.jsonl has the label 'banana', which no row of .*train"):
        classes_of_column(*files, DataSettings())


def test_run_is_not_gone_on_with_on_other_data(tmp_path: Path, masked: str) -> None:
    def interrupt(step: int, steps: int, word: str) -> None:
        if step == 4:
            raise InterruptedError

    rows, test = (write_rows(tmp_path / name, 40, label=lambda text: len(text) % 2) for name in ("a.jsonl", "b.jsonl"))
    settings = adapter_settings(tmp_path, masked, train=rows, test=test)
    with pytest.raises(InterruptedError):
        train(settings, progress=interrupt)
    content = Path(test).read_text()
    Path(test).write_text(content.replace("cat", "dog"))
    with pytest.raises(SpectraError, match=r"data\.test holds other examples than those that the run in .* began with"):
        train(settings, resume=True)
    Path(test).write_text(content)
    assert {*train(settings, resume=True).summary["data_sha256"]} == {"data.train", "data.test"}

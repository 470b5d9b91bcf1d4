"""The terminal: the lines equal their definitions, nothing untrusted acts, nothing is wider than the console."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from spectra.comparison import Comparison
from spectra.report.rows import model_lines
from spectra.report.tables import inspect_table, print_comparison, to_json
from spectra.report.wording import shorten

POOLER = "bert.pooler.dense.weight"


def printed(result: Comparison, width: int = 100, colour: bool = False, top: int = 15, out: Path | None = None) -> str:
    """What a terminal of this width is sent."""
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
    )
    print_comparison(result, console, top=top, out=out)
    return stream.getvalue()


def norms_ratio(rows: pd.DataFrame) -> float:
    return float(np.sqrt((rows["update_norm"] ** 2).sum()) / np.sqrt((rows["base_norm"] ** 2).sum()))


def test_the_whole_model_line_is_its_definition(two: Comparison) -> None:
    rows = two.layers[two.layers["tuned"] == "a"]
    without, whole = (line for line in model_lines(two, "a", top=3) if line.kind == "model")
    assert whole.values["relative_update"] == pytest.approx(norms_ratio(rows), rel=1e-12)
    assert whole.values["energy_rank_90"] == rows["energy_rank_90"].median()
    assert whole.values["intruders"] == rows["intruders"].sum()
    energy = rows["update_norm"] ** 2
    turned = (rows["off_diagonal_share"] * energy).sum() / energy.sum()
    assert whole.values["off_diagonal_share"] == pytest.approx(turned, rel=1e-12)
    rest = rows[rows["name"] != POOLER]
    assert without.values["relative_update"] == pytest.approx(norms_ratio(rest), rel=1e-12)
    assert without.values["relative_update"] < whole.values["relative_update"] / 2


def test_unchanged_matrices_count_in_the_whole_model(failing: Comparison) -> None:
    tuned = failing.layers["tuned"].iloc[0]
    rows = failing.layers[failing.layers["status"] != "failed"]
    whole = [line for line in model_lines(failing, tuned, top=3) if line.kind == "model"][-1]
    known = rows[rows["base_norm"].notna()]
    assert whole.values["relative_update"] == pytest.approx(norms_ratio(known.fillna({"update_norm": 0.0})), rel=1e-12)


def test_the_strongest_come_first_and_carry_their_marks(two: Comparison, failing: Comparison) -> None:
    lines = [line for line in model_lines(two, "a", top=5) if line.kind == "matrix"]
    expected = two.layers[two.layers["tuned"] == "a"].nlargest(5, "relative_update")
    assert [line.name for line in lines] == list(expected["name"])
    assert [line.marks for line in lines] == ["*", "", "", "", ""]
    failed = [line for line in model_lines(failing, "[bold]t<b>", top=5) if line.kind == "failed"]
    assert [(line.name, line.marks) for line in failed] == [("bert.encoder.layer.1.intermediate.dense.weight", "!")]


def test_outliers_do_not_leak_into_the_line_of_their_role(two: Comparison) -> None:
    lines = {line.name.split(",")[0]: line for line in model_lines(two, "a", top=1) if line.kind == "role"}
    rows = two.layers[(two.layers["tuned"] == "a") & (two.layers["role"] == "query")]
    assert lines["query"].values["relative_update"] == pytest.approx(norms_ratio(rows), rel=1e-12)
    assert lines["pooler"].marks == "*"


@pytest.mark.parametrize("width", [30, 60, 80, 100, 140, 200])
def test_no_line_is_wider_than_the_terminal(two: Comparison, width: int) -> None:
    assert max(len(line) for line in printed(two, width).splitlines()) <= width


def test_every_column_has_its_meaning_below(two: Comparison) -> None:
    text = printed(two, 140)
    heading = next(line for line in text.splitlines() if line.strip().startswith("matrix"))
    for title in ("update", "sv x", "turn %", "out %", "K90", "kept", "intr", "stable", "eff", "cosine"):
        assert title in heading
        assert any(line.strip().startswith(title + " ") for line in text.splitlines())


def test_untrusted_names_do_not_act(failing: Comparison) -> None:
    for colour in (False, True):
        text = printed(failing, 140, colour=colour)
        assert "[red]<script>" in text
        assert "\\x1b[31m" in text  # the escape, spelt out
        assert "[bold]t<b>" in text
    assert "\x1b" not in printed(failing, 140)


def test_what_failed_and_what_is_missing_is_told(failing: Comparison) -> None:
    text = " ".join(printed(failing, 200).split())
    assert "21 matrices compared, 1 unchanged, 1 failed" in text
    assert "could not be measured" in text
    assert "gone.weight" in text
    assert "missing" in text


def test_a_terminal_without_unicode_is_served(two: Comparison) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    renamed = two.layers.assign(name=two.layers["name"].str.replace("bert", "b\u00e9\u4e16", regex=False))
    result = Comparison(renamed, two.components, two.slices, two.unmatched, {"notes": ["caf\u00e9"]})
    print_comparison(result, Console(file=stream, width=100, color_system=None))
    stream.flush()
    assert b"\\u4e16" in raw.getvalue()


def test_sparse_comparisons_are_printed(odd: Comparison) -> None:
    for width in (30, 100):
        assert "Files" in printed(odd, width)
    json.dumps(to_json(odd, 5), allow_nan=False)


def test_comparisons_with_nothing_say_so(unchanged: Comparison, all_failed: Comparison) -> None:
    assert "Nothing moved" in printed(unchanged)
    assert "could not be measured" in " ".join(printed(all_failed).split())


def test_files_are_listed_where_they_are(two: Comparison, tmp_path: Path) -> None:
    two.save(tmp_path)
    text = "".join(printed(two, 300, out=tmp_path).split("Files")[1])
    assert str(tmp_path) in text
    assert "layers.parquet" in text
    assert "--out" in printed(two).split("Files")[1]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_heading_is_not_broken_inside_its_counts(failing: Comparison, width: int) -> None:
    source = {"source": "/a/folder/with/a/long/path/to/the/models/of/somebody/else/and/a/name"}
    provenance = {**failing.provenance, "tuned": {"[bold]t<b>": source}}
    lines = printed(dataclasses.replace(failing, provenance=provenance), width).splitlines()
    (counts,) = (line for line in lines if "matrices compared" in line)
    assert counts.endswith("21 matrices compared, 1 unchanged, 1 failed")
    assert "[bold]t<b> (..." in lines[0]


def test_piped_lines_end_where_their_text_does(two: Comparison) -> None:
    text = printed(two, 100)
    assert text.splitlines() == [line.rstrip() for line in text.splitlines()]
    assert printed(two, 100, colour=True)  # a terminal gets its colours as they are


def test_a_note_of_several_models_is_printed_once(two: Comparison) -> None:
    notes = ["a: turned", "b: turned", "b: of b alone", "base: turned"]
    text = printed(dataclasses.replace(two, provenance={**two.provenance, "notes": notes})).split("Notes")[1]
    assert [line.strip(" -") for line in text.splitlines()[1:4]] == ["a, b: turned", "b: of b alone", "base: turned"]


def test_inspect_counts_the_updates_of_an_adapter() -> None:
    row = {"shape": [8, 8], "dtype": "float32", "bytes": 64, "role": "", "layer": None, "part": ""}
    rows = [{**row, "name": f"{at}.weight", "note": "low-rank update, r = 2"} for at in range(3)]
    stream = io.StringIO()
    Console(file=stream, width=120, color_system=None).print(inspect_table(rows))
    assert "3 low-rank updates" in " ".join(stream.getvalue().splitlines()[-1].split())


def test_an_interruption_is_told(two: Comparison) -> None:
    result = Comparison(two.layers, two.components, two.slices, two.unmatched, {**two.provenance, "interrupted": True})
    assert "Interrupted" in printed(result)
    assert "Interrupted" not in printed(two)


def test_json_holds_the_rows(two: Comparison) -> None:
    plain = json.loads(json.dumps(to_json(two, 2), allow_nan=False))
    strongest = plain["models"]["b"]["strongest"]
    expected = two.layers[two.layers["tuned"] == "b"].nlargest(2, "relative_update")
    assert [row["name"] for row in strongest] == list(expected["name"])
    assert [row["relative_update"] for row in strongest] == list(expected["relative_update"])
    assert plain["models"]["a"]["outliers"] == [POOLER]
    assert plain["findings"][0]["numbers"]
    assert strongest[0]["layer"] is None or isinstance(strongest[0]["layer"], int)


def test_json_knows_no_nan(all_nan: Comparison, failing: Comparison) -> None:
    assert to_json(failing, 50)["models"]["[bold]t<b>"]["status"]["failed"] == 1
    for result in (all_nan, failing):
        json.dumps(to_json(result, 50), allow_nan=False)


def test_inspect_lists_and_adds_up() -> None:
    row = {"name": "[red]q\x1b.weight", "shape": [24, 8], "dtype": "float32", "bytes": 768, "role": "query", "layer": 0}
    rows = [
        {**row, "part": "q", "note": ""},
        {**row, "part": "k", "bytes": 0, "note": ""},
        {**row, "name": "tied", "shape": None, "bytes": 0, "role": "", "layer": None, "part": "", "note": "tied to x"},
    ]
    stream = io.StringIO()
    Console(file=stream, width=120, color_system=None).print(inspect_table(rows))
    text = stream.getvalue()
    assert "[red]q\\x1b.weight[q]" in text
    assert "24 x 8" in text
    assert "768 B" in text.splitlines()[-1]
    assert "2 tensors" in text.splitlines()[-1]
    assert "2 matrices" in text.splitlines()[-1]


@pytest.mark.parametrize("width", range(6, 60, 7))
def test_short_names_fit_and_keep_their_end(width: int) -> None:
    name = "bert.encoder.layer.11.attention.self.query.weight"
    short = shorten(name, width)
    assert len(short) <= width
    assert width < 20 or short.endswith("query") or short == name
    assert width < 24 or "11" in short


def test_short_names_of_a_model_stay_distinct(real: Comparison) -> None:
    names = real.layers["name"].unique()
    assert len({shorten(name, 34) for name in names}) == len(names)

"""Sequences: rows equal single comparisons, in order and over the same matrices; scores are those of the runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import save_file

import spectra
from spectra.comparison import Comparison
from spectra.definitions import definitions
from spectra.errors import SpectraError
from spectra.report.page import write_page
from spectra.report.pictures import standard_set
from spectra.report.sequence_plots import draw_overview
from spectra.report.sequence_printing import print_sequence
from spectra.report.sequence_scores import scores_from
from spectra.report.sequence_table import COLUMNS, natural_order, steps_of
from spectra.report.wording import number, percent

TIMES = {"step-25": 0.25, "step-50": 0.5, "step-100": 1.0}
needs_training = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("accelerate", "peft")), reason="the extra `train` is not installed"
)
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    mpl.use("agg")
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def weights() -> tuple[Weights, dict[str, Weights]]:
    """W and W + t D of a real fine-tuning: some blocks and the pooler, which stands apart."""
    if find_spec("rxnfp") is None:
        pytest.skip("the package rxnfp, which carries the weights, is not installed")
    from spectra.demo import real_pair

    base, tuned = real_pair()
    W, T = spectra.open_checkpoint(base), spectra.open_checkpoint(tuned["ft"])
    names = [name for name in T if ".0." in name or ".11." in name or name.startswith("pooler")]
    names = [name for name in names if T[name].ndim == 2]
    before = {name: W[f"bert.{name}"] for name in names}
    steps = {label: {n: W0 + t * (T[n] - W0) for n, W0 in before.items()} for label, t in TIMES.items()}
    return before, steps


@pytest.fixture(scope="module")
def course(weights: tuple[Weights, dict[str, Weights]]) -> Comparison:
    scores = {"step-25": {"score": 0.4}, "step-100": {"score": 0.9, "forgetting": 0.2}}
    return spectra.compare(*weights).in_sequence(scores)


def test_rows_equal_single_comparisons_in_order(
    course: Comparison, weights: tuple[Weights, dict[str, Weights]]
) -> None:
    base, steps = weights
    table = course.sequence()
    assert table["tuned"].tolist() == list(TIMES)
    assert table["step"].tolist() == [25, 50, 100]
    for row, state in zip(table.to_dict("records"), steps.values(), strict=True):
        alone = spectra.compare(base, state).layers
        assert row["intruders"] == alone["intruders"].sum()
        assert row["matrices_with_intruders"] == (alone["intruders"] > 0).sum()
        typical = alone[~alone["name"].str.contains("pooler")]
        assert row["matrices"] == len(typical) == 12
        assert row["effective_rank"] == typical["effective_rank"].median()
        assert row["left_overlap"] == typical["left_overlap"].median()
    assert table["intruders"].is_monotonic_increasing
    assert table["intruders"].iloc[-1] > table["intruders"].iloc[0]


def test_sizes_and_shares_are_those_of_the_stacked_matrices(
    course: Comparison, weights: tuple[Weights, dict[str, Weights]]
) -> None:
    base, steps = weights
    names = [name for name in base if "pooler" not in name]
    for row, state in zip(course.sequence().to_dict("records"), steps.values(), strict=True):
        energy = on_diagonal = size = 0.0
        for name in names:
            W, D = base[name].double().numpy(), (state[name].double() - base[name].double()).numpy()
            U, _, Vt = np.linalg.svd(W, full_matrices=False)
            on_diagonal += float((np.einsum("ij,ij->j", U, D @ Vt.T) ** 2).sum())
            energy, size = energy + float((D**2).sum()), size + float((W**2).sum())
        assert row["relative_update"] == pytest.approx(math.sqrt(energy / size), rel=1e-6)
        assert row["diagonal_share"] == pytest.approx(on_diagonal / energy, abs=1e-6)
        assert row["diagonal_share"] + row["off_diagonal_share"] + row["outside_share"] == pytest.approx(1, abs=1e-6)


def test_saved_and_loaded_it_says_and_draws_the_same(course: Comparison, tmp_path: Path) -> None:
    again = spectra.load(course.save(tmp_path))
    pd.testing.assert_frame_equal(again.sequence(), course.sequence())
    assert [str(each) for each in again.diagnosis()] == [str(each) for each in course.diagnosis()]
    first, other = standard_set(course)[0], standard_set(again)[0]
    assert first.file == "00-sequence.png"
    assert first.png() == other.png()
    page = write_page(again, tmp_path).read_text(encoding="utf-8")
    assert page.count("step-25") >= 2
    assert "update" in page


def test_every_column_has_its_definition(course: Comparison) -> None:
    assert list(course.sequence()) == list(COLUMNS)
    assert set(COLUMNS) <= set(definitions())


def test_only_matrices_that_every_model_has_are_counted(weights: tuple[Weights, dict[str, Weights]]) -> None:
    base, steps = weights
    gone = next(iter(base))
    short = {**steps, "step-50": {name: W for name, W in steps["step-50"].items() if name != gone}}
    table = spectra.compare(base, short).sequence()
    assert table["matrices"].tolist() == [11, 11, 11]
    rest = {name: W for name, W in base.items() if name != gone}
    pd.testing.assert_frame_equal(table, spectra.compare(rest, steps).sequence())


def test_a_model_that_did_not_move_is_a_row_of_nothing(weights: tuple[Weights, dict[str, Weights]]) -> None:
    base, steps = weights
    table = spectra.compare(base, {"0": {n: W.clone() for n, W in base.items()}, "1": steps["step-100"]}).sequence()
    assert table["relative_update"].tolist()[0] == 0
    assert table["intruders"].tolist()[0] == 0
    assert np.isnan(table["off_diagonal_share"].iloc[0])


def test_one_model_is_no_sequence() -> None:
    single = spectra.demo.small_comparison()
    for call in (single.sequence, single.in_sequence, single.plot.sequence):
        with pytest.raises(SpectraError, match="at least two"):
            call()


def test_sentences_hold_their_numbers(course: Comparison) -> None:
    findings = [each for each in course.diagnosis() if each.tuned not in TIMES]
    assert len(findings) == 7
    for finding in findings:
        for name, value in finding.numbers.items():
            assert not isinstance(value, str)
            written = {number(value), number(float(value), 2), percent(float(value))}
            assert any(each in finding.text for each in written), (name, finding.text)
    text = " ".join(map(str, findings))
    first, last = (int(course.sequence()["intruders"].iloc[at]) for at in (0, -1))
    assert f"Intruders rise from {first} at step-25 to {last} at step-100" in text
    assert "score on the new task rises from 0.400 at step-25 to 0.900 at step-100" in text
    assert "forgetting" not in text


def test_a_course_that_turns_says_so(weights: tuple[Weights, dict[str, Weights]]) -> None:
    base, steps = weights
    there_and_back = {"a": steps["step-25"], "b": steps["step-100"], "c": steps["step-50"]}
    result = spectra.compare(base, there_and_back).in_sequence({})
    most = int(result.sequence()["intruders"].iloc[1])
    (said,) = (str(each) for each in result.diagnosis() if str(each).startswith("Intruders"))
    assert f"with {most} at the most, at b" in said


def test_declaring_an_order_takes_the_place_of_ranking_the_models(course: Comparison) -> None:
    assert not any("moved furthest" in str(each) for each in course.diagnosis())
    undeclared = dataclasses.replace(course, provenance={})
    assert any("moved furthest" in str(each) for each in undeclared.diagnosis())


@pytest.mark.parametrize("quantity", ["intruders", "relative_update", "rotation", "effective_rank", "score"])
def test_lines_are_columns_against_steps(course: Comparison, quantity: str) -> None:
    given = Figure(figsize=(3.4, 2.6), layout="constrained").add_subplot()
    ax = course.plot.sequence(quantity, ax=given)
    assert ax is given
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [25, 50, 100])
    expected = course.sequence()[quantity].to_numpy(dtype=float, na_value=np.nan)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), expected)
    assert ax.get_xlabel() == "step"
    assert ax.get_ylabel()


def test_several_measures_share_one_picture(course: Comparison) -> None:
    table = course.sequence()
    overlap = course.plot.sequence("overlap")
    np.testing.assert_array_equal(overlap.lines[1].get_ydata(), table["right_overlap"])
    energy = course.plot.sequence("energy")
    top = [area.get_paths()[0].vertices[:, 1].max() for area in energy.collections]
    assert top[0] == pytest.approx(table["diagonal_share"].max())
    assert top[-1] == pytest.approx(1, abs=1e-5)
    assert [line.get_label() for line in course.plot.sequence("scores").lines] == [
        "score on the new task", "forgetting",
    ]  # fmt: skip


def test_tasks_without_numbers_stand_side_by_side(weights: tuple[Weights, dict[str, Weights]]) -> None:
    base, steps = weights
    ax = spectra.compare(base, dict(zip(("mail", "$digits_"), steps.values(), strict=False))).plot.sequence()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["mail", r"\$digits_"]
    ax.figure.canvas.draw()


def test_unknown_measures_and_missing_scores_are_refused(course: Comparison) -> None:
    with pytest.raises(SpectraError, match="intruders"):
        course.plot.sequence("intruder")
    bare = dataclasses.replace(course, provenance={})
    with pytest.raises(SpectraError, match="in_sequence"):
        bare.plot.sequence("forgetting")
    with pytest.raises(SpectraError, match="'step-7' is none"):
        bare.in_sequence({"step-7": {"score": 1.0}})
    with pytest.raises(SpectraError, match="'accuracy'"):
        bare.in_sequence({"step-50": {"accuracy": 1.0}})
    for scores, words in (
        ({"step-50": {"score": "good"}}, "the scores: the score of 'step-50' is 'good', which is no number"),
        ({"step-50": {"forgetting": math.inf}}, "'inf', which is no number"),
        ({"step-50": {"score": [1]}}, "no number"),
        ({"step-50": 3}, "of 'step-50' give"),
        (3, "give label -> "),
    ):
        with pytest.raises(SpectraError, match=words):
            bare.in_sequence(scores)  # type: ignore[arg-type]
    gaps = bare.in_sequence({"step-50": {"score": None, "forgetting": math.nan}, "step-25": {"score": 1}})  # type: ignore[dict-item]
    assert gaps.sequence()["score"].isna().tolist() == [False, True, True]
    assert gaps.sequence()["forgetting"].isna().all()


def test_a_model_given_twice_keeps_the_number_of_its_step(
    weights: tuple[Weights, dict[str, Weights]], tmp_path: Path
) -> None:
    base, steps = weights
    name = next(iter(base))
    for label, state in {"base": base, **steps}.items():
        save_file({name: state[name].contiguous()}, tmp_path / f"{label}.safetensors")
    paths = [tmp_path / f"step-{number}.safetensors" for number in (25, 25, 100)]
    table = spectra.compare(tmp_path / "base.safetensors", paths).sequence()
    assert table["tuned"].tolist() == ["step-25", "step-25 (2)", "step-100"]
    assert table["step"].tolist() == [25, 25, 100]


def test_rotation_is_in_the_table_the_picture_and_the_sentences(
    course: Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    print_sequence(course, Console(width=120))
    heading, first, *_ = capsys.readouterr().out.splitlines()[1:]
    values = dict(zip(heading.split()[heading.split().index("rot") :], first.split()[-6:], strict=False))
    rotation = course.sequence()["rotation"]
    assert values["rot"] == number(rotation.iloc[0], 2)
    (said,) = (str(each) for each in course.diagnosis() if "first-order angle" in str(each))
    assert f"rises from {number(rotation.iloc[0])} at step-25 to {number(rotation.iloc[-1])}" in said
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    draw_overview(course, figure)
    drawn = [ax.get_title(loc="left").split(":")[0] for ax in figure.axes]
    assert {"Intruders", "Rotation", "Forgetting", "Energy of turned directions"} <= set(drawn)


def test_an_order_of_letters_becomes_one_of_numbers_and_any_other_stays() -> None:
    letters = ["step-100", "step-1000", "step-50"]
    order, said = natural_order(letters, letters)
    assert [letters[at] for at in order] == ["step-50", "step-100", "step-1000"]
    assert "step-50, step-100, step-1000" in said
    meant = ["task-2", "task-3", "task-1"]
    assert natural_order(meant, meant)[0] == [0, 1, 2]
    assert "order given" in natural_order(meant, meant)[1]
    for silent in (["step-5", "step-10"], ["cifar10", "mnist28"], ["a", "b"]):
        assert natural_order(silent, silent) == ([0, 1], "")
    assert steps_of(["epoch=0-step=9", "epoch=1-step=18"]) == [9, 18]


def test_a_table_of_scores_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("label, score, forgetting, note\n50, 0.5, , x\n100, 0.75, 0.125, y\n")
    assert scores_from(file, ["50", "100", "200"]) == {
        "50": {"score": 0.5},
        "100": {"score": 0.75, "forgetting": 0.125},
    }
    for text, words in {
        "label,points\na,1\n": "label, points",
        "label,score\na,1\na,2\n": "'a' twice",
        "label,score\nb,1\n": "scores.csv: 'b' is none of the models compared: 'a', 'c'",
        "label,score\na,good\n": "'good', which is no number",
        "label,score\na,inf\n": "'inf', which is no number",
        "": "no CSV table",
    }.items():
        file.write_text(text)
        with pytest.raises(SpectraError, match=words):
            scores_from(file, ["a", "c"])
    with pytest.raises(SpectraError, match="cannot be read"):
        scores_from(tmp_path / "none.csv", ["a"])


@needs_training
def test_scores_are_those_of_the_runs_beside_the_checkpoints(tmp_path: Path) -> None:
    from tests.training.small import make_base, run_small

    runs = {
        f"step-{steps}": run_small(tmp_path / f"step-{steps}", {"optimiser": {"steps": steps, "schedule": "constant"}})
        for steps in (2, 8)
    }
    base = {f"body.{name}": value for name, value in make_base().state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    result = spectra.compare(tmp_path / "base.safetensors", [run.result for run in runs.values()]).in_sequence()
    table = result.sequence()
    assert table["tuned"].tolist() == list(runs)
    for row, run in zip(table.to_dict("records"), runs.values(), strict=True):
        assert row["score"] == run.summary["score"]
        assert row["forgetting"] == run.summary["forgetting"]
    assert table["relative_update"].is_monotonic_increasing
    assert any("summary.json" in note for note in result.provenance["notes"])


@needs_training
def test_steps_saved_in_the_folder_of_a_run_have_the_scores_of_its_journal(tmp_path: Path) -> None:
    from tests.training.small import make_base, run_small

    run = run_small(tmp_path / "run", {"evaluate_every": 4})
    base = make_base().state_dict()
    for at, step in enumerate((4, 12), start=1):
        tensors = {name: value + 0.01 * at * torch.ones_like(value) for name, value in base.items()}
        save_file(tensors, run.folder / f"step-{step}.safetensors")
    paths = [run.folder / f"step-{step}.safetensors" for step in (4, 12)]
    table = spectra.compare(base, paths).in_sequence().sequence()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    scores = {(line["split"], line["step"]): line.get("score") for line in lines}
    assert table["score"].tolist() == [scores["test", 4], scores["test", 12]]
    lost = [scores["old", 0] - scores["old", step] for step in (4, 12)]
    assert table["forgetting"].tolist() == lost


@needs_training
def test_tasks_learnt_in_turn_have_the_scores_of_their_stages(tmp_path: Path) -> None:
    from spectra.training import continual
    from tests.training.small import make_base, new_task, old_task

    settings = {"method": {"name": "slice", "rank": 4, "position": 0.5}, "optimiser": {"steps": 6, "batch_size": 16}}
    tasks = {"first": new_task, "second": new_task}
    found = continual(settings, tasks, out=tmp_path, base=make_base(), retain={"old": old_task})
    paths = [tmp_path / f"{number}-{name}" / "body.safetensors" for number, name in enumerate(tasks, start=1)]
    table = spectra.compare(make_base(), paths).in_sequence().sequence()
    assert table["tuned"].tolist() == ["1-first", "2-second"]
    assert table["forgetting"].tolist() == pytest.approx(found.summary["retained_forgetting"].tolist())
    rows = found.evaluations
    assert table["score"].tolist() == [
        rows[(rows["stage"] == stage) & (rows["task"] == name)]["score"].item()
        for stage, name in enumerate(tasks, start=1)
    ]

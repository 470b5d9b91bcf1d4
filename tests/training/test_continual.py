"""Sequences of tasks: the measures against numbers by hand, the merged body, and stopping and going on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import spectra
from spectra.errors import SpectraError
from spectra.lora import load_adapter
from spectra.lora.record import adapted_layers
from spectra.training import Continual, Task, TensorExamples, continual, load_continual
from spectra.training.continual_result import NEW, RETAINED, summarise
from tests.training.small import Base, WithNewHead, inputs, make_base, old_task

SETTINGS: dict[str, Any] = {
    "method": {"name": "slice", "rank": 4, "position": 0.0},
    "optimiser": {"steps": 25, "learning_rate": 3e-2, "batch_size": 16},
}


class Which:
    """The task of telling which of three random directions, drawn from a seed, is the largest."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, base: nn.Module) -> Task:
        assert isinstance(base, Base)
        x = inputs()
        labels = (x @ torch.randn(12, 3, generator=torch.Generator().manual_seed(self.seed))).argmax(1)
        train, test = (TensorExamples({"x": x[part], "labels": labels[part]}) for part in (slice(90), slice(90, None)))
        return Task(WithNewHead(base), train=train, test=test, head=("head",))


TASKS = {"first": Which(4), "second": Which(5), "third": Which(6)}


def learn(out: Path, settings: dict[str, Any] | None = None, **options: Any) -> Continual:
    given: dict[str, Any] = {"tasks": TASKS, "base": make_base(), "retain": {"old": old_task}, **options}
    return continual({**SETTINGS, **(settings or {})}, given.pop("tasks"), out=out, **given)


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Continual]:
    out = tmp_path_factory.mktemp("continual") / "out"
    return out, learn(out)


def test_measures_are_those_computed_by_hand() -> None:
    R = {1: [0.9], 2: [0.6, 0.8], 3: [0.7, 0.5, 1.0]}
    tasks = ["a", "b", "c"]
    rows = [(0, None, "own", RETAINED, 0.95)]
    for stage, scores in R.items():
        rows += [(stage, tasks[stage - 1], task, NEW, score) for task, score in zip(tasks, scores, strict=False)]
        rows.append((stage, tasks[stage - 1], "own", RETAINED, 0.95 - 0.1 * stage))
    table = summarise(pd.DataFrame(rows, columns=["stage", "learnt", "task", "kind", "score"])).set_index("stage")
    assert table["average_score"].tolist() == pytest.approx([0.9, 0.7, 2.2 / 3])
    # Stage 3: ((0.7 - 0.9) + (0.5 - 0.8)) / 2; the best of "a" before stage 3 is 0.9, of "b" 0.8.
    assert table["backward_transfer"].tolist()[1:] == pytest.approx([-0.3, -0.25])
    assert table["average_forgetting"].tolist()[1:] == pytest.approx([0.3, 0.25])
    assert table["retained_forgetting"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert table.loc[1, ["backward_transfer", "average_forgetting"]].isna().all()


def test_forgetting_is_from_the_best_score_and_transfer_from_the_first() -> None:
    """A task that gained at stage 2 and lost at stage 3: the two measures differ."""
    scores = {1: 0.5, 2: 0.9, 3: 0.6}
    rows = [(stage, f"t{stage}", "t1", NEW, score) for stage, score in scores.items()]
    rows += [(2, "t2", "t2", NEW, 1.0), (3, "t3", "t2", NEW, 1.0), (3, "t3", "t3", NEW, 1.0)]
    last = summarise(pd.DataFrame(rows, columns=["stage", "learnt", "task", "kind", "score"])).iloc[-1]
    assert last["backward_transfer"] == pytest.approx(0.1 / 2)
    assert last["average_forgetting"] == pytest.approx(0.3 / 2)


def test_after_every_stage_all_tasks_so_far_are_scored(sequence: tuple[Path, Continual]) -> None:
    _, result = sequence
    missing = result.scores[["first", "second", "third"]].isna()
    assert missing.to_numpy().tolist() == [[True] * 3, [False, True, True], [False, False, True], [False] * 3]
    assert result.scores["old"].notna().all() and result.scores.loc[0, "old"] == 1
    assert list(result.summary["learnt"]) == list(TASKS)


def test_a_task_scores_on_the_merged_body_what_its_run_said(sequence: tuple[Path, Continual]) -> None:
    from spectra.training import load_run

    out, result = sequence
    for stage, name in enumerate(TASKS, 1):
        summary = load_run(out / f"{stage}-{name}" / "run").summary
        assert result.scores.loc[stage, name] == summary["score"]
        assert summary["score"] > summary["score_before"]  # it learns, so that the tests below have something to see


def test_the_body_of_a_stage_is_the_base_plus_the_sum_of_all_updates(sequence: tuple[Path, Continual]) -> None:
    """Updates from the saved adapters, summed in float64 on the first base."""
    out, _ = sequence
    base = make_base()
    total = {name: value.detach().double() for name, value in base.state_dict().items()}
    body = make_base()
    for stage, (name, make) in enumerate(TASKS.items(), 1):
        folder = out / f"{stage}-{name}"
        adapted = load_adapter(make(body).model, folder / "run" / "adapter")
        for module, layer in adapted_layers(adapted).items():
            D = layer.update()
            total[f"{module.removeprefix('body.')}.weight"] += D.c * D.B.double() @ D.A.double()
        found = load_file(folder / "body.safetensors")
        assert found.keys() == total.keys()
        for tensor, expected in total.items():
            torch.testing.assert_close(found[tensor].double(), expected, rtol=0, atol=1e-6)
        body = make_base()
        body.load_state_dict(found, strict=False)
    assert float((total["fc1.weight"] - base.fc1.weight.detach()).norm()) > 0.1


def test_drift_is_that_of_compare_with_the_first_base(sequence: tuple[Path, Continual]) -> None:
    out, result = sequence
    assert result.drift["relative_update"].is_monotonic_increasing
    body = load_file(out / "3-third" / "body.safetensors")
    base: dict[str, Tensor] = make_base().state_dict()
    matrices = [name for name in base if name.endswith("weight")]
    W, D = (
        torch.cat([value.double().flatten() for value in values])
        for values in ([base[name] for name in matrices], [body[name] - base[name] for name in matrices])
    )
    assert set(spectra.load(out / "3-third" / "comparison").layers["name"]) == set(matrices)
    assert result.drift["relative_update"].iloc[-1] == pytest.approx(float(D.norm() / W.norm()), rel=1e-5)


def test_stopped_half_way_and_gone_on_with_equals_one_that_was_not(
    sequence: tuple[Path, Continual], tmp_path: Path
) -> None:
    whole_folder, whole = sequence

    class Stop(Exception):
        pass

    calls = 0

    def crash(done: int, total: int, word: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 40:  # in the midst of the second task
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        learn(out, progress=crash)
    assert load_continual(out).scores.index.tolist() == [0, 1]
    resumed = learn(out)
    pd.testing.assert_frame_equal(resumed.evaluations, whole.evaluations, check_exact=True)
    pd.testing.assert_frame_equal(resumed.drift, whole.drift, check_exact=True)
    pd.testing.assert_frame_equal(load_continual(out).evaluations, whole.evaluations, check_exact=True)
    for stage in ("1-first", "2-second", "3-third"):
        one, other = (load_file(folder / stage / "body.safetensors") for folder in (out, whole_folder))
        assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def on_disk(out: Path) -> dict[Path, bytes]:
    """All files of a sequence but its base's spectra."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if "spectra" not in path.relative_to(out).parts}


def test_a_sequence_may_grow_and_not_change(tmp_path: Path) -> None:
    """What is refused, in whatever way, leaves everything as it was."""
    out = tmp_path / "out"
    learn(out, tasks={"first": TASKS["first"]})
    two = {"first": TASKS["first"], "second": TASKS["second"]}
    grown = learn(out, tasks=two)
    assert list(grown.drift["learnt"]) == ["first", "second"]
    before = on_disk(out)
    with pytest.raises(SpectraError, match=r"holds this task learnt with other settings \(seed"):
        learn(out, {"seed": 1})
    other = make_base()
    other.fc1.weight.data[0, 0] += 1
    with pytest.raises(SpectraError, match="another base"):
        learn(out, base=other)
    with pytest.raises(SpectraError, match="already"):
        learn(out, resume=False)
    other_sequence = {"third": TASKS["third"], "second": TASKS["second"]}
    with pytest.raises(
        SpectraError, match=r"1-first is finished and not among .* that are finished \(1-first, 2-second"
    ):
        learn(out, tasks=other_sequence)
    with pytest.raises(SpectraError, match="2-second is finished and not among the tasks that are asked for now"):
        learn(out, tasks={"first": TASKS["first"]})
    for retain, words in (({}, "'old', and now none"), ({"new": old_task}, "'old', and now 'new'")):
        with pytest.raises(SpectraError, match=f"1-first was made with {words} is given; retain the same"):
            learn(out, tasks=TASKS, retain=retain)
    assert on_disk(out) == before
    shutil.move(out / "1-first", tmp_path / "1-first")
    with pytest.raises(SpectraError, match=r"2-second is finished, and .*1-first before it is not; remove"):
        learn(out, tasks=two)
    learn(tmp_path / "other", tasks={"first": TASKS["third"]})
    shutil.move(tmp_path / "other" / "1-first", out / "1-first")
    with pytest.raises(SpectraError, match="2-second holds this task learnt after other tasks"):
        learn(out, tasks=two)
    assert load_continual(out).scores.index.tolist() == [0, 1, 2]
    # Had it been killed between the body of a stage and its numbers, the body would be that of the other tasks.
    shutil.rmtree(out / "1-first")
    (out / "2-second" / "stage.json").unlink()
    went_on = learn(out, tasks=other_sequence)
    alone = learn(tmp_path / "alone", tasks=other_sequence)
    pd.testing.assert_frame_equal(went_on.evaluations, alone.evaluations, check_exact=True)


def test_a_task_that_is_begun_is_gone_on_with_or_left_as_it_is(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def crash(done: int, total: int, word: str) -> None:
        if done == 9:
            raise Stop

    with pytest.raises(Stop):
        learn(tmp_path / "out", tasks={"first": TASKS["first"]}, progress=crash)
    before = on_disk(tmp_path / "out")
    with pytest.raises(
        SpectraError, match=r"1-first holds this task begun with other settings \(seed\); choose another"
    ):
        learn(tmp_path / "out", {"seed": 1}, tasks={"first": TASKS["first"]})
    assert on_disk(tmp_path / "out") == before


def test_a_folder_of_an_older_version_is_refused_in_a_sentence(tmp_path: Path) -> None:
    out, one = tmp_path / "out", {"first": TASKS["first"]}
    learn(out, {"optimiser": {"steps": 1}}, tasks=one)
    for file, key in ((out / "1-first" / "stage.json", "body_sha256"), (out / "continual.json", "base_sha256")):
        values = json.loads(file.read_text())
        del values[key]
        file.write_text(json.dumps(values))
        with pytest.raises(SpectraError, match="of an older version of spectra, which did not keep with which"):
            learn(out, {"optimiser": {"steps": 1}}, tasks=one)


def write_base(folder: Path) -> str:
    """A small model for masked tokens, with its tokenizer."""
    from tests.training.test_files import SMALL, save_tokenizer, transformers

    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def test_examples_that_changed_since_are_refused(tmp_path: Path) -> None:
    """Those of a finished task, of what is retained, and of a run whose stage is not finished."""
    from tests.training.test_files import write_rows

    def labelled(name: str, letter: str) -> str:
        return write_rows(tmp_path / name, 20, label=lambda text: "yes" if letter in text else "no")

    settings = {
        "model": {"source": write_base(tmp_path / "base")},
        "retain": {"test": write_rows(tmp_path / "old.jsonl", 8)},
        "method": {"name": "slice", "rank": 2, "position": 0.5},
        "optimiser": {"steps": 1, "batch_size": 8},
    }
    tasks = {
        "cats": {"data": {"train": labelled("a.jsonl", "c")}},
        "dogs": {"data": {"train": labelled("b.jsonl", "d")}},
    }
    out = tmp_path / "out"
    first = continual(settings, {"cats": tasks["cats"]}, out=out)
    before = on_disk(out)
    begun_with = "holds other examples than those that .*1-cats was"
    for file, words in (("a.jsonl", f"data.train {begun_with}"), ("old.jsonl", f"retain.test {begun_with}")):
        kept = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(b"\n".join(reversed(kept.splitlines())) + b"\n")
        with pytest.raises(SpectraError, match=words):
            continual(settings, tasks, out=out)
        (tmp_path / file).write_bytes(kept)
    assert on_disk(out) == before
    both = continual(settings, tasks, out=out)
    pd.testing.assert_frame_equal(both.evaluations.head(len(first.evaluations)), first.evaluations, check_exact=True)
    # Killed after the end of the second run, and before its stage's.
    (out / "2-dogs" / "stage.json").unlink()
    again = continual(settings, tasks, out=out)
    pd.testing.assert_frame_equal(again.evaluations, both.evaluations, check_exact=True)
    (out / "2-dogs" / "stage.json").unlink()
    labelled("b.jsonl", "e")
    with pytest.raises(SpectraError, match=r"data\.train holds other examples than those that .*2-dogs/run was"):
        continual(settings, tasks, out=out)
    stage = out / "1-cats" / "stage.json"
    values = json.loads(stage.read_text())
    del values["data_sha256"]
    stage.write_text(json.dumps(values))
    with pytest.raises(SpectraError, match=r"1-cats is of an older version .* whether data\.train and retain\.test"):
        continual(settings, tasks, out=out)


def test_full_fine_tuning_hands_on_its_weights_and_leaves_the_old_head(tmp_path: Path) -> None:
    result = learn(tmp_path / "out", {"method": {"name": "full"}}, tasks={"first": TASKS["first"]})
    from spectra.training import load_run

    assert result.scores.loc[1, "first"] == load_run(tmp_path / "out" / "1-first" / "run").summary["score"]
    body = load_file(tmp_path / "out" / "1-first" / "body.safetensors")
    assert not torch.equal(body["fc1.bias"], make_base().fc1.bias)
    assert torch.equal(body["classifier.weight"], make_base().classifier.weight)


def test_names_and_tasks_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(SpectraError, match="no tasks"):
        learn(tmp_path / "out", tasks={})
    with pytest.raises(SpectraError, match="letters, digits"):
        learn(tmp_path / "out", tasks={"a/b": TASKS["first"]})
    with pytest.raises(SpectraError, match="'old' names a task of the sequence and one of the base's own"):
        learn(tmp_path / "out", tasks={"first": TASKS["first"], "old": TASKS["second"]})
    with pytest.raises(SpectraError, match="'retain' names a task"):  # which the settings' own is called
        own = {"kind": "custom", "factory": "tests.training.small:old_task"}
        learn(tmp_path / "out", {"retain": own}, tasks={"retain": TASKS["first"]}, retain=None)
    with pytest.raises(SpectraError, match="leave shard out"):
        learn(tmp_path / "out", {"shard": True})
    assert not (tmp_path / "out").exists()


def test_pictures_are_drawn_from_the_saved_tables(sequence: tuple[Path, Continual]) -> None:
    result = load_continual(sequence[0])
    ax = result.plot.scores()
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in ax.get_lines()}
    assert drawn["second"] == result.scores["second"].dropna().tolist()
    assert "old (the base's own)" in drawn
    (line,) = result.plot.drift("left_overlap").get_lines()
    assert list(line.get_ydata()) == result.drift["left_overlap"].tolist()
    ax = result.plot.drift()
    assert list(ax.get_lines()[0].get_xdata()) == [0, 1, 2, 3]
    assert list(ax.get_lines()[0].get_ydata()) == [0, *result.drift["relative_update"]]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["base", "1: first", "2: second", "3: third"]
    first, *_ = result.plot.drift("left_overlap").get_xticklabels()
    assert first.get_text() == "1: first"
    with pytest.raises(SpectraError, match="left_overlap"):
        result.plot.drift("left_overlp")


def test_another_folder_among_the_settings_is_refused(tmp_path: Path) -> None:
    from spectra_cli.app import app
    from typer.testing import CliRunner

    (tmp_path / "tasks.toml").write_text("[tasks.one]\nseed = 1\n")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["continual", str(tmp_path / "tasks.toml"), "--out", str(out), "--set", "out=x"])
    assert isinstance(done.exception, SpectraError), done.output
    assert "every task has a folder in --out; leave it out" in str(done.exception)

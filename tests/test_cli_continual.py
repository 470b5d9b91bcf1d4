"""`spectra continual`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from spectra_cli.app import app
from typer.testing import CliRunner, Result

from spectra.errors import SpectraError
from spectra.training import load_continual

pytest.importorskip("accelerate")
pytest.importorskip("peft")

MODULE = """
from tests.training.small import make_base, old_task
from tests.training.test_continual import Which

def one(base): return Which(4)(base)
def two(base): return Which(5)(base)
"""
CONFIG = """
[model]
factory = "made_for_sequences:make_base"
[task]
kind = "custom"
[retain]
kind = "custom"
factory = "made_for_sequences:old_task"
[method]
rank = 4
position = 0.0
[optimiser]
steps = 20
learning_rate = 3e-2
batch_size = 16
[tasks.zebra.task]
factory = "made_for_sequences:one"
[tasks.ant]
seed = 3
task = {factory = "made_for_sequences:two"}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "made_for_sequences.py").write_text(MODULE)
    (tmp_path / "tasks.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "tasks.toml"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["continual", *map(str, arguments)], env={"COLUMNS": "120"})


def test_tasks_are_learnt_in_the_order_of_the_file(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(config, "--out", out, "--set", "optimiser.steps=10")
    assert done.exit_code == 0, done.output
    result = load_continual(out)
    assert result.drift["learnt"].tolist() == ["zebra", "ant"]
    assert result.provenance["settings"]["optimiser"]["steps"] == 10
    assert json.loads((out / "2-ant" / "run" / "settings.json").read_text())["seed"] == 3
    (last,) = [line.split() for line in done.output.splitlines() if line.split()[1:2] == ["ant"]]
    summary = result.summary.iloc[-1]
    columns = ["average_score", "backward_transfer", "average_forgetting", "retained_forgetting"]
    assert [float(cell) for cell in last[2:6]] == pytest.approx([summary[name] for name in columns], abs=6e-4)
    assert last[7] == str(result.drift["intruders"].iloc[-1])
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == ["drift.png", "scores.png"]
    for picture in pictures:
        (out / picture).unlink()
    again = run("--plot", "--out", out, "--json")
    assert again.exit_code == 0, again.output
    rows = json.loads(again.stdout)
    assert [row["average_score"] for row in rows["summary"]] == pytest.approx(result.summary["average_score"].tolist())
    assert len(rows["evaluations"]) == len(result.evaluations) == 3 + 3
    assert len(list(out.glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tasks.toml"], "give --out"),
        (["--out", "out"], "no tasks were given"),
        (["--plot", "--out", "."], "holds no saved"),
        (["none.toml", "--out", "out"], "cannot be read"),
        (["tasks.toml", "--out", "out", "--set", "optimiser.step=2"], "did you mean"),
    ],
)
def test_mistakes_are_sentences(config: Path, arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, SpectraError), done.output  # which `main` prints, with exit status 2
    assert words in str(done.exception)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("", "names no tasks"),
        ("tasks = 3", "names no tasks"),
        ("[tasks]\nmail = 3", "tasks.mail = 3, which must be a table"),
        ("[tasks.mail]\nsteps = 3", "steps, which is no setting of the top level"),
        ("[tasks.mail]\nmodel = {source = 'elsewhere'}", "'mail' has its own model"),
        ("[tasks.mail]\nout = 'elsewhere'", "'mail' has its own out"),
        ("[tasks.'a/b']\nseed = 3", "letters, digits, dots and dashes"),
    ],
)
def test_files_that_will_not_do(config: Path, tasks: str, words: str) -> None:
    shared = CONFIG.partition("[tasks")[0]
    config.write_text(f"{tasks}\n{shared}" if tasks.startswith("tasks") else f"{shared}\n{tasks}")
    done = run(config, "--out", "out")
    assert isinstance(done.exception, SpectraError), done.output
    assert words in str(done.exception)
    assert not Path("out").exists()

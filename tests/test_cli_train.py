"""`spectra train` as its user meets it: real processes on factories in the current folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

COMMAND = shutil.which("spectra", path=str(Path(sys.executable).parent))
pytestmark = [
    pytest.mark.skipif(COMMAND is None, reason="the command `spectra` is not beside this interpreter"),
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("accelerate", "peft")), reason="the extra `train` is not installed"
    ),
]

MODULE = """
import time
import torch
from torch import nn
from spectra.training import Task

class Network(nn.Sequential):
    pass

def build():
    torch.manual_seed(0)
    return Network(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))

def columns(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=generator)
    return {"input": x, "labels": (x @ torch.randn(8, classes, generator=generator)).argmax(1)}

def new(base):
    data = columns(1, 3)
    return Task(nn.Sequential(*list(base)[:4], nn.Linear(12, 3)), train=data, test=data, head=("4",))

def old(base):
    data = columns(2, 4)
    with torch.no_grad():
        return Task(base, test={**data, "labels": build()(data["input"]).argmax(1)})

class Slow(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input):
        time.sleep(0.05)
        return self.inner(input)

def slow(base):
    data = columns(1, 3)
    model = Slow(nn.Sequential(*list(base)[:4], nn.Linear(12, 3)))
    return Task(model, train=data, test=data, head=("inner.4",))

def failing(base):
    raise ValueError("the moon is full")
"""
CONFIG = """
out = "run"
[model]
factory = "network:build"
[task]
kind = "custom"
factory = "network:new"
[retain]
kind = "custom"
factory = "network:old"
[method]
name = "slice"
rank = 2
position = 0.5
[optimiser]
steps = 6
learning_rate = 0.01
batch_size = 16
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "network.py").write_text(MODULE)
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    assert COMMAND is not None
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [COMMAND, "train", *arguments], cwd=folder, stdout=pipe, stderr=pipe, text=True, env=environment
    )


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command's own `main`, in this process: exit status, stdout and stderr."""
    from spectra_cli.app import main

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "network", raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spectra", "train", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, error = capsys.readouterr()
        return int(end.value.code or 0), out, error

    return command


def test_run_from_a_file_says_what_was_learnt_and_where_things_lie(folder: Path, run: Run) -> None:
    process = start(folder, "run.toml", "--set", "evaluate_every=3")
    out, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert "slice: 6 steps" in out
    summary = json.loads((folder / "run" / "summary.json").read_text())
    for word in ("retained", "1.0000", f"{summary['score'] - summary['score_before']:+.4f}", "run/adapter"):
        assert word in out
    files = {path.name for path in (folder / "run").iterdir()}
    assert files == {"adapter", "comparison", "metrics.jsonl", "settings.json", "summary.json"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        file.name for file in (folder / "run/adapter").iterdir()
    }
    status, out, error = run("run.toml", "--set", "evaluate_every=3", "--resume", "--json")
    assert (status, error) == (0, "")
    shown = json.loads(out)
    assert shown == {"folder": "run", **summary}


def test_flags_come_before_the_file_and_set_before_both(folder: Path, run: Run) -> None:
    arguments = ["--method", "head", "--steps", "3", "--seed", "4", "--out", "other", "--quiet"]
    status, out, error = run("run.toml", *arguments, "--set", "seed=5", "--set", "compare=false")
    assert (status, out, error) == (0, "", "")
    settings = json.loads((folder / "other" / "settings.json").read_text())
    assert (settings["method"]["name"], settings["method"]["position"]) == ("head", None)
    assert (settings["optimiser"]["steps"], settings["seed"], settings["compare"]) == (3, 5, False)
    assert not (folder / "other" / "comparison").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "optimiser.learning_rat=1"], ["optimiser.learning_rat", "did you mean learning_rate?"]),
        (["--set", "steps"], ["write key=value"]),
        (["--method", "slise"], ["'slise' is no method; did you mean slice?"]),
        (["--method", "peft:nonsense"], ["nonsense"]),
        (["--set", "task.factory=network:gone"], ["the module 'network' has no 'gone'"]),
        (["--set", "task.factory=network:failing"], ["network:failing failed: ValueError: the moon is full"]),
        (["--set", "method.rank=99"], ["rank"]),
        (["--device", "cuda:99"], ["'cuda:99', which this machine does not have"]),
        (["--device", "gpu"], ["'gpu'; give auto, cpu"]),
        (["--out", "network.py"], ["cannot write into network.py"]),
    ],
)
def test_mistakes_are_one_sentence(run: Run, arguments: list[str], words: list[str]) -> None:
    status, out, error = run("run.toml", *arguments)
    assert (status, out) == (2, ""), error
    assert len(error.strip().splitlines()) == 1, error
    assert all(word in error for word in words), error


def test_flags_of_what_is_done_every_so_often_and_notes(folder: Path, run: Run) -> None:
    often = ["--evaluate-every", "2", "--save-every", "4", "--keep-every", "3"]
    status, out, error = run("run.toml", *often, "--set", "compare=false", "--set", "method.targets=all-linear")
    assert (status, error) == (0, "")
    assert out.count("note: adapting all linear layers") == 1
    settings = json.loads((folder / "run" / "settings.json").read_text())
    assert [settings[f"{what}_every"] for what in ("evaluate", "save", "keep")] == [2, 4, 3]
    assert {path.name for path in (folder / "run").glob("step-*")} == {"step-3", "step-6"}


def test_only_the_first_of_several_processes_reports(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for more in ([], ["--resume", "--json"]):
        assert run("run.toml", "--steps", "1", "--set", "compare=false", *more) == (0, "", "")


def test_other_settings_do_not_overwrite_a_run(folder: Path, run: Run) -> None:
    assert run("run.toml", "--quiet")[0] == 0
    status, _, error = run("run.toml", "--steps", "7")
    assert status == 2
    assert "other settings (optimiser.steps)" in error and "--force" in error
    assert run("run.toml", "--steps", "7", "--force", "--quiet")[0] == 0
    assert json.loads((folder / "run" / "summary.json").read_text())["steps"] == 7


def test_ctrl_c_and_resume(folder: Path, run: Run) -> None:
    arguments = ["run.toml", "--steps", "200", "--set", "task.factory=network:slow", "--set", "compare=false"]
    process = start(folder, *arguments)
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert out == ""
    assert "interrupted after step" in error and "--resume" in error
    assert len(error.strip().splitlines()) == 1
    status, _, error = run(*arguments)
    assert status == 2
    assert "begun and not finished; give --resume" in error

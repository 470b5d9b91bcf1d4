"""`spectra sweep`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from spectra_cli.app import app
from typer.testing import CliRunner, Result

from spectra.errors import SpectraError
from spectra.training import load_sweep

MODULE = """
from tests.training.small import make_base, new_task, old_task
"""
CONFIG = """
[model]
factory = "made_for_sweeps:make_base"
[task]
kind = "custom"
factory = "made_for_sweeps:new_task"
[retain]
kind = "custom"
factory = "made_for_sweeps:old_task"
[method]
rank = 4
[optimiser]
steps = 4
batch_size = 16
[sweep]
positions = [0.0, 1.0]
methods = ["head"]
learning_rates = [1e-2]
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "made_for_sweeps.py").write_text(MODULE)
    (tmp_path / "sweep.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "sweep.toml"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)], env={"COLUMNS": "120"})


def test_a_sweep_prints_its_means_and_leaves_table_and_pictures(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(config, "--out", out, "--workers", 0, "--seeds", "0,1")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    runs = load_sweep(out).runs
    assert len(runs) == 6
    mean = runs[(runs["method"] == "slice") & (runs["position"] == 1)]["score"].mean()
    (line,) = [line for line in lines if line[:3] == ["slice", "1", "0.01"]]
    assert line[3] == "2" and float(line[5]) == pytest.approx(mean, abs=5e-4)
    assert (out / "tradeoff.png").stat().st_size > 10_000 and (out / "pareto.png").exists()
    # Shown again, and redrawn, from the table alone.
    for picture in out.glob("*.png"):
        picture.unlink()
    again = run("--plot", "--out", out, "--json")
    assert again.exit_code == 0, again.output
    assert [row["run"] for row in json.loads(again.stdout)] == list(runs["run"])
    assert len(list(out.glob("*.png"))) == 2


def test_runs_that_failed_are_an_exit_status_after_all_is_shown(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (config, "--out", out, "--workers", 0, "--learning-rates", "1e-2,1e30", "--methods", "full")
    done = run(*arguments)
    assert done.exit_code == 1
    assert "spectra: 3 of 6 runs failed; the same command tries them again" in done.stderr
    assert "slice-0.0_lr-1e+30_seed-0 failed: " in done.stdout and "the table is in" in done.stdout
    assert (out / "pareto.png").exists()
    quiet = run(*arguments, "--quiet")
    assert (quiet.exit_code, quiet.stdout) == (1, "") and "3 of 6 runs failed" in quiet.stderr
    assert run("--plot", "--out", out).exit_code == 0  # which ran nothing


def test_a_narrow_terminal_cuts_no_words(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(config, "--out", out, "--workers", 0, "--positions", "0.125", "--methods", "peft:pissa_niter_4", "--quiet")
    run(config, "--out", out, "--workers", 0, "--positions", "0.125", "--match-step-size", 0.5, "--quiet")
    done = CliRunner().invoke(app, ["sweep", "--plot", "--out", str(out)], env={"COLUMNS": "80"})
    lines = done.output.splitlines()
    assert lines[0].split() == ["method", "position", "rate", "seeds", "before", "after", "lost", "update", "sv", "x"]
    assert len([line for line in lines if line.startswith("peft:pissa_niter_4 ")]) == 1 and "…" not in done.output
    # Matched and plain runs of one rate are not averaged.
    slices = [line.split() for line in lines if line.startswith("slice ")]
    assert sorted(line[2] for line in slices) == ["0.01", "0.01*"]
    assert "* the rate of the slice that" in done.output


def test_flags_take_the_place_of_the_file(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--positions", "0.5", "--methods", "lora", "--learning-rates", "1e-3", "--set", "optimiser.steps=2")
    done = run(config, "--out", out, "--workers", 0, "--match-step-size", 0.0, *flags, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    runs = load_sweep(out).runs
    assert runs[["method", "learning_rate", "steps"]].to_numpy().tolist() == [["slice", 1e-3, 2], ["lora", 1e-3, 2]]
    assert runs["matched_position"].tolist()[0] == 0.0


def test_what_is_missing_for_a_picture_is_said(config: Path, tmp_path: Path) -> None:
    config.write_text(
        CONFIG.replace("[retain]", "[ignored]").partition("[ignored]")[0] + CONFIG[CONFIG.index("[method]") :]
    )
    done = run(config, "--out", tmp_path / "out", "--workers", 0, "--methods", "")
    assert done.exit_code != 0  # "" is no method
    done = run(config, "--out", tmp_path / "out", "--workers", 0)
    assert done.exit_code == 0, done.output
    assert "was not drawn: no run of the sweep has both a score and forgetting" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep.toml"], "give --out"),
        (["--plot", "--out", "."], "holds no saved sweep"),
        (["sweep.toml", "--out", "out", "--seeds", "one"], "--seeds 'one' is no list of numbers"),
        (["sweep.toml", "--out", "out", "--positions", "2"], "between 0 and 1"),
        (["sweep.toml", "--out", "out", "--set", "optimiser.step=2"], "did you mean"),
        (["none.toml", "--out", "out"], "cannot be read"),
    ],
)
def test_mistakes_are_sentences(config: Path, arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, SpectraError), done.output  # which `main` prints, with exit status 2
    assert words in str(done.exception)

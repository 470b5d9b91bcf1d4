"""`spectra compare --sequence` as its user meets it: real processes on saved steps, tables of scores, saved results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import spectra

COMMAND = shutil.which("spectra", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(COMMAND is None, reason="the command `spectra` is not beside this interpreter")


def run(*arguments: str | Path, columns: int = 100) -> subprocess.CompletedProcess[str]:
    assert COMMAND is not None
    environment = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"}
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, one sentence on stderr that holds the words, nothing on stdout, no traceback."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and three saved steps of real training: a regression on noise, with files as a shell's * sorts them."""
    folder = tmp_path_factory.mktemp("course")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 24))
    save_file(model.state_dict(), folder / "base.safetensors")
    inputs, targets = torch.randn(64, 24), torch.randn(64, 24)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(1, 101):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimiser.step()
        if step in (5, 20, 100):
            save_file(
                {name: value.clone() for name, value in model.state_dict().items()}, folder / f"s-{step}.safetensors"
            )
    paths = sorted(folder.glob("s-*.safetensors"))
    assert [path.stem for path in paths] == ["s-100", "s-20", "s-5"]
    return folder / "base.safetensors", paths


def test_steps_are_put_in_order_and_shown_as_a_course(saved: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, steps = saved
    scores = tmp_path / "scores.csv"
    scores.write_text("label,forgetting\ns-100,0.25\ns-20,0.125\n")
    out = tmp_path / "out"
    done = run("compare", base, *steps, "--sequence", "--scores", scores, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(line.endswith(" ") for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("s-")] == ["s-5", "s-20", "s-100"]
    assert "put into that of their numbers: s-5, s-20, s-100" in " ".join(done.stdout.split())
    assert "forgetting" in done.stdout.lower()
    table = spectra.load(out).sequence()
    assert table["forgetting"].tolist()[1:] == [0.125, 0.25]
    for label, count, update in table[["tuned", "intruders", "relative_update"]].itertuples(index=False):
        alone = spectra.compare(base, base.parent / f"{label}.safetensors").layers
        assert count == alone["intruders"].sum()
        assert update == pytest.approx(
            ((alone["update_norm"] ** 2).sum() / (alone["base_norm"] ** 2).sum()) ** 0.5, rel=1e-12
        )
    pictures = [path.name for path in (out / "pictures").iterdir()]
    assert "00-sequence.png" in pictures
    assert not any("s-5" in name for name in pictures)
    assert "<td>s-20</td>" in (out / "report.html").read_text(encoding="utf-8")
    again = run("report", out, "--no-pictures")
    assert again.stdout == done.stdout
    rows = json.loads(run("report", out, "--no-pictures", "--json").stdout)["sequence"]
    assert [row["step"] for row in rows] == [5, 20, 100]
    assert rows[0]["forgetting"] is None


def test_an_order_that_was_meant_stays(saved: tuple[Path, list[Path]]) -> None:
    base, (last, middle, first) = saved
    done = run("compare", base, middle, first, last, "--sequence", columns=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 60
    assert [line.split()[0] for line in lines if line.startswith("s-")] == ["s-20", "s-5", "s-100"]
    assert "order given" in " ".join(done.stdout.split())


def test_what_is_no_sequence_is_refused_before_the_work(saved: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, steps = saved
    assert_refused(run("compare", base, steps[0], "--sequence"), "at least two")
    scores = tmp_path / "scores.csv"
    scores.write_text("label,score\ns-7,1\n")
    assert_refused(run("compare", base, *steps, "--scores", scores), "--sequence")
    assert_refused(run("compare", base, *steps, "--sequence", "--scores", scores), "'s-7'", "'s-20'")
    assert_refused(run("compare", base, *steps, "--sequence", "--scores", tmp_path / "no.csv"), "no.csv")


def test_report_shows_saved_intruders_and_overlaps_too(saved: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (last, middle, _) = saved
    printed = {}
    for command in ("intruders", "overlap"):
        done = run(command, base, middle, last, "--out", tmp_path / command)
        assert done.returncode == 0, done.stderr
        printed[command] = done.stdout
        shutil.rmtree(tmp_path / command / "pictures")
        assert run("report", tmp_path / command, "--top", "20").stdout == done.stdout
        assert list((tmp_path / command / "pictures").glob("*.png"))
    run("compare", base, middle, "--out", tmp_path / "all", "--quiet", "--no-pictures")
    for command in printed:
        for path in (tmp_path / command).iterdir():
            if path.is_file():
                shutil.copy(path, tmp_path / "all")
    everything = run("report", tmp_path / "all", "--no-pictures", "--top", "20").stdout
    assert "whole model" in everything
    assert everything.endswith(printed["intruders"] + printed["overlap"])
    plain = json.loads(run("report", tmp_path / "all", "--no-pictures", "--json").stdout)
    assert plain.keys() >= {"models", "intruders", "overlap"}
    assert plain["overlap"] == json.loads(run("report", tmp_path / "overlap", "--no-pictures", "--json").stdout)

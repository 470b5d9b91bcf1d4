"""The commands that edit and look into updates: what they write, print and refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spectra_cli.app import app
from typer.testing import CliRunner

from spectra.errors import SpectraError

COMMAND = shutil.which("spectra", path=str(Path(sys.executable).parent))


def run(*arguments: str | Path) -> str:
    """What the command printed; raises what it raised."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of two blocks, and a tuned model with one strong new direction in the first."""
    folder = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{at}.mlp.up_proj.weight": torch.randn(48, 40, generator=generator) for at in range(2)}
    tuned = {name: W.clone() for name, W in base.items()}
    left, right = torch.randn(48, generator=generator), torch.randn(40, generator=generator)
    tuned["layers.0.mlp.up_proj.weight"] += torch.outer(left, right)
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def test_intruders_are_listed_and_saved(files: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("intruders", *files, "--side", "both", "--out", tmp_path)
    assert "tuned: 1 intruder among the top 10 left directions, in 1 of 2 matrices" in done
    assert {"intruders.json", "intruders_triplets.parquet", "pictures"} <= {path.name for path in tmp_path.iterdir()}
    content = json.loads(run("intruders", *files, "--json"))
    assert [row["intruders"] for row in content["counts"]] == [1] and content["intruders"][0]["index"] == 0


def test_mitigating_takes_the_intruder_out(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("mitigate", *files, "--lambda", "0", "--out", out)
    assert "1 matrix edited, 1 as they were" in done and str(out) in done
    before, after = load_file(files[1]), load_file(out / "tuned.safetensors")
    assert torch.equal(before["layers.1.mlp.up_proj.weight"], after["layers.1.mlp.up_proj.weight"])
    ends = [float(torch.linalg.matrix_norm(state["layers.0.mlp.up_proj.weight"], 2)) for state in (before, after)]
    assert ends[1] < 0.6 * ends[0]
    with pytest.raises(SpectraError, match="force"):
        run("mitigate", *files, "--lambda", "0", "--out", out)
    again = run("mitigate", *files, "--lambda", "1", "--out", out, "--force", "--json")
    assert json.loads(again)["matrices"][0]["status"] == "unchanged"
    assert (out / "tuned.safetensors").read_bytes() == files[1].read_bytes()


def test_edits_are_written(files: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("edit", *files, "--rewind", "--layers", "0", "--out", tmp_path / "out")
    base, after = load_file(files[0]), load_file(tmp_path / "out" / "tuned.safetensors")
    assert all(torch.equal(base[name], after[name]) for name in base)
    done = run("edit", *files, "--scale", "2", "--out", tmp_path / "twice", "--quiet")
    assert done == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "exactly one"),
        (["--rank", "2", "--scale", "0.5"], "exactly one"),
        (["--rewind", "--components", "8"], "START:STOP"),
        (["--heads", "0", "--scale", "1"], "--rewind"),
        (["--rewind", "--heads", "a"], "ranges"),
        (["--rewind", "--layers", "7"], "layer 7"),
        (["--rewind", "--layers", "1-0"], "--layers is '1-0', which runs backwards; give 0-1"),
        (["--rewind", "--heads", "0,3-1"], "--heads is '0,3-1', and '3-1' runs backwards; give 1-3"),
        (["--energy", "2"], "share of energy"),
        (["--scale", "0.5", "--keep", "bottom"], "--keep"),
        (["--rank", "2", "--seed", "1"], "--keep random"),
        (["--scale", "0.5", "--seed", "0"], "--keep random"),
        (["--scale", "0.5", "--head-size", "4"], "--heads"),
        (["--rewind", "--heads", ""], "--heads"),
        (["--rewind", "--components", "40:60"], "from 40 on lie beyond every matrix, for the largest has 40"),
    ],
)
def test_contradictions_are_one_sentence(
    files: tuple[Path, Path], tmp_path: Path, options: list[str], words: str
) -> None:
    with pytest.raises(SpectraError, match=words):
        run("edit", *files, *options, "--out", tmp_path / "new" / "out")
    assert not any(tmp_path.iterdir())


def test_heads_that_are_not_there_leave_nothing_behind(tmp_path: Path) -> None:
    base = {f"layers.0.self_attn.{side}_proj.weight": torch.eye(8) for side in "qkv"}
    tuned = {name: 2 * W for name, W in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")]
    with pytest.raises(SpectraError, match=r"nothing was written; .*has heads 0 to 1, and head 9 was asked for"):
        run("edit", *files, "--rewind", "--heads", "9", "--head-size", "4", "--out", tmp_path / "new" / "er" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_heads_that_share_a_key_and_value_are_said_to_stay(tmp_path: Path) -> None:
    sizes = {"q": 16, "k": 8, "v": 8}
    base = {f"layers.0.self_attn.{side}_proj.weight": torch.eye(size, 16) for side, size in sizes.items()}
    base["layers.0.self_attn.o_proj.weight"] = torch.eye(16)
    config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, factor in (("base", 1), ("tuned", 2)):
        (tmp_path / name).mkdir()
        save_file({name: factor * W for name, W in base.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    files = [tmp_path / name for name in ("base", "tuned")]
    note = "not or not wholly edited, for a key and value go back only with all heads that share them: "
    named = "'layers.0.self_attn.k_proj.weight', 'layers.0.self_attn.v_proj.weight'"
    for heads, changed in (("0", 2), ("0,1,2", 4)):
        done = run("edit", *files, "--rewind", "--heads", heads, "--out", tmp_path / heads)
        assert note + named in done and f"{changed} matrices edited" in done
        rows = json.loads((tmp_path / heads / "spectra_edit.json").read_text())["matrices"]
        assert [bool(row["note"]) for row in rows] == [
            "k_proj" in row["name"] or "v_proj" in row["name"] for row in rows
        ]
    assert "wholly" not in run("edit", *files, "--rewind", "--heads", "0,1", "--out", tmp_path / "both")


def test_the_control_is_told_from_intruders(files: tuple[Path, Path], tmp_path: Path) -> None:
    plain = run("mitigate", *files, "--out", tmp_path / "plain")
    assert "intruders before" in plain and "base directions" not in plain
    done = run("mitigate", *files, "--lambda", "0.5", "--control", "--equal-change", "--out", tmp_path / "out")
    assert "base directions scaled" in done and "lambda" in done and "control changed" not in done
    with pytest.raises(SpectraError, match="ask for the control, too"):
        run("mitigate", *files, "--equal-change", "--out", tmp_path / "other")


@pytest.mark.parametrize("how", [[], ["--quiet"], ["--json"]])
def test_a_matrix_that_failed_makes_status_1_when_all_is_written(
    files: tuple[Path, Path], tmp_path: Path, how: list[str]
) -> None:
    tuned = load_file(files[1])
    tuned["layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tuned, tmp_path / "tuned.safetensors")
    arguments = ["mitigate", str(files[0]), str(tmp_path / "tuned.safetensors"), "--out", str(tmp_path / "out"), *how]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert (tmp_path / "out" / "tuned.safetensors").exists() and (done.stdout == "") == (how == ["--quiet"])
    assert done.stderr.startswith("spectra: 1 matrix could not be edited") and "NaN" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(COMMAND is None, reason="the command `spectra` is not beside this interpreter")
def test_a_refusal_is_one_sentence_and_status_2(files: tuple[Path, Path]) -> None:
    assert COMMAND is not None
    command = [COMMAND, "mitigate", *map(str, files), "--out", str(files[0].parent), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "would be lost" in done.stderr


def test_overlaps_are_printed_with_their_nulls(files: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("overlap", files[0], files[1], files[1], "--out", tmp_path, "-i", "3")
    assert "left overlap" in done and "(0.5)" in done
    assert (tmp_path / "overlap.json").exists() and (tmp_path / "pictures" / "update_cosine.png").exists()
    pairs = json.loads(run("overlap", files[0], files[1], files[1], "--json"))["pairs"]
    assert pairs[-1]["update_cosine"] == pytest.approx(1)

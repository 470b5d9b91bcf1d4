"""The command line as its user meets it: real processes, what they print, how they end."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import spectra

COMMAND = shutil.which("spectra", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(COMMAND is None, reason="the command `spectra` is not beside this interpreter")


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    assert COMMAND is not None
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False, **options)  # type: ignore[call-overload, no-any-return]


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, one sentence on stderr that holds the words, nothing on stdout, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair of three blocks with a matrix of every common role."""
    folder = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(0)
    base = {}
    for layer in range(3):
        for name, shape in {"attn.q_proj": (32, 32), "attn.o_proj": (32, 32), "mlp.up_proj": (64, 32)}.items():
            base[f"model.layers.{layer}.{name}.weight"] = torch.randn(*shape, generator=generator)
    base["model.norm.weight"] = torch.ones(32)
    tuned = {name: W + 0.05 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def test_compare_prints_a_table_that_fits_and_writes_what_it_says(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compare", *files, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "whole model" in done.stdout
    written = {path.name for path in out.iterdir()}
    tables = {"layers.parquet", "components.parquet", "slices.parquet", "unmatched.parquet", "comparison.json"}
    assert tables | {"report.html"} <= written
    assert any(name.endswith(".png") for name in written) or any(out.rglob("*.png"))
    layers = pd.read_parquet(out / "layers.parquet")
    assert len(layers) == 9
    provenance = json.loads((out / "comparison.json").read_text())
    assert provenance["spectra"] == spectra.__version__


def test_json_is_json_and_nothing_else(files: tuple[Path, Path]) -> None:
    done = run("compare", *files, "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_quiet_says_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("compare", *files, "--quiet", "--out", tmp_path / "out", "--no-pictures")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(spectra.load(tmp_path / "out").layers) == 9


def test_include_and_exclude_choose_matrices_and_list_the_rest(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--include", "*.attn.*", "--exclude", "*.2.*", "--out", out, "--no-pictures", "--quiet")
    assert run("compare", *files, *options).returncode == 0
    result = spectra.load(out)
    assert result.layers.name.str.contains("attn").all()
    assert len(result.layers) == 4
    assert {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)} <= set(result.unmatched.name)


def test_two_runs_write_the_same_tables_and_pictures(files: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run("compare", *files, "--quiet", "--out", tmp_path / name).returncode == 0
    first = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert first == sorted(
        path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file()
    )
    for path in first:
        if path.suffix in (".parquet", ".png"):
            assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


def test_report_shows_a_saved_comparison_without_the_checkpoints(files: tuple[Path, Path], tmp_path: Path) -> None:
    moved = [shutil.copy(path, tmp_path) for path in files]
    out = tmp_path / "out"
    shown = run("compare", *moved, "--out", out).stdout
    for path in moved:
        Path(path).unlink()
    again = run("report", out)
    assert again.returncode == 0, again.stderr
    assert again.stdout == shown


def test_inspect_lists_tensors_with_roles_and_reasons(files: tuple[Path, Path]) -> None:
    done = run("inspect", files[0])
    assert done.returncode == 0, done.stderr
    for word in ("mlp.up_proj", "mlp_up", "64", "float32"):
        assert word in done.stdout
    listing = json.loads(run("inspect", files[0], "--json").stdout)
    rows = {row["name"]: row for row in listing["tensors"]}
    assert rows["model.layers.1.attn.q_proj.weight"]["role"] == "query"
    assert rows["model.layers.1.attn.q_proj.weight"]["layer"] == 1
    assert rows["model.layers.1.attn.q_proj.weight"]["bytes"] == 32 * 32 * 4
    assert "vector" in rows["model.norm.weight"]["note"]


def test_define_prints_a_definition_and_knows_near_names() -> None:
    assert "sum_{j != i} C_ij^2" in run("define", "row_energy").stdout
    assert_refused(run("define", "row_energie"), "row_energy")
    assert run("define").stdout.startswith("# Definitions")


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(run("compare", *files, "--out", tmp_path / "file" / "out"), "cannot write", "--out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_refused_before_the_work(files: tuple[Path, Path], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert_refused(run("compare", *files, "--out", tmp_path / "out"), "cannot write", "--out")


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "out"
    done = run("compare", *files, "--out", out, preexec_fn=small_files)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot write the comparison" in done.stderr
    assert "whole model" in done.stdout  # what was computed is shown all the same
    for path in out.iterdir():
        assert not path.name.startswith("."), path
        pd.read_parquet(path)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_missing_file_is_named(files: tuple[Path, Path], side: str, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.safetensors"
    pair = (missing, files[1]) if side == "base" else (files[0], missing)
    assert_refused(run("compare", *pair), "nowhere.safetensors")


def test_a_truncated_file_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files[1].read_bytes()[:-100])
    assert_refused(run("compare", files[0], cut), "cut.safetensors")


def test_a_pickle_that_wants_to_run_code_does_not(files: tuple[Path, Path], tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {canary}",)

    for legacy in (False, True):
        hostile = tmp_path / "hostile.pt"
        torch.save({"weight": Attack()}, hostile, _use_new_zipfile_serialization=not legacy)
        assert_refused(run("compare", files[0], hostile), "hostile.pt", "system")
        assert not canary.exists()


def test_models_that_share_no_name_are_refused_with_names_of_both(files: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"stem.conv.weight": torch.randn(8, 3, 3, 3)}, other)
    assert_refused(run("compare", files[0], other), "stem.conv.weight", "attn.q_proj")


def test_not_a_number_is_named_and_the_other_matrices_are_done(files: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(files[1])
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken)
    done = run("compare", files[0], broken, "--out", tmp_path / "out", "--no-pictures")
    assert done.returncode == 0, done.stderr
    assert "NaN" in done.stdout
    layers = spectra.load(tmp_path / "out").layers.set_index("name")
    assert layers.status.value_counts().to_dict() == {"compared": 8, "failed": 1}
    assert "model.layers.1.mlp.up_proj.weight" in layers.loc["model.layers.1.mlp.up_proj.weight"].note


def test_a_terminal_sees_a_progress_bar_on_stderr(files: tuple[Path, Path]) -> None:
    assert COMMAND is not None
    terminal, side = pty.openpty()
    command = [COMMAND, "compare", *map(str, files), "--top", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=side, env={**os.environ, "TERM": "xterm"})
    os.close(side)
    seen = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the terminal closes with its last writer
            break
        if not chunk:
            break
        seen += chunk
    os.close(terminal)
    assert process.wait(timeout=120) == 0
    assert b"comparing" in seen


def test_ctrl_c_leaves_the_finished_rows_readable(tmp_path: Path) -> None:
    """The interrupt comes when the bar shows the first finished matrix of forty."""
    assert COMMAND is not None
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.q_proj.weight": torch.randn(700, 700, generator=generator) for i in range(40)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: W + 0.1 for name, W in base.items()}, tmp_path / "tuned.safetensors")
    out = tmp_path / "out"
    pair = [str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")]
    terminal, side = pty.openpty()
    command = [COMMAND, "compare", *pair, "--out", str(out), "--workers", "1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side, env=environment)
    os.close(side)
    seen, deadline = b"", time.monotonic() + 60
    while b"q_proj" not in seen and time.monotonic() < deadline:  # the bar names the first matrix that is done
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 130
    result = spectra.load(out)
    assert 1 <= len(result.layers) < 40
    assert (result.layers.status == "compared").all()
    assert result.provenance["interrupted"]
    assert b"whole model" in output


def test_an_interrupted_reader_is_no_error(files: tuple[Path, Path]) -> None:
    assert COMMAND is not None
    done = subprocess.run(
        f"{COMMAND} define | head -n 1", shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "# Definitions\n"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_the_demo_runs_on_real_weights(rxnfp: Path, tmp_path: Path) -> None:
    done = run("demo", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    result = spectra.load(tmp_path / "demo")
    matrices = result.layers[(result.layers.rows > 1) & (result.layers["columns"] > 1)]
    assert matrices.groupby("tuned").intruders.sum().to_dict() == {"10k": 12, "ft": 63}

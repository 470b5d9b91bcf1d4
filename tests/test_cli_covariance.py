"""`spectra covariance` as its user meets it: real processes on real models, adapters, tables, images, factories."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.shift import CovarianceShift

COMMAND = shutil.which("spectra", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(COMMAND is None, reason="the command `spectra` is not beside this interpreter")
needs_train = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "datasets", "peft", "PIL")),
    reason="transformers, datasets, peft or Pillow is not installed",
)


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    assert COMMAND is not None
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1"}
    command = [COMMAND, "covariance" if arguments[0] != "report" else "report", *map(str, arguments)]
    if arguments[0] == "report":
        del command[1]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False, cwd=cwd)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit status 2, one sentence on stderr that holds the words, nothing on stdout, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@needs_train
def test_images_of_classes_give_divergence_and_loss(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    names = {0: "dark", 1: "light"}
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "tuned")
    pixels = np.random.default_rng(0)
    for name, shade in (("dark", 20), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for at in range(5):
            noise = pixels.integers(0, 40, (30, 34, 3)) + shade
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "images" / name / f"{at}.png")
    done = run(
        tmp_path / "base", tmp_path / "tuned", "--data", tmp_path / "images", "--batch-size", "4", "--json", "--out",
        tmp_path / "out", "--no-pictures",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout)
    result = CovarianceShift.load(tmp_path / "out")
    assert plain["functional"]["kl"]["samples"] == 10
    assert result.functional["kl"].gt(0).all()
    assert result.functional["loss_change"].notna().all()
    assert "conv" in set(result.layers["role"])  # the patches are a convolution
    assert plain["functional"]["kl"]["mean"] == pytest.approx(result.functional["kl"].mean())


FACTORIES = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def batches():
    generator = torch.Generator().manual_seed(0)
    for size in (5, 5, 2):
        yield torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a module of factories and two checkpoints, one of which bears a wrapper's prefix."""
    (tmp_path / "own_things.py").write_text(FACTORIES)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    base = dict(model.state_dict())
    tuned = {f"module.{name}": value + 0.1 * torch.randn(value.shape) for name, value in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path


def test_anything_else_runs_through_factories_and_joins_a_comparison(own: Path) -> None:
    files = (own / "base.safetensors", own / "tuned.safetensors")
    spectra.compare(*files).save(own / "out")
    factories = ("--model", "own_things:build", "--batches", "own_things:batches")
    done = run(*files, *factories, "--out", own / "out", "--join", own / "out", "--no-pictures", cwd=own)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = CovarianceShift.load(own / "out")
    assert list(result.layers["name"]) == ["0.weight", "2.weight"]
    assert int(result.layers["samples"].max()) == 12
    assert result.functional[["kl", "loss_change"]].notna().all().all()
    base, x = torch.nn.functional.linear, torch.cat([batch[0] for batch in _own_batches(own)])
    W = {name: value.double() for name, value in spectra.open_checkpoint(files[0]).items()}
    features = base(x.double(), W["0.weight"], W["0.bias"])
    variance = float(torch.cov(features.T, correction=0).trace())
    assert float(result.layers["variance_base"][0]) == pytest.approx(variance, rel=1e-6)

    joined = spectra.load(own / "out")
    assert "relative_shift" in joined.layers.columns or any("shift" in name for name in joined.layers.columns)
    shown = run("report", own / "out", "--no-pictures")
    assert shown.returncode == 0, shown.stderr
    assert "covariance shift of 2 matrices" in shown.stdout
    assert "2 matrices compared" in shown.stdout
    plain = json.loads(run("report", own / "out", "--json", "--no-pictures").stdout)
    assert plain["covariance_shift"]["matrices"] == 2
    assert "models" in plain


def _own_batches(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    scope: dict[str, Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]] = {}
    exec((folder / "own_things.py").read_text(), scope)
    return list(scope["batches"]())


def test_without_data_weights_are_enough(own: Path) -> None:
    done = run(own / "base.safetensors", own / "tuned.safetensors", "--out", own / "free", "--top", "1")
    assert done.returncode == 0, done.stderr
    assert "Sigma_X = I" in done.stdout
    result = CovarianceShift.load(own / "free")
    W, V = (spectra.open_checkpoint(own / f"{side}.safetensors") for side in ("base", "tuned"))
    W, V = W["2.weight"].double(), V["module.2.weight"].double()
    norm = float(torch.linalg.norm(V @ V.T - W @ W.T) / torch.linalg.norm(W @ W.T))
    assert float(result.layers.set_index("name").loc["2.weight", "relative_shift"]) == pytest.approx(norm, rel=1e-6)
    first = {path.name: path.read_bytes() for path in (own / "free" / "shift_pictures").iterdir()}
    shown = run("report", own / "free", "--top", "1")
    assert shown.stdout == done.stdout
    assert first == {path.name: path.read_bytes() for path in (own / "free" / "shift_pictures").iterdir()}


def test_a_mistake_is_one_sentence(own: Path) -> None:
    files = (own / "base.safetensors", own / "tuned.safetensors")
    assert_refused(
        run(*files, "--model", "own_things:make", "--batches", "own_things:batches", cwd=own), "no 'make'", "build"
    )
    assert_refused(run(*files, "--matrices", "*"), "--matrices", "give --out, too")
    assert_refused(run(*files, "--join-label", "one"), "--join-label", "give --join, too")


def test_a_join_that_cannot_be_is_refused_before_the_models_run(own: Path) -> None:
    """The factories would fail if they were called, so that these words come before any run."""
    files = (own / "base.safetensors", own / "tuned.safetensors")
    spectra.compare(files[0], {"one": files[1], "other": files[1]}).save(own / "two")
    never = (*files, "--model", "nowhere:build", "--batches", "nowhere:batches", "--join", own / "two")
    assert_refused(run(*never, "--join-label", "one", "--basis", "feature", cwd=own), "--join", "--basis feature")
    assert_refused(run(*never, "--join-label", "third", cwd=own), "--join-label third", "'one', 'other'")
    assert_refused(run(*never, cwd=own), "say with --join-label")

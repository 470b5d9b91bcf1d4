"""Memory holds a pair of matrices and its workspace, however large the model, by the kernel's own accounting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spectra

MIB = 2**20
SLACK = 12  # MiB: tables, code that only large matrices run, blocks of less than 1 MiB

# The libraries are measured and not assumed: torch and pandas alone take some 330 MiB, more or less from version to
# version, which no constant could follow without hiding a matrix. The first comparison, of a few numbers, brings all of
# them into memory; what the process takes beyond that is the matrices'.
PROGRAM = """
import sys, torch, spectra
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
small = {"weight": torch.diag(torch.arange(1.0, 300.0))}
spectra.compare(small, {"weight": 2 * small["weight"]}, workers=1)
libraries = peak()
spectra.compare(sys.argv[1], sys.argv[2:], workers=1)
print(libraries, peak())
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the kernel's accounting in /proc")


def saved(folder: Path, m: int, n: int, count: int, models: int, dtype: torch.dtype) -> list[Path]:
    """A base of `count` matrices and `models` tuned ones, as files."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(m, n, generator=generator) for i in range(count)}
    paths = []
    for model in range(1 + models):
        tensors = {name: W + 0.01 * model * torch.randn(m, n, generator=generator) for name, W in base.items()}
        paths.append(folder / f"{model}.safetensors")
        save_file({name: W.to(dtype) for name, W in tensors.items()}, paths[-1])
    return paths


def peaks(base: Path, *tuned: Path) -> tuple[float, float]:
    """MiB of a process with its libraries alone, and at the peak of the comparison, cold, with one worker."""
    # Without the first setting the C library keeps up to 64 MiB of what was freed, more or less of it by chance.
    settings = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(base), *map(str, tuned)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings})
    libraries, peak = (float(number) for number in done.stdout.split())
    return libraries, peak


@pytest.mark.parametrize(
    ("m", "n", "dtype"),
    [(512, 12288, torch.float32), (12288, 512, torch.bfloat16), (1280, 1280, torch.float32)],
)
def test_the_peak_is_that_of_one_pair(tmp_path: Path, m: int, n: int, dtype: torch.dtype) -> None:
    """Of two matrices in two tuned models that of one pair.

    Three float32 copies of it (W, V, and W' or D) and four float64 squares of its short side.
    """
    libraries, peak = peaks(*saved(tmp_path, m, n, count=2, models=2, dtype=dtype))
    assert peak - libraries <= (3 * m * n * 4 + 4 * min(m, n) ** 2 * 8) / MIB + SLACK


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_the_caller_holds_is_not_written_to(tmp_path: Path, dtype: torch.dtype, fast: bool) -> None:
    """D takes the place of a W' that was read from a file, and of no other; the rows are the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"fc.weight": (200, 150), "small.weight": (20, 30), "h.0.attn.c_attn.weight": (160, 480)}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tuned = {name: (W + 0.1 * torch.randn(W.shape, generator=generator)).to(dtype) for name, W in base.items()}
    tuned["fc.weight"] = tuned["fc.weight"].T.contiguous().T  # its columns lie together, as a view's may
    module = torch.nn.Linear(150, 200, bias=False, dtype=dtype)
    module.weight = torch.nn.Parameter(base["fc.weight"] + 1)
    held = [*base.values(), *tuned.values(), module.weight.detach()]
    before = [X.clone() for X in held]
    in_memory = spectra.compare(base, tuned, transposed=["*c_attn*"], fast=fast, workers=1)
    spectra.compare({"weight": base["fc.weight"]}, module, fast=fast, workers=1)
    assert all(torch.equal(X, Y) for X, Y in zip(held, before, strict=True))
    paths = [tmp_path / f"{side}.safetensors" for side in ("base", "tuned")]
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_file({name: X.contiguous() for name, X in tensors.items()}, path)
    files = spectra.compare(*paths, transposed=["*c_attn*"], fast=fast, workers=1)
    assert (files.layers["status"] == "compared").all()
    for table in ("layers", "components"):
        ours, theirs = (getattr(result, table).select_dtypes("number") for result in (files, in_memory))
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=1e-4, atol=1e-6)

"""Memory holds a pair of matrices and its workspace, however large the model, by the kernel's own accounting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MIB = 2**20
SLACK = 12  # MiB: tables, code that only large matrices run, blocks of less than 1 MiB

# The first comparison, of a few numbers, brings all libraries into memory: some 330 MiB, most of them torch's and
# pandas'. What the process takes beyond that is the matrices'.
PROGRAM = """
import sys, torch, spectra
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
small = {"weight": torch.diag(torch.arange(1.0, 300.0))}
spectra.compare(small, {"weight": 2 * small["weight"]}, workers=1)
libraries = peak()
spectra.compare(sys.argv[1], sys.argv[2], workers=1)
print(libraries, peak())
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the kernel's accounting in /proc")


def pair(folder: Path, m: int, n: int, count: int) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(m, n, generator=generator) for i in range(count)}
    tuned = {name: W + 0.01 * torch.randn(m, n, generator=generator) for name, W in base.items()}
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_file(tensors, path)
    return paths


def peaks(base: Path, tuned: Path) -> tuple[float, float]:
    """MiB of a process with its libraries alone, and at the peak of the comparison, cold, with one worker."""
    # Without the first setting the C library keeps up to 64 MiB of what was freed, more or less of it by chance.
    settings = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(base), str(tuned)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings})
    libraries, peak = (float(number) for number in done.stdout.split())
    return libraries, peak


@pytest.mark.parametrize(("m", "n"), [(512, 12288), (1536, 1536)])
def test_the_peak_is_that_of_one_pair(tmp_path: Path, m: int, n: int) -> None:
    """W, W', D and V in float32 and four float64 squares of the short side; and of two such matrices no more."""
    libraries, peak = peaks(*pair(tmp_path, m, n, count=1))
    assert peak - libraries <= (4 * m * n * 4 + 4 * min(m, n) ** 2 * 8) / MIB + SLACK
    _, twice = peaks(*pair(tmp_path, m, n, count=2))
    assert twice - peak <= SLACK

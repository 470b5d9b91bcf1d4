"""`spectra compare` beside the plain loop of two `torch.linalg.svd` a pair, whole processes, in alternating rounds.

Prints CPU seconds, wall seconds and peak memory (medians over the rounds) and ratios, for the loop with torch's own
number of threads, as its author would run it, and with one. The loop only computes the SVDs; `spectra compare` computes
every measure and writes its tables, start-up included.

    python tests/benchmarks/bench_compare.py [--rounds 3] [--depth 12] [--workers 2] [--pictures]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent

SPECTRA = "spectra compare"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak resident MiB of one run, by the kernel's own accounting."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with exit status {process.returncode}")
    return usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rank", type=int)
    parser.add_argument("--pictures", action="store_true")
    arguments = parser.parse_args()
    spectra = shutil.which("spectra", path=str(Path(sys.executable).parent)) or shutil.which("spectra")
    if spectra is None:
        raise SystemExit("the command `spectra` is not installed; run `pip install -e .` first")
    with tempfile.TemporaryDirectory() as scratch:
        # In a process of its own: a child's peak memory counts what its parent held when it was started.
        make_pair = [sys.executable, str(HERE / "_vit_pair.py"), scratch, "--depth", str(arguments.depth)]
        if arguments.rank:
            make_pair += ["--rank", str(arguments.rank)]
        pair = subprocess.run(make_pair, check=True, capture_output=True, text=True).stdout.split()
        pictures = "--pictures" if arguments.pictures else "--no-pictures"
        out = ["--out", str(Path(scratch) / "out"), "--quiet", pictures, "--workers", str(arguments.workers)]
        loop = [sys.executable, str(HERE / "_plain_loop.py"), *pair]
        as_it_is = {name: value for name, value in os.environ.items() if name not in ONE_THREAD}
        one_thread = {**as_it_is, **ONE_THREAD}
        sides = {
            SPECTRA: ([spectra, "compare", *pair, *out], as_it_is),
            "plain loop": (loop, as_it_is),
            "plain loop, 1 thread": (loop, one_thread),
        }
        rounds: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, (command, environment) in sides.items():
                rounds[side].append(measured(command, environment))
                print(f"{side}: {rounds[side][-1][0]:.2f} CPU s, {rounds[side][-1][1]:.2f} s", file=sys.stderr)
    medians = {side: [statistics.median(column) for column in zip(*runs, strict=True)] for side, runs in rounds.items()}
    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}")
    print(
        f"ViT-B/16 shape, {arguments.depth} blocks, medians of {arguments.rounds} alternating rounds; "
        f"spectra with {arguments.workers} workers"
    )
    print(f"{'':24}{'CPU s':>9}{'wall s':>9}{'peak MiB':>10}{'CPU':>9}{'wall':>8}{'peak':>8}")
    ours = medians[SPECTRA]
    for side, (cpu, wall, peak) in medians.items():
        ratios = [theirs / mine for theirs, mine in zip(medians[side], ours, strict=True)]
        print(f"{side:24}{cpu:9.2f}{wall:9.2f}{peak:10.0f}{ratios[0]:8.2f}x{ratios[1]:7.2f}x{ratios[2]:7.2f}x")


def processor() -> str:
    """The processor's name, where the system tells."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()

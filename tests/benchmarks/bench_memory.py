"""Peak memory of `spectra compare` against the number of blocks: it holds a pair a worker, never a model.

python tests/benchmarks/bench_memory.py [--workers 1]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

PROGRAM = """
import sys, spectra
spectra.compare(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))
print(next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    workers = str(parser.parse_args().workers)
    print(f"{'blocks':>8}{'weights MiB':>13}{'peak MiB':>10}")
    for blocks in (1, 4, 12):
        with tempfile.TemporaryDirectory() as scratch:
            make = [sys.executable, str(HERE / "_vit_pair.py"), scratch, "--depth", str(blocks)]
            pair = subprocess.run(make, check=True, capture_output=True, text=True).stdout.split()
            command = [sys.executable, "-c", PROGRAM, *pair, workers]
            peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            weights = sum(Path(path).stat().st_size for path in pair) / 2**20
            print(f"{blocks:8}{weights:13.0f}{peak:10.0f}")


if __name__ == "__main__":
    main()

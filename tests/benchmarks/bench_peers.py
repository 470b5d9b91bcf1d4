"""`spectra compare` beside other tools on the same ViT-shaped pair: whole processes, one thread, alternating rounds.

Prints CPU seconds, wall seconds and peak memory (medians). The others are looked for in the interpreters that
`--peers-python` names, and left out with a line where they are not installed. They do not compute the same things:
README.md here says what each of them does.

    python tests/benchmarks/bench_peers.py --peers-python PATH [PATH ...] [--rounds 1] [--depth 12]
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench_compare import ONE_THREAD, measured, processor

HERE = Path(__file__).resolve().parent
QUIET = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Peer:
    """A run in `_peer_runs`, the distribution that it needs, and what a row calls it."""

    run: str
    distribution: str
    title: str


PEERS = (
    Peer("peft", "peft", "peft reduce_intruder_dimension"),
    Peer("weightwatcher-one", "weightwatcher", "WeightWatcher, one checkpoint"),
    Peer("weightwatcher-delta", "weightwatcher", "WeightWatcher, the update"),
    Peer("modeldelta", "modeldelta", "modeldelta"),
    Peer("diffract", "diffract-core", "Diffract"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", nargs="*", type=Path, default=[], metavar="PATH")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--depth", type=int, default=12)
    arguments = parser.parse_args()
    spectra = shutil.which("spectra", path=str(Path(sys.executable).parent)) or shutil.which("spectra")
    if spectra is None:
        raise SystemExit("the command `spectra` is not installed; run `pip install -e .` first")
    print(
        f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}, "
        f"load average {os.getloadavg()[0]:.2f}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "inputs"
        python = [sys.executable]
        make = [*python, str(HERE / "_vit_pair.py"), scratch, "--depth", str(arguments.depth), "--rank", "16"]
        pair = subprocess.run(make, check=True, capture_output=True, text=True).stdout.split()
        subprocess.run([*python, str(HERE / "_peer_inputs.py"), *pair, str(folder)], check=True)
        out = ["--out", str(Path(scratch) / "out"), "--quiet", "--no-pictures", "--workers", "1"]
        commands = {
            "spectra compare": [spectra, "compare", *pair, *out],
            "spectra compare, the adapter": [spectra, "compare", pair[0], str(folder / "adapter"), *out],
            "plain loop of two SVDs": [*python, str(HERE / "_plain_loop.py"), *pair],
            **_peer_commands(arguments.peers_python, folder),
        }
        environment = {**os.environ, **ONE_THREAD, **QUIET}
        rounds: dict[str, list[tuple[float, float, float]]] = {side: [] for side in commands}
        for _ in range(arguments.rounds):
            for side, command in commands.items():
                try:
                    rounds[side].append(measured(command, environment))
                except SystemExit as failure:
                    print(f"{side}: left out, {failure}")
    print(f"ViT-B/16 shape, {arguments.depth} blocks, update of rank 16, one thread, medians over {arguments.rounds}")
    print(f"{'':44}{'CPU s':>9}{'wall s':>9}{'peak MiB':>10}")
    for side, runs in rounds.items():
        if runs:
            cpu, wall, peak = (statistics.median(column) for column in zip(*runs, strict=True))
            print(f"{side:44}{cpu:9.2f}{wall:9.2f}{peak:10.0f}")
    print(f"load average at the end: {os.getloadavg()[0]:.2f}")


def _peer_commands(interpreters: list[Path], folder: Path) -> dict[str, list[str]]:
    """A command per peer that is installed somewhere; a line for each that is not."""
    found: dict[str, list[str]] = {}
    for peer in PEERS:
        for interpreter in interpreters:
            installed = _version_in(interpreter, peer.distribution)
            if installed:
                run = [str(interpreter), str(HERE / "_peer_runs.py"), peer.run, str(folder)]
                found[f"{peer.title} ({installed})"] = run
                break
        else:
            print(f"{peer.title}: left out, {peer.distribution} is not installed")
    return found


def _version_in(interpreter: Path, distribution: str) -> str | None:
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    done = subprocess.run([str(interpreter), "-c", code, distribution], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    main()

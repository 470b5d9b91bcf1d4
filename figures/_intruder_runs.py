"""The runs behind `intruders.py`: LoRA and full fine-tunings of the small vision transformer, and their mitigation."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from _vit import NewTask, OldTask, VisionTransformer, pretrained, retained
from safetensors.torch import load_file
from torch import nn

import spectra
from spectra.editing import mitigate
from spectra.lora import load_adapter, merge
from spectra.report import summary
from spectra.training import Grid, Task, evaluate, sweep

TARGETS = ("blocks.*.query", "blocks.*.key", "blocks.*.value", "blocks.*.proj", "blocks.*.fc1", "blocks.*.fc2")
RANK, RATE, RATE_OF_FULL = 8, 1e-2, 1e-3  # of the runs that panels about something else are of
MITIGATED = (("lora", 3e-3), ("lora", RATE), ("full", RATE_OF_FULL))  # LoRA at its best rate, and past it
BLOCKS = ("*blocks.*",)  # what both LoRA and full fine-tuning change
EPSILONS = tuple(hundredth / 100 for hundredth in range(0, 101, 2))


@dataclass(frozen=True)
class Sizes:
    """What the runs cost."""

    width: int = 128
    depth: int = 4
    pretraining: int = 1200  # steps of 128 images
    steps: int = 200
    batch_size: int = 64
    tested: int = 1000  # images of each test set
    ranks: tuple[int, ...] = (1, 4, 16, 64)  # beside RANK
    rates: tuple[float, ...] = (1e-3, 3e-3, RATE, 3e-2)
    rates_of_full: tuple[float, ...] = (3e-4, RATE_OF_FULL, 3e-3)
    earlier: tuple[int, ...] = (10, 25, 50, 100)  # steps, before the last
    factors: tuple[float, ...] = tuple(quarter / 4 for quarter in range(9))  # lambda
    seeds: tuple[int, ...] = (0, 1)


QUICK = Sizes(
    width=64,
    depth=3,
    pretraining=250,
    steps=40,
    tested=500,
    ranks=(2, 32),
    rates=(3e-3, RATE),
    rates_of_full=(RATE_OF_FULL,),
    earlier=(10,),
    factors=(0.0, 0.5, 1.0, 2.0),
    seeds=(0,),
)


def train_and_mitigate(
    fashion: Path, mnist: Path, work: Path, sizes: Sizes, workers: int | None
) -> dict[str, pd.DataFrame]:
    """The tables `runs` (a row a run), `thresholds` (counts against epsilon) and `lambda` (scores against lambda)."""
    untrained = VisionTransformer(sizes.width, sizes.depth)
    base = pretrained(fashion, work / "base.pt", sizes.pretraining, sizes.tested, untrained)
    new, old = NewTask(mnist, kept=0, tested=sizes.tested), retained(fashion, sizes.tested)
    rows, counts, scores = [], [], []
    for name, grid, changes in _sweeps(sizes):
        started = time.perf_counter()
        folder = work / name
        found = sweep(_settings(sizes, changes), grid, out=folder, base=base, task=new, retain=old, workers=workers)
        runs = found.runs[found.runs["status"] == "finished"]
        rows.append(runs.assign(**_of_blocks(folder, list(runs["run"]))))
        print(f"{name}: {len(found.runs)} runs after {time.perf_counter() - started:.0f} s", flush=True)
    for seed in sizes.seeds:
        for method, rate in MITIGATED:
            run = work / "rates" / "runs" / f"{method}_lr-{rate:g}_seed-{seed}"
            before, after = new(copy.deepcopy(base)), _trained(new(copy.deepcopy(base)), run)
            about = {"method": method, "learning_rate": rate, "seed": seed}
            counts.append(_thresholds(before.model, after.model).assign(**about))
            scores += [about | row for row in _mitigated(before, after, old["fashion"], sizes)]
            print(f"mitigated {method} at {rate:g}, seed {seed}", flush=True)
    return {
        "runs": pd.concat(rows, ignore_index=True),
        "thresholds": pd.concat(counts, ignore_index=True),
        "lambda": pd.DataFrame(scores),
    }


def _sweeps(sizes: Sizes) -> Iterator[tuple[str, Grid, dict[str, Any]]]:
    """The grids: all learning rates, all ranks, and fewer steps.

    At a constant learning rate, and with the examples of a step decided by the seed, a run of fewer steps is the
    beginning of a longer one.
    """
    both = {"methods": ("lora", "full"), "seeds": sizes.seeds}
    yield "rates", Grid(learning_rates=sizes.rates, rates_of={"full": sizes.rates_of_full}, **both), {}
    for rank in sizes.ranks:
        grid = Grid(methods=("lora",), learning_rates=(RATE,), seeds=sizes.seeds)
        yield f"rank-{rank}", grid, {"rank": rank}
    for steps in sizes.earlier:
        grid = Grid(learning_rates=(RATE,), rates_of={"full": (RATE_OF_FULL,)}, **both)
        yield f"steps-{steps}", grid, {"steps": steps}


def _settings(sizes: Sizes, changes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "method": {"rank": changes.get("rank", RANK), "targets": TARGETS},
        "optimiser": {
            "steps": changes.get("steps", sizes.steps), "batch_size": sizes.batch_size, "schedule": "constant",
        },
        "evaluation_batch_size": 250,
        "device": "cpu",
    }  # fmt: skip


def _of_blocks(folder: Path, runs: list[str]) -> dict[str, list[float]]:
    """Over the matrices of the blocks: how many intruders, and the median effective rank of the update."""
    tables = [spectra.load(folder / "runs" / run / "comparison").layers for run in runs]
    blocks = [summary.compared(layers[layers["layer"].notna()]) for layers in tables]
    return {
        "intruders": [int(rows["intruders"].sum()) for rows in blocks],
        "effective_rank": [summary.median(rows, "effective_rank") for rows in blocks],
    }


def _trained(task: Task, run: Path) -> Task:
    """The task on the model that a run ended with, as plain weights."""
    adapter = run / "adapter"
    if adapter.exists():
        return task.called_through(merge(load_adapter(task.model, adapter), copy=False))
    task.model.load_state_dict(load_file(run / "model" / "model.safetensors"))
    return task


def _thresholds(before: nn.Module, after: nn.Module) -> pd.DataFrame:
    found = spectra.find_intruders(before, {"tuned": after}, include=BLOCKS, device="cpu")
    null = float(found.triplets["cosine_null"].mean())
    return found.counts(EPSILONS)[["epsilon", "intruders"]].assign(cosine_null=null)


def _mitigated(before: Task, after: Task, old: OldTask, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Scores of both tasks at every lambda: top intruder of each matrix, all of them, and base directions instead, by
    the same lambda and by the one that moves the weights as far.
    """
    body: VisionTransformer = after.model.body  # type: ignore[assignment]
    at_first = _score(old(before.model.body))  # type: ignore[arg-type]
    weights = {name: value.clone() for name, value in after.model.state_dict().items()}
    for which in ("top", "all"):
        for control, equal_change in ((False, False), (True, False), (True, True)):
            for factor in sizes.factors:
                edited = mitigate(
                    before.model, weights, factor=factor, which=which, control=control, equal_change=equal_change,
                    include=BLOCKS, device="cpu",
                )  # fmt: skip
                after.model.load_state_dict(weights | dict(edited.tensors))
                moved = edited.matrices["change_norm"].dropna().to_numpy()
                yield {
                    "which": which,
                    "control": control,
                    "equal_change": equal_change,
                    "lambda": factor,
                    "score": _score(after),
                    "old_score": _score(old(body)),
                    "old_score_before": at_first,
                    "intruders_scaled": int(edited.matrices["intruders_scaled"].sum()),
                    "intruders_after": int(edited.matrices["intruders_after"].sum()),
                    "change_norm": float((moved * moved).sum() ** 0.5),
                }
    after.model.load_state_dict(weights)


def _score(task: Task, batch: int = 250) -> float:
    count = len(task.test)
    parts = [task.test.batch(range(start, min(start + batch, count))) for start in range(0, count, batch)]
    return evaluate(task, parts)["score"]

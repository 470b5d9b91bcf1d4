"""The result of learning tasks one after another: every score after every stage, and how far the weights had moved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.tables_on_disk import Kind, load_tables, save_tables

if TYPE_CHECKING:
    import pandas as pd

    from spectra.training.continual_plots import ContinualPlots

KIND = Kind("sequence of tasks", "continual", "continual.json", "continual_")
TABLES = ("evaluations", "drift")
NEW, RETAINED = "new", "retained"


@dataclass(frozen=True)
class Continual:
    """What a sequence of tasks did to a base. Stage 0 is the base, stage t stands after the t-th task.

    Columns are defined in `spectra/definitions.md`.

    Attributes:
        evaluations: a row per (stage, task): the score, of all tasks learnt so far and of what the base could do.
        drift: a row per stage from 1: base and stage as `spectra compare` holds them against each other.
        provenance: settings, tasks and versions.
    """

    evaluations: pd.DataFrame
    drift: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scores(self) -> pd.DataFrame:
        """R: a row per stage, a column per task; missing where a task was not learnt yet."""
        order = list(dict.fromkeys(self.evaluations["task"]))
        return self.evaluations.pivot(index="stage", columns="task", values="score")[order]

    @property
    def summary(self) -> pd.DataFrame:
        """A row per stage from 1: average score, backward transfer, forgetting, and what was lost of the base's own."""
        return summarise(self.evaluations)

    @property
    def plot(self) -> ContinualPlots:
        """The pictures: each method returns matplotlib Axes and takes `ax=`."""
        from spectra.training.continual_plots import ContinualPlots

        return ContinualPlots(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tables (Parquet) and `continual.json` into `folder`. Raises `SpectraError` where it cannot."""
        return save_tables(folder, KIND, {name: getattr(self, name) for name in TABLES}, self.provenance)


def load_continual(folder: str | os.PathLike[str]) -> Continual:
    """A saved sequence, or as many stages as are finished. Raises `SpectraError` where `folder` holds none."""
    tables, provenance = load_tables(folder, KIND, TABLES)
    return Continual(tables["evaluations"], tables["drift"], provenance)


def summarise(evaluations: pd.DataFrame) -> pd.DataFrame:
    """The usual measures of a sequence of tasks, with R[t, j] the score of task j after stage t.

        average_score        mean_{j <= t} R[t, j]
        backward_transfer    mean_{j < t} R[t, j] - R[j, j]
        average_forgetting   mean_{j < t} max_{j <= l < t} R[l, j] - R[t, j]
        retained_forgetting  mean over the base's own tasks of R[0, k] - R[t, k]

    The first two are those of Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), the third is that of Chaudhry et al. 2018
    (arXiv 1801.10112); a task is first scored when it was learnt, so that the maximum starts there. The last three are
    missing where there is nothing to average.

    Args: evaluations, with columns stage, learnt, task, kind ("new" or "retained") and score.

    >>> import pandas as pd
    >>> rows = [(1, "a", "a", "new", 0.9), (2, "b", "a", "new", 0.7), (2, "b", "b", "new", 0.8)]
    >>> table = pd.DataFrame(rows, columns=["stage", "learnt", "task", "kind", "score"])
    >>> last = summarise(table).iloc[-1]
    >>> [round(float(last[name]), 6) for name in ("average_score", "backward_transfer", "average_forgetting")]
    [0.75, -0.2, 0.2]
    """
    import pandas as pd

    new, own = (evaluations[evaluations["kind"] == kind] for kind in (NEW, RETAINED))
    R = new.pivot(index="stage", columns="task", values="score")
    learnt = dict(zip(evaluations["stage"], evaluations["learnt"], strict=True))
    first = {task: stage for stage, task in learnt.items() if stage > 0}
    before = own[own["stage"] == 0].set_index("task")["score"]
    rows = []
    for stage in sorted(first.values()):
        earlier = [task for task, at in first.items() if at < stage]
        now = R.loc[stage, [*earlier, learnt[stage]]]
        at_first = pd.Series({task: R.loc[first[task], task] for task in earlier}, dtype="float64")
        best = pd.Series({task: R.loc[first[task] : stage - 1, task].max() for task in earlier}, dtype="float64")
        after = own[own["stage"] == stage].set_index("task")["score"]
        rows.append(
            {
                "stage": stage,
                "learnt": learnt[stage],
                "average_score": now.mean(),
                "backward_transfer": (now[earlier] - at_first).mean(),
                "average_forgetting": (best - now[earlier]).mean(),
                "retained_forgetting": (before - after).mean(),
            }
        )
    return pd.DataFrame(rows)

"""The result of a sweep: one table, a row a run, and where it came from. All pictures are made from it alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.report import summary
from spectra.tables_on_disk import Kind, load_tables, save_tables

if TYPE_CHECKING:
    import pandas as pd

    from spectra.comparison import Comparison
    from spectra.report.tradeoff_plots import SweepPlots

KIND = Kind("sweep", "sweep", "sweep.json", "sweep_")

# Every column with its type; missing values are allowed in all of them. `spectra define COLUMN` says what they are.
COLUMNS: Mapping[str, str] = {
    "run": "str",
    "method": "str",
    "position": "float64",
    "start": "Int64",
    "rank": "Int64",
    "learning_rate": "float64",
    "matched_position": "float64",
    "seed": "Int64",
    "status": "str",
    "reason": "str",
    "metric": "str",
    "score_before": "float64",
    "score": "float64",
    "validation_score": "float64",
    "loss": "float64",
    "retained_before": "float64",
    "retained_after": "float64",
    "forgetting": "float64",
    "steps": "Int64",
    "seconds": "float64",
    "trainable_parameters": "Int64",
    "relative_update": "float64",
    "diagonal_share": "float64",
    "diagonal_enrichment": "float64",
    "outside_share": "float64",
    "stable_rank": "float64",
    "left_overlap": "float64",
    "intruders": "Int64",
}


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        runs: a row a run, in the order of the grid, then finished runs of earlier grids in the same folder; columns are
            defined in `spectra/definitions.md`. A run that failed has status "failed", its reason, and no numbers.
        provenance: settings, the last grid, fingerprint of the base, and versions.
    """

    runs: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        finished = int((self.runs["status"] == "finished").sum())
        failed = int((self.runs["status"] == "failed").sum())
        return f"Sweep({finished} finished runs" + (f", {failed} failed)" if failed else ")")

    @property
    def plot(self) -> SweepPlots:
        """The pictures of this sweep: each method returns matplotlib Axes and takes `ax=`."""
        from spectra.report.tradeoff_plots import SweepPlots

        return SweepPlots(self.runs)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `sweep_runs.parquet` and `sweep.json` into `folder`, each atomically. Returns the folder.

        Raises: SpectraError where it cannot be written.
        """
        return save_tables(folder, KIND, {"runs": self.runs}, self.provenance)


def load_sweep(folder: str | os.PathLike[str]) -> Sweep:
    """A saved sweep, or as much as is finished of one under way. Needs none of its runs.

    Raises: SpectraError where `folder` holds none.
    """
    tables, provenance = load_tables(folder, KIND, ["runs"])
    return Sweep(tables["runs"], provenance)


def table_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table with all columns, of the same types whatever is missing."""
    import pandas as pd

    return pd.DataFrame(
        {name: pd.Series([row.get(name) for row in rows], dtype=kind) for name, kind in COLUMNS.items()}
    )


def spectral_columns(result: Comparison) -> dict[str, float | int | None]:
    """What a sweep tells of base and result: sums over the matrices as in `spectra compare`, medians of ranks."""
    layers = result.layers
    rows = summary.compared(layers)
    return {
        "relative_update": summary.pooled_update(layers),
        "diagonal_share": summary.pooled_share(rows, "diagonal_share"),
        "diagonal_enrichment": summary.pooled_enrichment(rows),
        "outside_share": summary.pooled_share(rows, "outside_share"),
        "stable_rank": summary.median(rows, "stable_rank"),
        "left_overlap": summary.median(rows, "left_overlap"),
        "intruders": int(rows["intruders"].sum()),
    }

"""A finished run: its numbers, its curves, its comparison, and where its files lie."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import SpectraError
from spectra.training.journal import read_lines
from spectra.training.settings import SETTINGS, TrainSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from spectra.comparison import Comparison
    from spectra.training.curves import RunPlots

SUMMARY = "summary.json"
ADAPTER, MODEL, COMPARISON = "adapter", "model", "comparison"


@dataclass(frozen=True)
class Run:
    """What a run left in its folder.

    Attributes:
        folder: with settings.json, metrics.jsonl, summary.json, `adapter/` or `model/`, `comparison/`, and a `step-N/`
            for every step that `keep_every` kept.
        settings: what was run.   summary: see `spectra.training.train`.
        model: the trained module with its new head, as long as the run is in memory; None after `load_run`.
    """

    folder: Path
    settings: TrainSettings
    summary: Mapping[str, Any]
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def metrics(self) -> pd.DataFrame:
        """A row per step and evaluation: step, split (train, test, and the retained tasks' names), loss, score, ..."""
        import pandas as pd

        return pd.DataFrame(read_lines(self.folder))

    @property
    def result(self) -> Path:
        """The adapter folder, or the folder of the whole model."""
        return self.folder / str(self.summary["result"])

    @property
    def comparison(self) -> Comparison:
        """Base and result as `spectra compare` holds them against each other. Raises `SpectraError` without one."""
        from spectra.comparison import load

        return load(self.folder / COMPARISON)

    @property
    def plot(self) -> RunPlots:
        """The pictures of this run: each method returns matplotlib Axes and takes `ax=`."""
        from spectra.training.curves import RunPlots

        return RunPlots(self)


def load_run(folder: str | os.PathLike[str]) -> Run:
    """A finished run from its folder. Raises `SpectraError` where there is none, or it is not finished."""
    root = Path(folder)
    if not (root / SETTINGS).exists():
        raise SpectraError(f"{root} holds no run ({SETTINGS} is missing); give a folder that `spectra train` wrote")
    try:
        summary = json.loads((root / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpectraError(f"the run in {root} is not finished; go on with it by --resume") from error
    except (OSError, ValueError) as error:
        raise SpectraError(f"{root / SUMMARY} cannot be read: {error}; train again") from error
    return Run(root, TrainSettings.from_file(root / SETTINGS), summary)

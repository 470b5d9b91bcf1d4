"""Scores of the models of a sequence: from a table of the user's, or from the runs beside the checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectra.errors import SpectraError
from spectra.report.sequence_table import SCORES, checked_scores, steps_of
from spectra.report.wording import printable

SUMMARY, METRICS, EVALUATIONS = "summary.json", "metrics.jsonl", "continual_evaluations.parquet"


def scores_from(file: str | os.PathLike[str], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Scores out of a CSV file with a column `label` and a column `score`, `forgetting`, or both; empty cells are gaps.

    Args: labels: of the models, as tables and pictures show them.
    Raises: SpectraError for a file that cannot be read, columns or labels that are not known, and cells without number.
    """
    import pandas as pd

    try:
        table = pd.read_csv(file, dtype={"label": "str"}, skipinitialspace=True)
    except OSError as error:
        reason = error.strerror or error
        raise SpectraError(
            f"{file} cannot be read: {reason}; give a CSV file with the columns label and score"
        ) from error
    except ValueError as error:
        raise SpectraError(f"{file} is no CSV table: {error}; give one with the columns label and score") from error
    wanted = [name for name in SCORES if name in table]
    if "label" not in table or not wanted:
        found = ", ".join(map(printable, table.columns))
        raise SpectraError(f"{file} has the columns {found}; give label, and score or forgetting")
    scores: dict[str, dict[str, Any]] = {}
    for row in table.to_dict("records"):
        label = str(row["label"])
        if label in scores:
            raise SpectraError(f"{file} names the model {printable(label)!r} twice; keep one of the lines")
        scores[label] = {name: row[name] for name in wanted}
    return checked_scores(scores, labels, str(file))


def scores_beside(sources: Mapping[str, str]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Scores that training left beside checkpoints, and notes on where they are from.

    Three kinds of folder are known: a finished run, whose result the checkpoint is (`summary.json`); a run in whose
    folder checkpoints lie that end in the number of their step (`metrics.jsonl`); and the stages of tasks learnt one
    after another. The score is the new task's; forgetting is what was lost of the old ones, on average.

    Args: sources: label -> path of the checkpoint. Others than paths, and files that cannot be read, have no scores.
    """
    scores: dict[str, dict[str, float]] = {}
    read: dict[str, None] = {}
    for label, source in sources.items():
        path = Path(source)
        if not source or not path.exists():
            continue
        path = path.absolute()
        for file, look in (
            (path.parent / SUMMARY, lambda file, path=path: _of_result(file, path.name)),
            (path.parent / METRICS, lambda file, path=path: _of_step(file, path)),
            (path.parent.parent / EVALUATIONS, lambda file, path=path: _of_stage(file, path.parent.name)),
        ):
            found = _known(look, file)
            if found:
                scores[label] = found
                read[f"{file.name} of the runs"] = None
                break
    return scores, [f"scores and forgetting were read from {', '.join(read)} beside the checkpoints"] if read else []


def _known(look: Any, file: Path) -> dict[str, float]:
    if not file.exists():
        return {}
    try:
        found: dict[str, float | None] = look(file)
    except (OSError, ValueError, KeyError, TypeError):  # a file of that name that is none of ours
        return {}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _of_result(file: Path, name: str) -> dict[str, float | None]:
    summary = json.loads(file.read_text(encoding="utf-8"))
    return {each: summary[each] for each in SCORES} if summary["result"] == name else {}


def _of_step(file: Path, path: Path) -> dict[str, float | None]:
    steps = steps_of([path.stem if path.is_file() else path.name])
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    at: dict[str, dict[int, float]] = {}
    for line in lines:
        if line["split"] != "train" and line.get("score") is not None:
            at.setdefault(line["split"], {})[line["step"]] = line["score"]
    if not steps:
        return {}
    new = at.pop("test", {})
    lost = [of[0] - of[steps[0]] for of in at.values() if 0 in of and steps[0] in of]
    return {"score": new.get(steps[0]), "forgetting": sum(lost) / len(lost) if lost else None}


def _of_stage(file: Path, folder: str) -> dict[str, float | None]:
    import pandas as pd

    rows = pd.read_parquet(file)
    number = int(folder.split("-")[0])
    now = rows[rows["stage"] == number]
    learnt = now[(now["kind"] == "new") & (now["task"] == now["learnt"])]["score"]
    own = rows[rows["kind"] == "retained"].set_index(["stage", "task"])["score"]
    lost = (own.loc[0] - own.loc[number]).mean() if {0, number} <= set(own.index.get_level_values(0)) else None
    return {"score": learnt.mean(), "forgetting": lost}

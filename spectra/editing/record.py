"""What is kept of an edit: its table, what a reader must know of it, and the record beside the files that it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.checkpoints import Adapter, Checkpoint
from spectra.checkpoints.wording import listed
from spectra.editing.edits import Edit
from spectra.editing.matrices import ABOUT, Treated, is_unlike
from spectra.engines.studying import Opened, Places
from spectra.linalg.lowrank import LowRank
from spectra.report.wording import in_full

if TYPE_CHECKING:
    import pandas as pd

RECORD = "spectra_edit.json"  # what was done, beside what came of it
WRITTEN = "written"  # in the record: the files of the edit
COLUMNS = (
    "name", "role", "layer", "status", "note", "update_norm", "change_norm", "energy_ratio", "rank_before",
    "rank_after", "intruders_before", "intruders_scaled", "intruders_after", "intruders_appeared", "control_lambda",
)  # fmt: skip
COUNTS = ("layer", *COLUMNS[8:14])
FRACTIONS = ("update_norm", "change_norm", "energy_ratio", "control_lambda")


def said(rows: Sequence[Treated], vectors: int) -> list[str]:
    """What a reader must know of the whole edit.

    Args: vectors: how many biases, norms and the like changed.
    """
    found = []
    if not vectors and not any(row.status == "edited" for row in rows):
        counted = [row for row in rows if row.numbers.get("intruders_before") is not None]
        why = "no intruder dimensions were found" if counted and not any(
            row.numbers["intruders_before"] for row in counted
        ) else "the edit changes nothing"  # fmt: skip
        found.append(f"{why}: every tensor is as it was, to the bit")
    if vectors:
        found.append(f"vectors (biases, norms) that were taken along: {vectors}")
    for why in dict.fromkeys(row.kept for row in rows if row.kept):
        names = [row.pair.matrix.name for row in rows if row.kept == why]
        found.append(f"not or not wholly edited, for {why}: {listed(names)}")
    found += in_full(row.fallbacks for row in rows)
    found += _of_control(rows)
    failed = sum(row.status == "failed" for row in rows)
    if failed:
        found.append(f"matrices that failed and are as they were: {failed}")
    return found


def _of_control(rows: Sequence[Treated]) -> list[str]:
    """How much a control moved the weights, where that is not about as much as what it stands in the place of."""
    stood = [(row.numbers["change_norm"], row.stands_for) for row in rows if row.stands_for]
    made, meant = (sqrt(sum(pair[at] ** 2 for pair in stood)) for at in (0, 1))
    unlike = sum(is_unlike(*pair) for pair in stood)
    if not unlike:
        return []
    return [
        f"the control changed the weights by {made:.3g}, and the scaling of intruders changes them by {meant:.3g} at "
        f"the same lambda (more than {ABOUT:.0%} apart in {unlike} of {len(stood)} matrices): compare the two at equal "
        "changes (--equal-change, or equal_change=True)"
    ]


def widened(checkpoint: Checkpoint, updates: Mapping[str, LowRank]) -> tuple[str, ...]:
    """What is to be said of new factors that are stored in a wider dtype than those that were there."""
    if not isinstance(checkpoint, Adapter):
        return ()
    found = [name for name, update in updates.items() if update.B.dtype != checkpoint.updates[name].dtype]
    if not found:
        return ()
    wide, narrow = (str(dtype).removeprefix("torch.") for dtype in (
        updates[found[0]].B.dtype, checkpoint.updates[found[0]].dtype
    ))  # fmt: skip
    return (f"modules whose factors are stored in {wide}, for {narrow} would round the edit: {len(found)}",)


def table(rows: Sequence[Treated]) -> pd.DataFrame:
    """A row per weight matrix."""
    import pandas as pd

    records = []
    for row in rows:
        matrix = row.pair.matrix
        head = {"name": matrix.name, "role": matrix.role, "layer": matrix.layer, "status": row.status, "note": row.note}
        records.append(head | row.numbers)
    kinds = dict.fromkeys(("name", "role", "status", "note"), "str") | dict.fromkeys(COUNTS, "Int64")
    kinds |= dict.fromkeys(FRACTIONS, "float64")
    return pd.DataFrame(records, columns=list(COLUMNS)).astype(kinds)


def write_record(
    folder: Path, what: Edit, pairs: Opened, where: Places, rows: pd.DataFrame, notes: Sequence[str]
) -> None:
    """Put what was done into a folder that holds all else that the edit writes."""
    options = {"edit": type(what).__name__.lower(), **asdict(what)}  # type: ignore[call-overload]
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    content = pairs.provenance(options, where) | {"notes": list(notes), WRITTEN: [*written, RECORD]}
    content["matrices"] = json.loads(rows.to_json(orient="records", double_precision=15))
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def files_of_record(folder: Path) -> set[Path]:
    """The files that an earlier edit wrote into a folder, relative to it; none where its record does not say."""
    try:
        content: Any = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    written = content.get(WRITTEN) if isinstance(content, dict) else None
    return {Path(name) for name in written if isinstance(name, str)} if isinstance(written, list) else set()

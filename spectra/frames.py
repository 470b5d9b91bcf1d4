"""Outcomes -> the tables of a comparison, with every column present and typed even where nothing was compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spectra.jobs import Outcome

if TYPE_CHECKING:
    from spectra.pairing import Unmatched

IDENTITY = ("tuned", "name", "tensor", "part", "role", "layer", "rows", "columns", "status", "note")
STORED = ("base_dtype", "tuned_dtype", "update_form")
MEASURES = (
    "base_norm", "update_norm", "relative_update", "cosine",
    "diagonal_share", "off_diagonal_share", "outside_share", "diagonal_enrichment",
    "spectral_norm_update", "nuclear_norm_update", "stable_rank", "effective_rank", "numerical_rank", "rank_tolerance",
    "low_rank", "low_rank_residual", "energy_rank_90", "energy_rank_99", "spectral_norm_base", "spectral_norm_tuned",
    "effective_rank_base", "effective_rank_tuned", "spectral_shift", "left_overlap", "right_overlap", "left_angle",
    "right_angle", "overlap_null",
    "intruders", "spread_intruders", "lowest_best_cosine", "cosine_null", "rounding_floor", "below_rounding_floor",
    "unmoved_share",
)  # fmt: skip
SOLVERS = ("base_algorithm", "tuned_algorithm")
RESIDUALS = ("tuned_residual",)
COUNTS = ("numerical_rank", "low_rank", "energy_rank_90", "energy_rank_99", "intruders", "spread_intruders")
TEXTS = ("tuned", "name", "tensor", "part", "role", "status", "note", *STORED, *SOLVERS)
COMPONENTS = (
    "component", "singular_value", "tuned_singular_value", "update_singular_value", "diagonal", "relative_diagonal",
    "row_energy", "column_energy", "outside_energy", "plasticity", "white_shift", "left_stability", "right_stability",
    "stability", "rotation", "gap",
)  # fmt: skip
SLICES = ("slice", "start", "stop", "block_energy", "cross_energy", "block_share", "cross_share", "plasticity")
UNMATCHED = ("tuned", "name", "side", "reason")


def layers_frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A row per (tuned, matrix). Missing measures are NaN, missing counts NA, missing words empty."""
    rows = [_layer_row(outcome) for outcome in outcomes]
    frame = pd.DataFrame(rows, columns=[*IDENTITY, *STORED, *MEASURES, *SOLVERS, *RESIDUALS])
    frame["layer"] = frame["layer"].astype("Int64")
    for column in COUNTS:
        frame[column] = frame[column].astype("Int64")
    for column in ("rows", "columns"):
        frame[column] = frame[column].astype("int64")
    for column in TEXTS:
        frame[column] = frame[column].astype("object").fillna("").astype("str")
    frame["below_rounding_floor"] = frame["below_rounding_floor"].astype("boolean").fillna(False).astype("bool")
    for column in (*MEASURES, *RESIDUALS):
        if column not in COUNTS and column != "below_rounding_floor":
            frame[column] = frame[column].astype("float64")
    return frame


def components_frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A row per (tuned, matrix, component)."""
    tables = ((o, {"component": np.arange(len(o.measured.components["gap"])), **o.measured.components})
              for o in outcomes if o.measured)  # fmt: skip
    return _stacked(tables, COMPONENTS, integers=("component",))


def slices_frame(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """A row per (tuned, matrix, slice)."""
    tables = ((o, o.measured.slices) for o in outcomes if o.measured)
    return _stacked(tables, SLICES, integers=("slice", "start", "stop"))


def unmatched_frame(unmatched: Iterable[tuple[str, Unmatched]]) -> pd.DataFrame:
    """A row per (tuned, name) that was not compared, with the reason."""
    rows = [(label, item.name, item.side, item.reason) for label, item in unmatched]
    return pd.DataFrame(rows, columns=list(UNMATCHED)).astype("str")


def _layer_row(outcome: Outcome) -> dict[str, Any]:
    pair, matrix = outcome.pair, outcome.pair.matrix
    return {
        "tuned": outcome.tuned,
        "name": matrix.name,
        "tensor": matrix.tensor,
        "part": matrix.part,
        "role": matrix.role,
        "layer": matrix.layer,
        "rows": matrix.rows,
        "columns": matrix.columns,
        "status": outcome.status,
        "note": outcome.note,
        "base_dtype": str(pair.base_dtype).removeprefix("torch."),
        "tuned_dtype": str(pair.tuned_dtype).removeprefix("torch."),
        **outcome.layer,
    }


def _stacked(
    tables: Iterable[tuple[Outcome, dict[str, Any]]], columns: Sequence[str], integers: Sequence[str]
) -> pd.DataFrame:
    """Tables of equal columns below each other, each row with its tuned model and matrix."""
    outcomes, parts = [], []
    for outcome, table in tables:
        outcomes.append(outcome)
        parts.append(table)
    lengths = [len(part[columns[0]]) for part in parts]
    data: dict[str, Any] = {
        "tuned": np.repeat(np.array([o.tuned for o in outcomes], dtype=object), lengths),
        "name": np.repeat(np.array([o.pair.matrix.name for o in outcomes], dtype=object), lengths),
    }
    for column in columns:
        kind = "int64" if column in integers else "float64"
        data[column] = np.concatenate([part[column] for part in parts]).astype(kind) if parts else np.empty(0, kind)
    return pd.DataFrame(data).astype({"tuned": "str", "name": "str"})

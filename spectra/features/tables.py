"""Measured shifts -> the tables of a `CovarianceShift`, with every column present and typed even where nothing was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spectra.features.layer import MeasuredShift

if TYPE_CHECKING:
    from spectra.matrices import Matrix
    from spectra.pairing import Unmatched

IDENTITY = ("name", "tensor", "part", "role", "layer", "rows", "columns", "note")
HOW = ("mode", "basis", "centred")
SIZES = (
    "base_norm", "update_norm", "held_share", "variance_base", "variance_tuned", "shift_norm", "relative_shift",
    "relative_own", "relative_inherited", "own_share", "inherited_share", "shift_diagonal_share",
    "shift_off_diagonal_share", "shift_outside_share", "cka", "bures_distance", "relative_bures_distance", "mean_shift",
    "relative_mean_shift",
)  # fmt: skip
COMPONENTS = (
    "component", "variance", "diagonal", "off_diagonal_energy", "own_diagonal", "inherited_diagonal", "variance_share",
    "normalised_diagonal", "normalised_off_diagonal_energy", "normalised_own_diagonal", "normalised_inherited_diagonal",
)  # fmt: skip
SLICES = (
    "slice", "start", "stop", "variance_share", "normalised_diagonal", "shift_share", "shift_block_share",
    "shift_cross_share",
)  # fmt: skip
UNMATCHED = ("name", "side", "reason")
INTEGERS = ("component", "slice", "start", "stop")

Row = tuple["Matrix", MeasuredShift]


def layers_frame(rows: Sequence[Row], how: dict[str, Any]) -> pd.DataFrame:
    """A row per weight matrix. `how` holds mode, basis and centred."""
    frame = pd.DataFrame(
        [_layer(matrix, measured) | how for matrix, measured in rows],
        columns=[*IDENTITY, *HOW, "samples", "directions", *SIZES],
    )
    frame["layer"] = frame["layer"].astype("Int64")
    kinds = dict.fromkeys(("rows", "columns", "samples", "directions"), "int64") | dict.fromkeys(SIZES, "float64")
    texts = dict.fromkeys(("name", "tensor", "part", "role", "note", "mode", "basis"), "str")
    return frame.astype(kinds | texts | {"centred": "bool"})


def components_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """A row per (matrix, direction of Q)."""
    return _stacked([(matrix.name, measured.components) for matrix, measured in rows], COMPONENTS)


def slices_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """A row per (matrix, slice of directions)."""
    return _stacked([(matrix.name, measured.slices) for matrix, measured in rows], SLICES)


def unmatched_frame(unmatched: Iterable[Unmatched]) -> pd.DataFrame:
    """A row per tensor or matrix that was not measured, with the reason."""
    found = [(item.name, item.side, item.reason) for item in unmatched]
    return pd.DataFrame(found, columns=list(UNMATCHED)).astype("str")


def _layer(matrix: Matrix, measured: MeasuredShift) -> dict[str, Any]:
    return {
        "name": matrix.name,
        "tensor": matrix.tensor,
        "part": matrix.part,
        "role": matrix.role,
        "layer": matrix.layer,
        "rows": matrix.rows,
        "columns": matrix.columns,
        **measured.layer,
    }


def _stacked(tables: Sequence[tuple[str, dict[str, Any]]], columns: Sequence[str]) -> pd.DataFrame:
    """Tables of equal columns below each other, each row with its matrix."""
    lengths = [len(table[columns[0]]) for _, table in tables]
    data: dict[str, Any] = {"name": np.repeat(np.array([name for name, _ in tables], dtype=object), lengths)}
    for column in columns:
        kind = "int64" if column in INTEGERS else "float64"
        parts = [table[column] for _, table in tables]
        data[column] = np.concatenate(parts).astype(kind) if parts else np.empty(0, kind)
    return pd.DataFrame(data).astype({"name": "str"})

"""The lines of the summary table of a covariance shift: what they say, not how they look."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from spectra.report import summary
from spectra.report.rows import Column, Line
from spectra.report.shift_summary import END_TO_END, measured, mode_of
from spectra.report.wording import matrices, number

if TYPE_CHECKING:
    import pandas as pd

    from spectra.shift import CovarianceShift


OUTSIDE = 1e-4  # a share under which nothing lies outside of the directions


def _share(value: float) -> str:
    if 0 < value < 1e-4:
        return "<0.01"
    return "-" if math.isnan(value) else number(100 * value, 3 if value >= 0.1 else 2)


def _cka(value: float) -> str:
    """Four digits, since what matters is how far it is from 1."""
    return "-" if math.isnan(value) else f"{value:.4f}"


COLUMNS = (
    Column(
        "shift",
        "size of the shift of the features' covariance: ||Sigma'_Y - Sigma_Y||_F / ||Sigma_Y||_F",
        "relative_shift",
        number,
        0,
    ),
    Column("own", "the part that the layer's own weights moved, on the same scale", "relative_own", number, 1),
    Column("inher", "the part that came in through its inputs, on the same scale", "relative_inherited", number, 1),
    Column("var x", "total variance of the features, tuned over base", "variance_ratio", number, 2),
    Column(
        "diag %",
        "energy of Delta on its diagonal: directions that gained or lost variance",
        "shift_diagonal_share",
        _share,
        3,
    ),
    Column(
        "off %",
        "energy of Delta off its diagonal: directions that became correlated",
        "shift_off_diagonal_share",
        _share,
        4,
    ),
    Column("out %", "energy of the shift outside the directions that were taken", "shift_outside_share", _share, 6),
    Column("cka", "linear CKA of the features before and after (1 = alike up to rotation and scale)", "cka", _cka, 2),
    Column(
        "bures",
        "Bures-Wasserstein distance of the covariances over sqrt(trace(Sigma_Y))",
        "relative_bures_distance",
        number,
        5,
    ),
)


def columns_of(result: CovarianceShift) -> list[Column]:
    """The columns that say something for the mode of this shift."""
    useless: set[str] = set()
    if mode_of(result) != END_TO_END:  # the same inputs: all of the shift is the layer's own
        useless |= {"relative_own", "relative_inherited"}
    rows = measured(result)
    if not (rows["shift_outside_share"] > OUTSIDE).any():
        useless.add("shift_outside_share")
    if not rows["cka"].notna().any():
        useless.add("cka")
    return [column for column in COLUMNS if column.measure not in useless]


def shift_lines(result: CovarianceShift, top: int) -> list[Line]:
    """The `top` most shifted matrices, then medians over each role and over all."""
    rows = measured(result)
    rows = rows.assign(variance_ratio=rows["variance_tuned"] / rows["variance_base"])
    lines = [
        Line("matrix", str(name), str(role), "", _values(rows.loc[[at]]))
        for at, name, role in zip(rows.index[:top], rows["name"], rows["role"], strict=False)
    ]
    if rows.empty:
        return lines
    for role in summary.role_order(rows):
        of_role = rows[rows["role"] == role]
        lines.append(Line("role", f"{role}, {matrices(len(of_role))}", "", "", _values(of_role)))
    return [*lines, Line("model", f"whole model, {matrices(len(rows))}", "", "", _values(rows))]


def _values(rows: pd.DataFrame) -> dict[str, float]:
    """Medians of every column over the rows that have it."""
    return {
        column.measure: float(np.median(known)) if len(known := rows[column.measure].dropna()) else math.nan
        for column in COLUMNS
    }

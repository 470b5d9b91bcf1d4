"""The lines of the summary of one tuned model (matrices, roles, the whole): what they say, not how they look."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spectra.report import summary
from spectra.report.wording import matrices, number

if TYPE_CHECKING:
    import pandas as pd

    from spectra.comparison import Comparison

OUTLIER, NOISE, FAILED = "*", "~", "!"
MARKS = {
    OUTLIER: "outlier: over 10 times the median update, or over 1 and 3 times the median; left out of the lines below",
    NOISE: "update under 3 times the noise of storing the weights: its other numbers may be noise",
    FAILED: "failed: see below",
}


@dataclass(frozen=True)
class Column:
    """A column of the summary table.

    Attributes:
        title: its heading; at most 7 characters.
        meaning: what it says, in words; {top} and {epsilon} stand for the options of the comparison.
        measure: the column of `layers` that it shows.
        write: how a value is written.
        priority: columns of a higher number are the first to go where the terminal is narrow.
    """

    title: str
    meaning: str
    measure: str
    write: Callable[[float], str]
    priority: int

    def explained(self, result: Comparison) -> str:
        """The meaning with the options of this comparison."""
        top, epsilon = summary.leading(result)
        return self.meaning.format(top=top, epsilon=epsilon)


def _share(value: float) -> str:
    if 0 < value < 1e-4:
        return "<0.01"
    return "-" if math.isnan(value) else number(100 * value, 3 if value >= 0.1 else 2)


def _two_digits(value: float) -> str:
    return number(value, 2)


def _hundredths(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _whole(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0f}"


COLUMNS = (
    Column("update", "size of the update D = tuned - base: ||D|| / ||W||", "relative_update", number, 0),
    Column(
        "sv x",
        "energy of D on the diagonal C_ii (singular values, to first order), over a random update's (1 = random)",
        "diagonal_enrichment",
        _two_digits,
        1,
    ),
    Column(
        "turn %", "energy of D that turns singular directions inside the base's basis", "off_diagonal_share", _share, 3
    ),
    Column("out %", "energy of D outside the base's basis (matrices that are not square)", "outside_share", _share, 4),
    Column("K90", "number of directions that hold 90% of the energy of D", "energy_rank_90", _whole, 2),
    Column(
        "kept",
        "overlap of the top-{top} output directions before and after (1 = the same)",
        "left_overlap",
        _hundredths,
        3,
    ),
    Column(
        "intr",
        "intruders: top-{top} tuned directions unlike every base direction (|cos| < {epsilon:g})",
        "intruders",
        _whole,
        1,
    ),
    Column("stable", "stable rank of D: ||D||_F^2 / ||D||_2^2", "stable_rank", number, 5),
    Column("eff", "effective rank of D: exp of the entropy of its singular values", "effective_rank", number, 5),
    Column("cosine", "cosine of the weights before and after", "cosine", number, 6),
)


@dataclass(frozen=True)
class Line:
    """One line: a matrix, a role, or the model.

    Attributes:
        kind: "matrix", "failed", "role" or "model".
        name: the matrix' name (untrusted), or what the line sums over.
        role: of a matrix; empty otherwise.
        marks: characters out of `MARKS`.
        values: column of `layers` -> value; NaN where there is none.
    """

    kind: str
    name: str
    role: str
    marks: str
    values: dict[str, float]


def model_lines(result: Comparison, tuned: str, top: int) -> list[Line]:
    """The `top` most changed matrices, up to five failed ones, the roles, the whole model without and with outliers.

    A line over several matrices has the pooled update sqrt(sum ||D||^2) / sqrt(sum ||W||^2), shares of the pooled
    energy sum ||D||^2, the sum of the intruders, and medians of everything else. Outliers are left out of a role's line
    unless the role has nothing else.
    """
    layers = summary.rows_of(result, tuned)
    outlier = summary.is_outlier(layers)
    moved = summary.compared(layers).sort_values("relative_update", ascending=False, kind="stable")
    lines = [
        Line(
            "matrix", name, role, (OUTLIER if outlier[at] else "") + (NOISE if noisy else ""), _values(moved.loc[[at]])
        )
        for at, name, role, noisy in zip(
            moved.index[:top], moved["name"], moved["role"], moved["below_rounding_floor"], strict=False
        )
    ]
    failed = layers[layers["status"] == "failed"]
    lines += [
        Line("failed", name, role, FAILED, {}) for name, role in zip(failed["name"][:5], failed["role"], strict=False)
    ]
    counting = layers[(layers["status"] == "unchanged") | layers.index.isin(moved.index)]  # a zero base has no size
    if moved.empty:
        return lines
    for role in summary.role_order(counting):
        rows = counting[counting["role"] == role]
        typical = rows[~outlier[rows.index]]
        lines.append(_sum("role", role, rows if typical.empty else typical, OUTLIER if typical.empty else ""))
    typical = counting[~outlier[counting.index]]
    if len(typical) < len(counting):
        lines.append(_sum("model", f"model without {OUTLIER}", typical, ""))
    return [*lines, _sum("model", "whole model", counting, "")]


def _sum(kind: str, what: str, rows: pd.DataFrame, marks: str) -> Line:
    moved = summary.compared(rows)
    values = _values(moved) | {
        "relative_update": summary.pooled_update(rows),
        "diagonal_enrichment": summary.pooled_enrichment(moved),
        "off_diagonal_share": summary.pooled_share(moved, "off_diagonal_share"),
        "outside_share": summary.pooled_share(moved, "outside_share"),
    }
    values["intruders"] = float(moved["intruders"].sum()) if moved["intruders"].notna().any() else math.nan
    return Line(kind, f"{what}, {matrices(len(rows))}", "", marks, values)


def _values(rows: pd.DataFrame) -> dict[str, float]:
    return {column.measure: summary.median(rows, column.measure) for column in COLUMNS}

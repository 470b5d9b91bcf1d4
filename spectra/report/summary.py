"""Sums over the rows of a comparison: the whole model, a role, what stands apart, what was left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.report.wording import pattern

if TYPE_CHECKING:
    import pandas as pd

    from spectra.comparison import Comparison

ROLES = (
    "token_embedding",
    "position_embedding",
    "conv",
    "query",
    "key",
    "value",
    "qkv",
    "attention_output",
    "router",
    "mlp_gate",
    "mlp_up",
    "mlp_down",
    "recurrent",
    "other",
    "pooler",
    "head",
)
BEFORE_THE_BLOCKS = ("token_embedding", "position_embedding", "conv")


@dataclass(frozen=True)
class Reason:
    """Why some tensors were not compared: the first such reason in full, and the names of all.

    Attributes:
        failed: whether they were paired and could not be measured.
    """

    text: str
    names: list[str]
    failed: bool = False


def tuned_labels(result: Comparison) -> list[str]:
    """The tuned models in the order given, including any of which no matrix was compared."""
    named = result.provenance.get("tuned")
    labels = [*(named if isinstance(named, Mapping) else ()), *result.layers["tuned"], *result.unmatched["tuned"]]
    return list(dict.fromkeys(str(label) for label in labels))


def leading(result: Comparison) -> tuple[int, float]:
    """How many leading directions were held against the base, and the threshold under which one is an intruder."""
    options = result.provenance.get("options")
    options = options if isinstance(options, Mapping) else {}
    return int(options.get("top", 10)), float(options.get("epsilon", 0.5))


def rows_of(result: Comparison, tuned: str) -> pd.DataFrame:
    """The rows of `layers` of one tuned model."""
    return result.layers[result.layers["tuned"] == tuned]


def compared(layers: pd.DataFrame) -> pd.DataFrame:
    """The rows that carry measures."""
    return layers[(layers["status"] == "compared") & layers["relative_update"].notna()]


def is_outlier(layers: pd.DataFrame) -> pd.Series[bool]:
    """Which matrices of one tuned model moved so far that they would drown the rest in any sum.

    A matrix stands apart where its relative update is over 10 times the (lower) median of the compared ones, or where
    it is over 1 and over 3 times that median: a retrained head, not a model that moved a lot everywhere.
    """
    moved = compared(layers)["relative_update"]
    if moved.empty:
        return layers["status"] != layers["status"]
    median = float(np.quantile(moved, 0.5, method="lower"))
    update = layers["relative_update"].where(layers["status"] == "compared")
    return (update > 10 * median) & (median > 0) | (update > 1) & (update > 3 * median)


def pooled_update(layers: pd.DataFrame) -> float:
    """sqrt(sum ||D||_F^2) / sqrt(sum ||W||_F^2) over the rows with norms; bit-identical matrices count with D = 0.

    A matrix whose base is all zero has no relative size and is left out. NaN where no row is left.
    """
    update = layers["update_norm"].where(layers["status"] != "unchanged", 0.0)
    known = update.notna() & (layers["base_norm"] > 0)
    base = math.hypot(*layers["base_norm"][known])
    return math.hypot(*update[known]) / base if base > 0 else math.nan


def pooled_shift(layers: pd.DataFrame) -> float:
    """sqrt(sum ||s' - s||^2) / sqrt(sum ||s||^2): the spectral shift of several matrices. NaN where none is known."""
    return math.sqrt(weighted_mean(layers["spectral_shift"] ** 2, layers["base_norm"]))


def pooled_share(layers: pd.DataFrame, share: str) -> float:
    """A share of ||D||_F^2 over several matrices: sum share ||D||_F^2 / sum ||D||_F^2. NaN where D = 0 everywhere."""
    return weighted_mean(layers[share], layers["update_norm"])


def expected_diagonal(layers: pd.DataFrame) -> float:
    """The diagonal's share of ||D||_F^2 over several matrices if the updates were random: 1 / max(m, n), pooled."""
    return weighted_mean(1 / layers[["rows", "columns"]].max(axis=1), layers["update_norm"])


def pooled_enrichment(layers: pd.DataFrame) -> float:
    """The diagonal's energy over several matrices, divided by what random updates of the same norms would put there."""
    expected = expected_diagonal(layers)
    return pooled_share(layers, "diagonal_share") / expected if expected > 0 else math.nan


def weighted_mean(values: pd.Series[float], norms: pd.Series[float]) -> float:
    """Mean of `values` weighted by squared `norms`, scaled so that no square overflows. NaN without weights."""
    known = values.notna() & norms.notna()
    largest = norms[known].max() if known.any() else 0.0
    if not largest > 0:
        return math.nan
    weights = (norms[known] / largest) ** 2
    return float((values[known] * weights).sum() / weights.sum())


def median(layers: pd.DataFrame, column: str) -> float:
    """Median of a column over the rows that have it; NaN where none has."""
    values = layers[column].dropna()
    return float(values.median()) if len(values) else math.nan


def least(layers: pd.DataFrame, column: str) -> pd.Series[Any]:
    """The row with the smallest value of a column that has values."""
    return layers.sort_values(column, kind="stable").iloc[0]


def most(layers: pd.DataFrame, column: str) -> pd.Series[Any]:
    """The row with the largest value of a column that has values."""
    return layers.sort_values(column, kind="stable", ascending=False).iloc[0]


def by_depth(layers: pd.DataFrame) -> pd.DataFrame:
    """The rows from the model's input to its output: what precedes the blocks, the blocks, the rest; roles in order."""
    role = layers["role"].map({role: place for place, role in enumerate(ROLES)}).fillna(len(ROLES)).to_numpy()
    first = layers["role"].isin(BEFORE_THE_BLOCKS).to_numpy()
    outside = np.where(first, -1, np.iinfo(np.int64).max)
    depth = np.where(layers["layer"].isna(), outside, layers["layer"].fillna(0).astype("int64").to_numpy())
    return layers.iloc[np.lexsort((role, depth))]


def depth_group(layers: pd.DataFrame) -> list[str]:
    """For each row the stretch of the model that it belongs to: "embed", the number of its block, or "head"."""
    first = layers["role"].isin(BEFORE_THE_BLOCKS)
    return [
        ("embed" if early else "head") if layer is None else str(layer)
        for layer, early in zip(layers["layer"].astype(object).where(layers["layer"].notna(), None), first, strict=True)
    ]


def role_order(layers: pd.DataFrame) -> list[str]:
    """The roles that occur, in the order in which data meets them."""
    return sorted(set(layers["role"]), key=lambda role: (ROLES.index(role) if role in ROLES else len(ROLES), role))


def left_out(result: Comparison, tuned: str) -> list[Reason]:
    """What was not compared, grouped by reason (numbers and quoted names aside), the commonest first."""
    groups: dict[str, Reason] = {}
    failed = rows_of(result, tuned)
    failed = failed[failed["status"] == "failed"]
    missing = result.unmatched[result.unmatched["tuned"] == tuned]
    for name, note in zip(failed["name"], failed["note"], strict=True):
        reason = f"failed: {note or 'no reason was recorded'}"
        groups.setdefault(pattern(reason), Reason(reason, [], failed=True)).names.append(str(name))
    for name, reason in zip(missing["name"], missing["reason"], strict=True):
        groups.setdefault(pattern(str(reason)), Reason(str(reason), [])).names.append(str(name))
    return sorted(groups.values(), key=lambda reason: -len(reason.names))

"""Overlaps of whole models: the rows of all matrices of a pair pooled into one, or of those that do not stand apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import nan, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.report.summary import is_outlier

if TYPE_CHECKING:
    import pandas as pd

BASE = "base"  # the label of the base weight itself
OF_SIDE = ("overlap", "overlap_null", "smallest_angle", "smallest_angle_null", "largest_angle", "largest_angle_null")
MEANS = tuple(f"{side}_{name}" for side in ("left", "right") for name in OF_SIDE)
PAIRS = (
    "first", "second", "matrices", "first_matrices", "second_matrices", "apart", "left_out", *MEANS, "update_cosine",
    "update_cosine_null", "sign_agreement", "sign_agreement_null", "shared_entries", "first_norm", "second_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Moved:
    """The update of one tuned model, matrix by matrix.

    Attributes:
        rows: its rows against the base, of the matrices that are known (compared or unchanged), by name.
        apart: names of those that stand apart (`summary.is_outlier`), as a head that was trained anew does.
    """

    rows: pd.DataFrame
    apart: frozenset[str]

    @property
    def norms(self) -> pd.Series[float]:
        """||D||_F by name; 0 where nothing moved."""
        return self.rows["second_norm"]

    @property
    def relative(self) -> pd.Series[float]:
        """||D||_F / ||W||_F by name; NaN where W = 0."""
        return self.rows["second_norm"] / self.rows["first_norm"].where(self.rows["first_norm"] > 0)

    @property
    def apart_share(self) -> float:
        """The share of ||D||_F^2 that those apart hold; NaN where nothing moved."""
        total = float(np.linalg.norm(self.norms))
        return float(np.linalg.norm(self.norms[sorted(self.apart)])) ** 2 / total**2 if total else nan


def moved(matrices: pd.DataFrame, label: str) -> Moved:
    """What is known of the update of one tuned model from the table `matrices` of an `Overlap`."""
    rows = matrices[(matrices["first"] == BASE) & (matrices["second"] == label)]
    model = Moved(rows[rows["status"].isin(("compared", "unchanged"))].set_index("name"), frozenset())
    apart = model.rows.index[is_outlier(model.rows.assign(relative_update=model.relative))]
    if not (model.norms.drop(apart) > 0).any():  # nothing is left to stand apart from
        return model
    return replace(model, apart=frozenset(apart))


def pooled_pairs(matrices: pd.DataFrame, labels: Sequence[str], outliers: bool = True) -> pd.DataFrame:
    """A row per pair: every tuned model that moved against the base, then against the others; columns `PAIRS`.

    Args:
        matrices: of an `Overlap`.   labels: of its tuned models, in order.
        outliers: False leaves out the matrices that stand apart in either model, and pairs of which nothing is left.
    """
    import pandas as pd

    of_model = {label: moved(matrices, label) for label in labels}
    rows = [*_against_base(of_model, outliers), *_against_each_other(matrices, of_model, outliers)]
    counts = ("matrices", "first_matrices", "second_matrices", "apart", "left_out", "shared_entries")
    kinds = {name: "int64" if name in counts else "str" if name in PAIRS[:2] else "float64" for name in PAIRS}
    return pd.DataFrame(rows, columns=list(PAIRS)).astype(kinds)


def _against_base(of_model: dict[str, Moved], outliers: bool) -> Iterator[dict[str, Any]]:
    for label, model in of_model.items():
        left_out = [] if outliers else sorted(model.apart)
        rows = model.rows.drop(left_out)
        shared = rows[rows["status"] == "compared"]
        if shared.empty:
            continue
        counts = {"first_matrices": len(rows), "second_matrices": len(shared)}
        counts |= {"apart": len(model.apart), "left_out": len(left_out)}
        norms = rows["first_norm"].to_numpy(), rows["second_norm"].to_numpy()
        weights = shared["second_norm"].to_numpy()
        yield {"first": BASE, "second": label, **counts, **_pooled(shared, weights, *norms)}


def _against_each_other(
    matrices: pd.DataFrame, of_model: dict[str, Moved], outliers: bool
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row per two models that both moved, of matrices that are known in both; those one left alone count as D = 0."""
    for first, second in combinations(of_model, 2):
        one, other = of_model[first], of_model[second]
        found = matrices[(matrices["first"] == first) & (matrices["second"] == second)]
        shared = found[found["status"] == "compared"].set_index("name")
        names = one.norms.index.intersection(other.norms.index)
        # Parts of different sizes, of a vocabulary that one of the two extended, could not be held together.
        apart_in_size = (one.norms[names] > 0) & (other.norms[names] > 0) & ~names.isin(shared.index)
        names = names[~apart_in_size]
        apart = names.intersection(sorted(one.apart | other.apart))
        left_out = names[:0] if outliers else apart
        names = names.drop(left_out)
        a, b = one.norms[names].to_numpy(), other.norms[names].to_numpy()
        if not (a.any() and b.any()):
            continue
        shared = shared.loc[shared.index.intersection(names)]
        counts = {"first_matrices": int((a > 0).sum()), "second_matrices": int((b > 0).sum())}
        counts |= {"apart": len(apart), "left_out": len(left_out)}
        weights = (shared["first_norm"] * shared["second_norm"]).to_numpy()
        yield {"first": first, "second": second, **counts, **_pooled(shared, weights, a, b)}


def _pooled(
    shared: pd.DataFrame, weights: np.ndarray[Any, Any], a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Means over the matrices that both moved, the signs of all entries that both moved, and the cosine of the whole.

    a and b are the norms of all matrices.
    """
    sizes = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    both = (shared["first_norm"] * shared["second_norm"]).to_numpy()
    entries, signed = (shared[name].to_numpy(dtype=np.float64) for name in ("entries", "shared_entries"))
    inner = float((shared["update_cosine"].fillna(0.0).to_numpy() * both).sum())
    spread = float(np.linalg.norm(both / np.sqrt(entries)))
    whole = sizes[0] * sizes[1]
    return {
        "matrices": len(shared),
        **{name: _mean(shared[name].to_numpy(), weights) for name in MEANS},
        "update_cosine": inner / whole if whole else nan,
        "update_cosine_null": spread / whole if whole else nan,
        "sign_agreement": _mean(shared["sign_agreement"].to_numpy(), signed),
        "sign_agreement_null": 0.5 if len(shared) else nan,
        "shared_entries": int(signed.sum()),
        "first_norm": sizes[0],
        "second_norm": sizes[1],
    }


def _mean(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> float:
    known = ~np.isnan(values)
    return float(np.average(values[known], weights=weights[known])) if weights[known].sum() > 0 else nan


def longer(row: Any) -> float:
    """||D_a + D_b||_F over what it would be if the two were orthogonal: 1 = neither adds up nor cancels.

    Args: row: of `pooled_pairs`.
    """
    a, b = row["first_norm"], row["second_norm"]
    return sqrt(max(0.0, 1 + 2 * row["update_cosine"] * a * b / (a * a + b * b)))

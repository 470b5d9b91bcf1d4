"""The tables of intruder dimensions: every leading triplet, every matrix, and counts for any threshold and any k."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

TRIPLETS = (
    "tuned", "name", "side", "index", "tuned_singular_value", "best_cosine", "partner", "cluster_cosine",
    "cluster_members", "cosine_null",
)  # fmt: skip
MATRICES = (
    "tuned", "name", "role", "layer", "rows", "columns", "status", "note", "left_intruders", "right_intruders",
    "base_algorithm", "tuned_algorithm", "tuned_residual",
)  # fmt: skip
COUNTS = ("tuned", "side", "k", "epsilon", "intruders", "matrices_with_intruders")


def tables(triplets: Iterable[Sequence[Any]], matrices: Iterable[Sequence[Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables of an `Intrusion` from their rows, whose values are in the order of `TRIPLETS` and `MATRICES`."""
    import pandas as pd

    texts = dict.fromkeys(("tuned", "name", "role", "status", "note", "base_algorithm", "tuned_algorithm"), "str")
    integers = dict.fromkeys(("layer", "left_intruders", "right_intruders"), "Int64")
    kinds = {"tuned": "str", "name": "str", "side": "str", "index": "int64", "partner": "int64",
             "cluster_members": "int64"}  # fmt: skip
    numbers = dict.fromkeys(("tuned_singular_value", "best_cosine", "cluster_cosine", "cosine_null"), "float64")
    return (
        pd.DataFrame(list(triplets), columns=list(TRIPLETS)).astype({**kinds, **numbers}),
        pd.DataFrame(list(matrices), columns=list(MATRICES)).astype({**texts, **integers, "tuned_residual": "float64"}),
    )


def intruder_counts(
    triplets: pd.DataFrame, labels: Sequence[str], sides: Sequence[str], epsilons: Sequence[float], ks: Sequence[int]
) -> pd.DataFrame:
    """A row per (tuned, side, k, epsilon): how many intruders there are, and in how many matrices; columns `COUNTS`.

    Args: triplets: of an `Intrusion`.   labels: of its tuned models.
    """
    import pandas as pd

    rows = []
    for tuned in labels:
        for side in sides:
            of_side = triplets[(triplets["tuned"] == tuned) & (triplets["side"] == side)]
            for k in ks:
                for epsilon in epsilons:
                    found = of_side[(of_side["index"] < k) & (of_side["best_cosine"] < epsilon)]
                    rows.append((tuned, side, k, epsilon, len(found), found["name"].nunique()))
    return pd.DataFrame(rows, columns=list(COUNTS))


def deepest(matrices: pd.DataFrame, k: int) -> int:
    """How many of the k leading triplets the largest of the matrices has; k where none could be read.

    Args: matrices: of an `Intrusion`.
    """
    read = matrices[matrices["status"] != "failed"]
    return min(k, int(read[["rows", "columns"]].min(axis=1).max())) if len(read) else k

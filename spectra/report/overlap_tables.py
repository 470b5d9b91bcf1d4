"""The tables of an overlap: a row per pair and matrix, a cell per pair, matrix, side and number of directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spectra.report.overlap_pairs import BASE, MEANS

if TYPE_CHECKING:
    import pandas as pd

MEASURES = (
    "first_rank", "second_rank", *MEANS, "update_cosine", "update_cosine_null", "sign_agreement",
    "sign_agreement_null", "shared_entries", "first_norm", "second_norm", "entries",
)  # fmt: skip
MATRICES = ("first", "second", "name", "role", "layer", "rows", "columns", "status", "note", *MEASURES)
GRIDS = ("first", "second", "name", "side", "i", "j", "overlap", "overlap_null")


def tables(
    rows: Sequence[Mapping[str, Any]], grids: Sequence[tuple[Any, ...]], labels: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`matrices` and `grids` of an `Overlap`.

    Args:
        rows: values by column of `MATRICES`, absent where unknown, in any order of the pairs.
        grids: values in the order of `GRIDS`.   labels: of the tuned models, in order.
    """
    import pandas as pd

    place = {label: at for at, label in enumerate([BASE, *labels])}
    # By pair; the order of the matrices within a pair stays that of reading.
    rows = sorted(rows, key=lambda row: (place[row["first"]], place[row["second"]]))
    counts = dict.fromkeys(("layer", "first_rank", "second_rank", "shared_entries", "entries"), "Int64")
    texts = dict.fromkeys(("first", "second", "name", "role", "status", "note"), "str")
    numbers = {name: "float64" for name in MEASURES if name not in counts}
    of_grid = {"i": "int64", "j": "int64", "overlap": "float64", "overlap_null": "float64"}
    return (
        pd.DataFrame(rows, columns=list(MATRICES)).astype({**texts, **counts, **numbers}),
        pd.DataFrame(list(grids), columns=list(GRIDS)).astype(
            {**dict.fromkeys(("first", "second", "name", "side"), "str"), **of_grid}
        ),
    )

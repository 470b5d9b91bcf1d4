"""Sums over the rows of a covariance shift: what the samples say, which slices moved, where along depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from spectra.shift import CovarianceShift

DATA_FREE = "data_free"
END_TO_END = "end_to_end"


def mode_of(result: CovarianceShift) -> str:
    """`same_inputs`, `end_to_end` or `data_free`."""
    modes = list(result.layers["mode"])
    return str(modes[0]) if modes else str(result.provenance.get("mode", DATA_FREE))


def measured(result: CovarianceShift) -> pd.DataFrame:
    """The rows of `layers` that carry a shift, the strongest first."""
    layers = result.layers
    rows = layers[np.isfinite(layers["relative_shift"])]
    ordered: pd.DataFrame = rows.sort_values("relative_shift", ascending=False, kind="stable")
    return ordered


def functional_summary(samples: pd.DataFrame) -> pd.DataFrame:
    """Mean, its standard error and percentiles of every measure of the functional check that any sample has.

    Args:
        samples: `CovarianceShift.functional`.
    Returns: indexed by measure (`kl`, `base_loss`, ...): `samples` (how many have it), `mean`, `standard_error` (sample
        standard deviation over the root of their number; NaN for a single one), `p05`, `median`, `p95`, all float64.
    """
    import pandas as pd

    rows = {}
    for measure in samples.columns.drop("sample", errors="ignore"):
        values = samples[measure].to_numpy(dtype=np.float64)
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan
        low, middle, high = np.percentile(values, [5, 50, 95])
        rows[measure] = [float(len(values)), float(values.mean()), error, low, middle, high]
    columns = ["samples", "mean", "standard_error", "p05", "median", "p95"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype="float64")


def slice_shares(result: CovarianceShift) -> pd.DataFrame:
    """Per number of a slice, medians over the matrices that shifted: `variance_share` and `shift_share`."""
    shifted = result.layers["name"][result.layers["relative_shift"] > 0]
    known = result.slices[np.isfinite(result.slices["shift_share"]) & result.slices["name"].isin(shifted)]
    medians: pd.DataFrame = known.groupby("slice")[["variance_share", "shift_share"]].median()
    return medians


def by_layer(layers: pd.DataFrame, column: str) -> pd.Series[float]:
    """The median of a column over the matrices of each numbered block, by block."""
    rows = layers[layers["layer"].notna() & np.isfinite(layers[column])]
    medians: pd.Series[float] = rows.groupby(rows["layer"].astype("int64"))[column].median()
    return medians

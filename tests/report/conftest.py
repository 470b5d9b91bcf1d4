"""Comparisons of real and of made-up weights, computed by the project itself."""

from __future__ import annotations

import dataclasses
import re
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch

import spectra
from spectra.comparison import Comparison
from tests.report.made_weights import changed, noise, weights


@pytest.fixture(scope="session")
def real() -> Comparison:
    """The real base and its two real fine-tunings."""
    if find_spec("rxnfp") is None:
        pytest.skip("the package rxnfp, which carries the weights, is not installed")
    from spectra.demo import real_pair

    return spectra.compare(*real_pair())


@pytest.fixture(scope="session")
def two() -> Comparison:
    """Two tuned models: "a" moved little, but for its pooler, which is an outlier; "b" moved more, mostly late."""

    def retrained(name: str, weight: torch.Tensor) -> torch.Tensor:
        moved = noise(0.05)(name, weight)
        return (
            moved + 5 * torch.randn(24, 24, generator=torch.Generator().manual_seed(9)) if "pooler" in name else moved
        )

    def late(name: str, weight: torch.Tensor) -> torch.Tensor:
        layer = re.search(r"layer\.(\d)", name)
        return noise(0.1 * (1 + int(layer[1]) if layer else 1))(name, weight)

    base = weights()
    return spectra.compare(base, {"a": changed(base, retrained), "b": changed(base, late)})


@pytest.fixture(scope="session")
def failing() -> Comparison:
    """One matrix is bit-identical, one holds a NaN, one is missing; the most changed one has markup in its name."""
    hostile = "x.[red]<script>alert(1)</script>\x1b[31m.weight"
    base = weights() | {hostile: torch.eye(6), "gone.weight": torch.eye(3)}
    tuned = changed(base, noise(0.05))
    tuned[hostile] = base[hostile] + torch.diag(torch.arange(6) / 10)
    same, bad = "bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.1.intermediate.dense.weight"
    tuned[same] = base[same].clone()
    tuned[bad][0, 0] = float("nan")
    del tuned["gone.weight"]
    return spectra.compare(base, {"[bold]t<b>": tuned})


@pytest.fixture
def unchanged() -> Comparison:
    base = weights()
    return spectra.compare(base, {"tuned": {name: weight.clone() for name, weight in base.items()}})


@pytest.fixture
def all_failed() -> Comparison:
    base = weights()
    return spectra.compare(base, {"tuned": changed(base, lambda _, weight: torch.full_like(weight, float("nan")))})


@pytest.fixture
def single() -> Comparison:
    """One matrix with one component."""
    return spectra.compare({"fc.weight": torch.ones(1, 5)}, {"tuned": {"fc.weight": torch.ones(1, 5) * 1.1}})


@pytest.fixture
def empty(two: Comparison) -> Comparison:
    """No rows at all."""
    tables = {name: getattr(two, name).iloc[:0] for name in ("layers", "components", "slices", "unmatched")}
    return Comparison(**tables)


@pytest.fixture
def all_nan(two: Comparison) -> Comparison:
    """Rows that claim to be compared and have no numbers."""

    def blank(table: pd.DataFrame, keep: set[str]) -> pd.DataFrame:
        table = table.copy()
        for column in table.select_dtypes("number").columns:
            if column not in keep:
                table[column] = np.nan
        return table

    layers = blank(two.layers, {"layer", "rows", "columns"})
    components = blank(two.components, {"component"})
    return dataclasses.replace(two, layers=layers, components=components, slices=blank(two.slices, {"start", "stop"}))


@pytest.fixture(params=["unchanged", "all_failed", "single", "empty", "all_nan", "failing"])
def odd(request: pytest.FixtureRequest) -> Comparison:
    """Every comparison that has little or nothing to say."""
    result: Comparison = request.getfixturevalue(request.param)
    return result

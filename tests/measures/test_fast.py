"""`fast`: iterated triplets say the same as computed ones, and nothing is said that was not computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import spectra
from spectra.linalg.iterative import LANCZOS, lanczos_triplets
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.perturbed import perturbed_triplets
from spectra.linalg.svd import svd
from spectra.linalg.triplets import leading_triplets
from spectra.measures.matrix import Measured, measure

SHAPES = [(96, 96), (80, 200), (200, 80)]
UNKNOWN = {
    "nuclear_norm_update", "effective_rank", "numerical_rank", "energy_rank_90", "energy_rank_99",
    "effective_rank_tuned", "spectral_shift", "low_rank", "low_rank_residual",
}  # fmt: skip


def weight(m: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator) * torch.exp(torch.randn(m, 1, generator=generator))


def factors(m: int, n: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, 4, generator=generator), torch.randn(4, n, generator=generator), 0.3)


def measured(W: Tensor, tuned: Tensor | LowRank, fast: bool) -> Measured:
    return measure(W, svd(W), tuned, base_dtype=torch.float32, tuned_dtype=torch.float32, fast=fast)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["dense", "factors"])
def test_what_is_said_is_what_the_direct_way_says(shape: tuple[int, int], form: str) -> None:
    W, D = weight(*shape, seed=0), factors(*shape, seed=1)
    tuned = D if form == "factors" else W + D.dense()
    direct, fast = measured(W, tuned, fast=False), measured(W, tuned, fast=True)
    assert fast.layer["tuned_algorithm"].startswith(LANCZOS)
    assert fast.layer["tuned_residual"] < 1e-5
    missing = {"effective_rank_tuned", "spectral_shift"} if form == "factors" else UNKNOWN
    for column, value in direct.layer.items():
        if column in missing:
            assert fast.layer[column] is None or np.isnan(fast.layer[column]), column
        elif isinstance(value, float | int) and column != "tuned_residual":
            assert fast.layer[column] == pytest.approx(value, rel=2e-5, abs=1e-5, nan_ok=True), column
    for column, array in direct.components.items():
        known = ~np.isnan(fast.components[column])
        scale = direct.layer["update_norm"] ** 2 if column.endswith("energy") else max(1.0, np.nanmax(np.abs(array)))
        np.testing.assert_allclose(fast.components[column][known], array[known], atol=2e-5 * scale, err_msg=column)
    for column, array in direct.slices.items():
        np.testing.assert_allclose(fast.slices[column], array, rtol=1e-4, atol=1e-4 * np.abs(array).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_iterated_triplets_of_a_sum_are_those_of_the_formed_matrix(shape: tuple[int, int]) -> None:
    W, D = weight(*shape, seed=2), factors(*shape, seed=3)
    exact = leading_triplets(W.double() + D.dense().double(), 5)
    found = perturbed_triplets(svd(W, torch.float64), D, 5, iterate=True)
    np.testing.assert_allclose(found.S.numpy(), exact.S[:5].numpy(), rtol=1e-6)
    for side in ("Y", "Z"):
        cosines = (getattr(found, side) * getattr(exact, side)).sum(0).abs()
        np.testing.assert_allclose(cosines.numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_what_iteration_cannot_do_is_done_directly(scale: float) -> None:
    W = weight(96, 80, seed=4) * scale
    with pytest.raises(LapackError):
        lanczos_triplets(W, 10)
    row = measured(W, 1.5 * W, fast=True).layer
    assert row["tuned_algorithm"] == "gram64"
    assert row["diagonal_share"] == pytest.approx(1)


def test_small_matrices_are_done_directly() -> None:
    row = measured(weight(12, 20, seed=5), weight(12, 20, seed=6), fast=True).layer
    assert row["tuned_algorithm"] == "gram64"
    assert row["numerical_rank"] == 12


def test_the_same_input_gives_the_same_output() -> None:
    W, D = weight(96, 80, seed=7), factors(96, 80, seed=8)
    one, two = (measured(W, W + D.dense(), fast=True) for _ in range(2))
    for column, array in one.components.items():
        np.testing.assert_array_equal(array, two.components[column])


def test_a_fast_comparison_can_be_read_drawn_and_saved(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = {f"layers.{i}.q_proj.weight": weight(160, 140, seed=i) for i in range(3)}
    result = spectra.compare(base, {name: W + 0.1 * weight(160, 140, seed=9) for name, W in base.items()}, fast=True)
    assert result.provenance["options"]["fast"]
    assert result.layers["numerical_rank"].isna().all()
    assert (result.layers["stable_rank"] > 1).all()
    assert result.diagnosis()
    assert result._repr_html_()
    again = spectra.load(result.save(tmp_path_factory.mktemp("out")))
    assert again.layers.equals(result.layers)
    result.plot.spectrum("layers.1.q_proj.weight")
    result.plot.profile("layers.1.q_proj.weight")

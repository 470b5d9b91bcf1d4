"""The measures of a whole matrix, each against its defining formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.svd import svd
from spectra.measures.matrix import Measured, measure
from tests.reference import decomposition, whole
from tests.reference import intruders as reference
from tests.reference.singular import Array, clusters
from tests.reference.singular import svd as reference_svd
from tests.strategies import build, pairs, seeds, shapes


def measured(W: Tensor, tuned: Tensor | LowRank) -> Measured:
    """What `compare` asks for: the stored weight is upcast once, both are stored in W's dtype."""
    wide = W if W.dtype == torch.float64 else W.float()
    return measure(wide, svd(W), tuned, base_dtype=W.dtype, tuned_dtype=W.dtype)


def assert_spectra_agree(layer: dict[str, Any], W: Array, tuned: Array) -> None:
    """Everything that follows from singular values and norms; D is not zero."""
    D = tuned - W
    expected = {
        "relative_update": whole.relative_update(W, D),
        "cosine": whole.cosine(W, tuned),
        "update_norm": np.linalg.norm(D),
        "base_norm": np.linalg.norm(W),
        "spectral_norm_update": whole.spectral_norm(D),
        "nuclear_norm_update": whole.nuclear_norm(D),
        "stable_rank": whole.stable_rank(D),
        "effective_rank": whole.effective_rank(D),
        "energy_rank_90": whole.energy_rank(D, 0.90),
        "energy_rank_99": whole.energy_rank(D, 0.99),
        "spectral_norm_base": whole.spectral_norm(W),
        "spectral_norm_tuned": whole.spectral_norm(tuned),
        "effective_rank_base": whole.effective_rank(W),
        "effective_rank_tuned": whole.effective_rank(tuned),
    }
    for name, value in expected.items():
        absolute = 1e-7 if name == "cosine" else 0  # a cosine near zero is a cancellation
        assert layer[name] == pytest.approx(value, rel=1e-6, abs=absolute), name
    shift = whole.spectral_shift(W, tuned)
    assert layer["spectral_shift"] == pytest.approx(shift, rel=1e-6, abs=1e-8)


@given(pairs(kinds=("gaussian", "separated", "decaying", "clustered")))
@settings(max_examples=120)
def test_norms_ranks_and_shifts_equal_their_formulas(pair: tuple[Tensor, Tensor]) -> None:
    W, D = pair
    wide = W.to(D.dtype)
    tuned = wide + D
    if torch.equal(tuned, wide):
        return  # the update vanished in the rounding of W + D
    layer = measured(W, tuned).layer
    assert_spectra_agree(layer, wide.double().numpy(), tuned.double().numpy())
    assert layer["numerical_rank"] == whole.numerical_rank((tuned - wide).double().numpy(), layer["rank_tolerance"])


@given(pairs(kinds=("separated",), unscaled=True))
@settings(max_examples=80)
def test_leading_subspaces_and_intruders_equal_their_formulas(pair: tuple[Tensor, Tensor]) -> None:
    W, D = (X.double() for X in pair)
    tuned = W + D
    dense, dense_tuned = W.numpy(), tuned.numpy()
    if any(len(clusters(X.s, 1e-2)) < len(X.s) for X in (reference_svd(dense), reference_svd(dense_tuned))):
        return
    layer = measured(W, tuned).layer
    for side, transpose in (("left", lambda X: X), ("right", np.transpose)):
        args = (transpose(dense), transpose(dense_tuned), 10)
        assert layer[f"{side}_overlap"] == pytest.approx(whole.subspace_overlap(*args), abs=1e-9)
        assert layer[f"{side}_angle"] == pytest.approx(whole.largest_principal_angle(*args), abs=1e-7)
    matches = reference.best_matches(dense, dense_tuned)
    assert layer["lowest_best_cosine"] == pytest.approx(min(match.best_cosine for match in matches), abs=1e-9)
    if all(abs(match.best_cosine - 0.5) > 1e-6 for match in matches):
        assert layer["intruders"] == len(reference.intruders(dense, dense_tuned))


@pytest.mark.parametrize("angle", [1e-8, 0.5, np.pi / 2 - 1e-8])
def test_principal_angles_near_zero_and_near_a_right_angle_are_exact(angle: float) -> None:
    """The cosine of 1e-8, and the sine of what it lacks to a right angle, are 1 in float64."""
    W = torch.diag(torch.arange(20.0, 0.0, -1.0, dtype=torch.float64))
    turn = torch.eye(20, dtype=torch.float64)
    turn[9, 9] = turn[10, 10] = np.cos(angle)
    turn[9, 10], turn[10, 9] = -np.sin(angle), np.sin(angle)
    layer = measured(W, turn @ W).layer
    assert layer["left_angle"] == pytest.approx(angle, rel=0, abs=1e-12)
    assert layer["right_angle"] == pytest.approx(0, abs=1e-10)


@given(shapes, st.integers(1, 6), seeds, st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60)
def test_factors_and_their_product_are_measured_alike(
    shape: tuple[int, int], rank: int, seed: int, dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(seed)
    m, n = shape
    W = torch.from_numpy(build(generator, "separated", m, n)).to(dtype)
    B = torch.from_numpy(0.1 * generator.normal(size=(m, rank))).to(dtype)
    A = torch.from_numpy(generator.normal(size=(rank, n))).to(dtype)
    W64, D64 = W.double().numpy(), (0.5 * (B.double() @ A.double())).numpy()
    got = measured(W, LowRank(B, A, 0.5))
    assert_spectra_agree(got.layer, W64, W64 + D64)
    assert got.layer["numerical_rank"] == min(rank, m, n)
    expected = decomposition.decompose(W64, D64)
    total = expected.update_energy
    np.testing.assert_allclose(got.components["row_energy"], expected.row_energy, rtol=0, atol=2e-6 * total)
    np.testing.assert_allclose(got.components["outside_energy"], expected.outside_energy, rtol=0, atol=2e-6 * total)
    np.testing.assert_allclose(got.components["plasticity"], expected.plasticity, rtol=0, atol=2e-6)
    after = reference_svd(W64 + D64)
    np.testing.assert_allclose(got.components["tuned_singular_value"], after.s, rtol=0, atol=1e-6 * after.s[0])


@given(pairs(dtypes=(torch.float32, torch.float64), unscaled=True))
@settings(max_examples=60)
def test_the_table_of_components_and_the_row_tell_one_story(pair: tuple[Tensor, Tensor]) -> None:
    W, D = pair
    got = measured(W, W + D)
    k = min(W.shape)
    assert all(len(column) == k for column in got.components.values())
    assert len({len(column) for column in got.slices.values()}) == 1
    energy = got.layer["update_norm"] ** 2
    assert np.sum(got.components["update_singular_value"] ** 2) == pytest.approx(energy, rel=1e-9)
    if got.layer["base_norm"] > 0:
        assert np.sum(got.components["diagonal"] ** 2) == pytest.approx(
            got.layer["diagonal_share"] * energy, rel=1e-6, abs=1e-9 * energy
        )
    assert np.sum(got.slices["plasticity"]) == pytest.approx(1.0 if energy > 0 else 0.0, abs=1e-6)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 70), (70, 40)])
def test_an_update_in_the_place_of_the_tuned_weight_says_the_same(
    shape: tuple[int, int], dtype: torch.dtype, fast: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator).to(dtype)
    tuned = W + (0.1 * torch.randn(shape, generator=generator)).to(dtype)
    before = W.clone(), tuned.clone()
    args = {"base_dtype": dtype, "tuned_dtype": dtype, "fast": fast}
    apart = measure(W, svd(W), tuned, **args)
    assert torch.equal(W, before[0])
    assert torch.equal(tuned, before[1])
    in_place = measure(W, svd(W), tuned, **args, overwrite=True)
    assert torch.equal(W, before[0])
    if dtype != torch.bfloat16:  # whose place is too narrow
        assert torch.equal(tuned, before[1] - before[0])
    np.testing.assert_equal(in_place.layer, apart.layer)
    for table in ("components", "slices"):
        np.testing.assert_equal(getattr(in_place, table), getattr(apart, table))


def test_an_update_beyond_the_range_of_float32_is_refused() -> None:
    W = torch.diag(torch.full((140,), 3e38))
    with pytest.raises(SpectraError, match="range of its dtype; compare in float64"):
        measured(W, -W)
    wide = measure(W, svd(W, torch.float64), -W, base_dtype=torch.float32, tuned_dtype=torch.float32)
    assert wide.layer["spectral_norm_update"] == pytest.approx(2 * float(W[0, 0]))


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (12, 8), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("weight", ["zero", "gaussian"])
def test_no_update_is_measured_as_none(shape: tuple[int, int], weight: Any) -> None:
    W = torch.from_numpy(build(np.random.default_rng(0), weight, *shape)).float()
    layer = measured(W, W.clone()).layer
    for name in ("update_norm", "spectral_norm_update", "nuclear_norm_update"):
        assert layer[name] == 0, name
    assert layer["numerical_rank"] == layer["energy_rank_90"] == 0
    assert layer["unmoved_share"] == 1
    if weight == "zero":
        assert layer["intruders"] is None  # a zero matrix has no directions that anything could be unlike
        assert np.isnan(layer["diagonal_share"])
        assert np.isnan(layer["relative_update"])
        assert np.isnan(layer["cosine"])
        assert np.isnan(layer["spectral_shift"])
    else:
        assert (
            layer["relative_update"]
            == layer["diagonal_share"]
            == layer["off_diagonal_share"]
            == layer["intruders"]
            == 0
        )
        assert layer["cosine"] == pytest.approx(1)
        assert layer["spectral_shift"] == pytest.approx(0, abs=1e-12)
        assert layer["left_overlap"] == pytest.approx(1, abs=1e-6)


def test_a_low_rank_update_shows_its_rank() -> None:
    generator = np.random.default_rng(1)
    W = torch.from_numpy(generator.normal(size=(40, 60))).float()
    D = torch.from_numpy(0.3 * generator.normal(size=(40, 3)) @ generator.normal(size=(3, 60))).float()
    layer = measured(W, W + D).layer
    assert layer["numerical_rank"] == layer["energy_rank_99"] == 3
    assert layer["effective_rank"] < 3.01
    scaled_down = measured(W, W + 1e-4 * D).layer
    assert scaled_down["numerical_rank"] == 3  # the rounding of W + D, of full rank, raises the tolerance with it
    assert scaled_down["energy_rank_99"] == 3

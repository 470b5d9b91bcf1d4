"""The split of an update against the float64 reference, entry by entry."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from spectra.linalg.svd import svd
from spectra.measures.decomposition import Decomposition, decompose
from tests.reference import decomposition as reference
from tests.reference import singular
from tests.reference.singular import SVD, Array
from tests.strategies import build, pairs

ENERGIES = ("row_energy", "column_energy", "outside_energy")
COSINES = ("left_stability", "right_stability", "stability")


def float64(X: Tensor) -> Array:
    return X.double().numpy()


def assert_columns_agree(got: Decomposition, expected: reference.Columns, tolerance: float) -> None:
    """Energies relative to ||D||_F^2, what is linear in D relative to ||D||_F, shares and cosines absolutely."""
    total = expected.update_energy
    norm = np.sqrt(total)
    assert got.update_energy == pytest.approx(total, rel=1e-9)
    np.testing.assert_allclose(got.diagonal, expected.diagonal, rtol=0, atol=tolerance * norm)
    for name in ENERGIES:
        np.testing.assert_allclose(
            getattr(got, name), getattr(expected, name), rtol=0, atol=tolerance * total, err_msg=name
        )
    for name in ("plasticity", *COSINES):
        np.testing.assert_allclose(
            getattr(got, name), getattr(expected, name), rtol=0, atol=tolerance, equal_nan=True, err_msg=name
        )
    s, dead = expected.singular_value, np.isnan(expected.relative_diagonal)
    with np.errstate(divide="ignore", invalid="ignore"):
        allowed = np.where(s > 0, tolerance * norm / s, 0)
    difference = np.abs(got.relative_diagonal - expected.relative_diagonal)
    assert np.array_equal(np.isnan(got.relative_diagonal), dead)
    assert np.all((difference <= allowed) | dead)


@given(pairs())
@settings(max_examples=200)
def test_every_column_equals_its_definition_in_the_given_basis(pair: tuple[Tensor, Tensor]) -> None:
    W, D = pair
    spectrum = svd(W)
    basis = SVD(float64(spectrum.U), spectrum.S.numpy(), float64(spectrum.V))
    expected = reference.decompose(float64(W), float64(D), basis)
    got = decompose(spectrum, D)
    assert all(getattr(got, name).dtype == np.float64 for name in ("diagonal", "plasticity", *ENERGIES, *COSINES))
    assert_columns_agree(got, expected, 1e-9 if W.dtype == torch.float64 else 1e-6)
    np.testing.assert_array_equal(got.gap, spectrum.gap)


@given(pairs(kinds=("separated",), unscaled=True))
@settings(max_examples=100)
def test_every_column_equals_the_reference_from_its_own_singular_values(pair: tuple[Tensor, Tensor]) -> None:
    W, D = pair
    expected = reference.decompose(float64(W), float64(D))
    assert_columns_agree(decompose(svd(W), D), expected, 1e-8 if W.dtype == torch.float64 else 2e-6)


@given(pairs(kinds=("gaussian", "clustered", "decaying"), unscaled=True))
@settings(max_examples=100)
def test_sums_over_a_cluster_equal_the_reference(pair: tuple[Tensor, Tensor]) -> None:
    """Inside a cluster no component is defined, but what the cluster carries as a whole is."""
    W, D = pair
    basis = singular.svd(float64(W))
    expected = reference.decompose(float64(W), float64(D), basis)
    got = decompose(svd(W), D)
    total = expected.update_energy
    for cluster in singular.clusters(basis.s, 1e-2):
        for name in ENERGIES[:2]:
            sums = [float(np.sum((X.diagonal**2 + getattr(X, name))[cluster])) for X in (got, expected)]
            assert sums[0] == pytest.approx(sums[1], rel=0, abs=1e-6 * total), name
        for X in ("outside_energy", "diagonal"):
            allowed = 1e-6 * (total if X == "outside_energy" else np.sqrt(total))
            assert np.sum(getattr(got, X)[cluster]) == pytest.approx(
                np.sum(getattr(expected, X)[cluster]), rel=0, abs=allowed
            ), X
        assert np.sum(got.plasticity[cluster]) == pytest.approx(np.sum(expected.plasticity[cluster]), abs=1e-6)


@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_is_the_speed_at_which_the_left_vectors_turn(m: int, n: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(3)
    W = torch.from_numpy(build(generator, "separated", m, n)).to(dtype)
    D = torch.from_numpy(generator.normal(size=(m, n))).to(dtype)
    speed = reference.rotation(float64(W), float64(D), 1e-6)
    np.testing.assert_allclose(decompose(svd(W), D).rotation, speed, rtol=1e-5)


@pytest.mark.parametrize("distance", [0.0, 1e-9])
def test_rotation_has_no_value_inside_a_cluster_and_keeps_it_outside(distance: float) -> None:
    generator = np.random.default_rng(4)
    W = np.zeros((6, 6))
    np.fill_diagonal(W, [5.0, 3.0 + distance, 3.0, 2.0, 1.0 + distance, 1.0])
    D = generator.normal(size=(6, 6))
    rotation = decompose(svd(torch.from_numpy(W)), torch.from_numpy(D)).rotation
    assert np.isnan(rotation).tolist() == [False, True, True, False, True, True]


@pytest.mark.parametrize("shape", [(6, 6), (6, 9), (9, 6), (1, 7), (7, 1), (1, 1)])
def test_an_update_of_a_zero_weight_has_no_relative_columns_and_no_warning(shape: tuple[int, int]) -> None:
    D = torch.from_numpy(np.random.default_rng(5).normal(size=shape))
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        got = decompose(svd(torch.zeros(shape, dtype=torch.float64)), D)
    for name in ("relative_diagonal", *COSINES):
        assert np.all(np.isnan(getattr(got, name))), name
    assert np.sum(got.plasticity) == pytest.approx(1.0)
    parts = np.sum(got.diagonal**2 + got.row_energy + got.outside_energy)
    assert parts == pytest.approx(float(torch.sum(D**2)))


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (12, 8)])
def test_zero_singular_values_leave_the_other_components_defined(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(6)
    factors = generator.integers(-2, 3, (shape[0], 4)), generator.integers(-2, 3, (4, shape[1]))
    W = torch.from_numpy((factors[0] @ factors[1]).astype(np.float32))
    D = torch.from_numpy(generator.normal(size=shape)).float()
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        got = decompose(svd(W), D)
    expected = reference.decompose(float64(W), float64(D))
    # Which null vectors complete the basis is arbitrary, and with it the division between column (row, where n > m) and
    # outside energy; these are not.
    for name in ("diagonal", *COSINES):
        np.testing.assert_allclose(getattr(got, name)[:4], getattr(expected, name)[:4], atol=1e-5, err_msg=name)
    assert np.sum(got.plasticity) == pytest.approx(1.0, abs=1e-6)


def test_a_tuned_weight_that_reverses_a_direction_has_negative_stability() -> None:
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    D = torch.diag(torch.tensor([0.0, -5.0, 0.0]))
    np.testing.assert_allclose(decompose(svd(W), D).stability, [1.0, -1.0, 1.0])


def test_known_by_hand() -> None:
    """W = diag(2, 1) over a zero row; D sends v_0 to 3 u_1 and 4 out of the span, and adds 1 to s_1."""
    W = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    D = torch.tensor([[0.0, 0.0], [3.0, 1.0], [4.0, 0.0]])
    got = decompose(svd(W), D)
    np.testing.assert_allclose(got.diagonal, [0, 1], atol=1e-12)
    np.testing.assert_allclose(got.relative_diagonal, [0, 1], atol=1e-12)
    np.testing.assert_allclose(got.row_energy, [0, 9], atol=1e-12)
    np.testing.assert_allclose(got.column_energy, [9, 0], atol=1e-12)
    np.testing.assert_allclose(got.outside_energy, [16, 0], atol=1e-12)
    np.testing.assert_allclose(got.plasticity, [20.5 / 26, 5.5 / 26], atol=1e-12)
    np.testing.assert_allclose(got.left_stability, [2 / np.sqrt(29), 1], atol=1e-12)
    np.testing.assert_allclose(got.right_stability, [1, 2 / np.sqrt(13)], atol=1e-12)
    # t_01 = s_0 C_10 / (s_0^2 - s_1^2) = 2 and E_0 / s_0 = 2 for u_0; t_10 = -2 for u_1.
    np.testing.assert_allclose(got.rotation, [np.sqrt(8), 2], atol=1e-12)
    assert got.update_energy == pytest.approx(26)
    assert got.diagonal_share == pytest.approx(1 / 26)
    assert got.off_diagonal_share == pytest.approx(9 / 26)
    assert got.outside_share == pytest.approx(16 / 26)
    assert got.diagonal_enrichment == pytest.approx(3 / 26)


@pytest.mark.parametrize(("m", "n"), [(300, 280), (280, 300), (290, 290)])
@pytest.mark.parametrize("slices", [1, 8])
def test_matrices_that_are_reduced_in_pieces(m: int, n: int, slices: int) -> None:
    generator = np.random.default_rng(8)
    W, D = (torch.from_numpy(generator.normal(size=(m, n))).float() for _ in range(2))
    spectrum = svd(W)
    basis = SVD(float64(spectrum.U), spectrum.S.numpy(), float64(spectrum.V))
    got = decompose(spectrum, D, slices)
    assert_columns_agree(got, reference.decompose(float64(W), float64(D), basis), 1e-6)
    C, _ = reference.coefficients(basis, float64(D))
    for index, (start, stop) in enumerate(pairwise(got.slice_bounds)):
        block = float(np.sum(C[start:stop, start:stop] ** 2))
        cross = float(np.sum(C[start:stop] ** 2) + np.sum(C[:, start:stop] ** 2)) - 2 * block
        assert got.block_energy[index] == pytest.approx(block, rel=1e-5)
        assert got.cross_energy[index] == pytest.approx(cross, rel=1e-5, abs=1e-6 * got.update_energy)

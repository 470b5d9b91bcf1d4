"""The definitions themselves: each quantity is what its name says, where the answer is known another way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from tests.reference.decomposition import coefficients, cosine, decompose, rotation, slice_energies
from tests.reference.singular import svd
from tests.strategies import build, seeds, shapes

SHAPES = [(9, 5), (5, 9), (7, 7)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_stability_is_the_cosine_that_the_tuned_map_leaves_a_direction_at(m: int, n: int) -> None:
    generator = np.random.default_rng(0)
    W, D = build(generator, "separated", m, n), 0.3 * generator.normal(size=(m, n))
    U, _, V = svd(W)
    columns = decompose(W, D)
    for i in range(5):
        assert columns.left_stability[i] == pytest.approx(cosine((W + D) @ V[:, i], U[:, i]), abs=1e-12)
        assert columns.right_stability[i] == pytest.approx(cosine((W + D).T @ U[:, i], V[:, i]), abs=1e-12)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_diagonal_is_the_first_order_motion_of_the_singular_values(m: int, n: int) -> None:
    generator = np.random.default_rng(1)
    W, D = build(generator, "separated", m, n), generator.normal(size=(m, n))
    motion = (svd(W + 1e-6 * D).s - svd(W - 1e-6 * D).s) / 2e-6
    np.testing.assert_allclose(decompose(W, D).diagonal, motion, atol=1e-7)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_rotation_formula_is_the_speed_at_which_the_left_vectors_turn(m: int, n: int) -> None:
    generator = np.random.default_rng(2)
    W, D = build(generator, "separated", m, n), generator.normal(size=(m, n))
    basis = svd(W)
    C, E = coefficients(basis, D)
    s, k = basis.s, len(basis.s)
    for i, speed in enumerate(rotation(W, D, 1e-6)):
        angles = [(s[i] * C[j, i] + s[j] * C[i, j]) / (s[i] ** 2 - s[j] ** 2) for j in range(k) if j != i]
        leaving = float(np.sum(E[:, i] ** 2)) / s[i] ** 2 if m > n else 0.0
        assert speed == pytest.approx(np.sqrt(np.sum(np.square(angles)) + leaving), rel=1e-6)


@given(shapes, seeds)
@settings(max_examples=40)
def test_the_parts_add_up_to_the_energy_of_the_update(shape: tuple[int, int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    W, D = build(generator, "gaussian", *shape), generator.normal(size=shape)
    columns = decompose(W, D)
    total = np.sum(D**2)
    assert np.sum(columns.diagonal**2 + columns.row_energy + columns.outside_energy) == pytest.approx(total)
    assert np.sum(columns.diagonal**2 + columns.column_energy + columns.outside_energy) == pytest.approx(total)
    assert np.sum(columns.plasticity) == pytest.approx(1.0)
    C, _ = coefficients(svd(W), D)
    block, cross = slice_energies(C, 0, 1)
    assert block == pytest.approx(columns.diagonal[0] ** 2)
    assert cross == pytest.approx(columns.row_energy[0] + columns.column_energy[0])

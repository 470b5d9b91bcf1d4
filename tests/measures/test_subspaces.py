"""Overlaps and angles equal their definitions at both ends of the scale, and their nulls are what random ones show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectra.linalg.lowrank import LowRank
from spectra.measures.subspaces import (
    angles_null,
    leading,
    overlap_null,
    overlaps,
    principal_angles,
    products,
)
from tests.reference import subspaces as reference
from tests.strategies import orthonormal, pairs, seeds


@given(seed=seeds, d=st.integers(2, 30), data=st.data())
def test_phi_and_angles_equal_the_reference(seed: int, d: int, data: st.DataObject) -> None:
    i, j = (data.draw(st.integers(1, d)) for _ in range(2))
    generator = np.random.default_rng(seed)
    A, B = orthonormal(generator, d, i), orthonormal(generator, d, j)
    phi = overlaps(torch.from_numpy(A), torch.from_numpy(B))
    assert phi.shape == (i, j)
    for a, b in ((1, 1), (i, j), (max(1, i // 2), j)):
        assert phi[a - 1, b - 1] == pytest.approx(reference.phi(A, B, a, b), abs=1e-12)
    np.testing.assert_allclose(
        principal_angles(torch.from_numpy(A), torch.from_numpy(B)), reference.angles(A, B), atol=1e-7
    )


@given(seed=seeds, exponent=st.integers(-14, 0))
def test_small_angles_keep_their_digits(seed: int, exponent: int) -> None:
    """One direction is turned by a known angle; arccos of its cosine would be 0 or 1e-8 below an angle of 1e-8."""
    generator = np.random.default_rng(seed)
    Q = orthonormal(generator, 20, 6)
    angle = 10.0**exponent
    turned = Q[:, :3].copy()
    turned[:, 2] = np.cos(angle) * Q[:, 2] + np.sin(angle) * Q[:, 5]
    found = principal_angles(torch.from_numpy(Q[:, :3]), torch.from_numpy(turned))
    assert found[-1] == pytest.approx(angle, rel=1e-6, abs=1e-15)
    assert found[0] < 1e-14


def test_a_subspace_against_itself_and_its_complement() -> None:
    Q = torch.from_numpy(orthonormal(np.random.default_rng(0), 12, 12))
    assert overlaps(Q[:, :4], Q[:, :4])[-1, -1] == pytest.approx(1)
    assert overlaps(Q[:, :4], Q[:, 4:])[-1, -1] == pytest.approx(0)
    assert overlaps(Q[:, :2], Q[:, :7])[-1, -1] == pytest.approx(1)  # contained
    np.testing.assert_allclose(principal_angles(Q[:, :4], Q[:, 4:8]), np.pi / 2)
    np.testing.assert_allclose(principal_angles(Q, Q[:, 4:8]), 0, atol=1e-14)


@pytest.mark.parametrize(
    ("d", "i", "j"),
    [(100, 10, 10), (200, 8, 30), (60, 40, 30), (16, 16, 4), (64, 1, 1), (100, 1, 10), (100, 10, 1), (20, 10, 16),
     (20, 2, 3), (20, 10, 10), (30, 29, 2), (80, 40, 39)],
)  # fmt: skip
def test_nulls_are_what_random_subspaces_show(d: int, i: int, j: int) -> None:
    generator = np.random.default_rng(1)
    phis, angles = [], []
    for _ in range(160):
        A, B = (torch.from_numpy(orthonormal(generator, d, size)) for size in (i, j))
        phis.append(overlaps(A, B)[-1, -1])
        angles.append(principal_angles(A, B)[[0, -1]])
    assert np.mean(phis) == pytest.approx(overlap_null(d, i, j), rel=0.05, abs=3 * np.std(phis) / 160**0.5)
    error = 4 * np.std(angles, axis=0).max() / 160**0.5
    np.testing.assert_allclose(np.mean(angles, axis=0), angles_null(d, i, j), atol=0.01 + error)
    assert error < 0.05


def test_the_null_of_many_directions_goes_on_where_that_of_few_ends() -> None:
    """Above 256 directions it is the edge of the spectrum, and must not jump."""
    for d, j in ((1024, 300), (600, 257)):
        few, many = angles_null(d, 256, j), angles_null(d, 257, j)
        np.testing.assert_allclose(few, many, atol=0.03)


@given(pair=pairs(kinds=("gaussian", "separated", "rank_deficient"), dtypes=(torch.float32, torch.float64)))
def test_products_equal_plain_sums(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    X, Y = (each.double() for each in pair)
    found = products(*pair)
    scale = max(found.norms[0] * found.norms[1], 1e-300)
    assert found.inner == pytest.approx(float((X * Y).sum()), abs=1e-12 * scale)
    assert found.norms == pytest.approx((float(X.norm()), float(Y.norm())))
    nonzero = (X != 0) & (Y != 0)
    assert found.moved == int(nonzero.sum())
    assert found.agreeing == int(((X > 0) == (Y > 0))[nonzero].sum())


@given(seed=seeds, m=st.integers(3, 20), n=st.integers(3, 20), r=st.integers(1, 3), c=st.sampled_from([1.0, -0.5, 4.0]))
def test_factors_give_what_their_product_gives(seed: int, m: int, n: int, r: int, c: float) -> None:
    generator = np.random.default_rng(seed)
    D = LowRank(torch.from_numpy(generator.normal(size=(m, r))), torch.from_numpy(generator.normal(size=(r, n))), c)
    Y = torch.from_numpy(generator.normal(size=(m, n)))
    found, expected = products(D, Y), products(D.dense(), Y)
    assert found.inner == pytest.approx(expected.inner, abs=1e-9) and found.agreeing == expected.agreeing
    low, dense = leading(D, 5), leading(D.dense(), 5)
    assert low.rank == dense.rank == r  # no directions of zero singular values
    np.testing.assert_allclose(low.S, dense.S, rtol=1e-9)
    assert overlaps(low.Y, dense.Y)[-1, -1] == pytest.approx(1, abs=1e-9)
    assert overlaps(low.Z, dense.Z)[-1, -1] == pytest.approx(1, abs=1e-9)


def test_weak_directions_of_a_long_matrix_are_kept() -> None:
    """s_j = 1e-3 s_0 is far above what float32 does to it, however many rows there are."""
    generator = np.random.default_rng(2)
    W = (orthonormal(generator, 30_000, 4) * [1, 0.1, 1e-2, 1e-3]) @ orthonormal(generator, 6, 4).T
    assert leading(torch.from_numpy(W).float(), 6).rank == 4


def test_a_zero_matrix_has_no_directions() -> None:
    assert leading(torch.zeros(4, 3), 2).rank == 0
    assert leading(LowRank(torch.zeros(4, 2), torch.ones(2, 3)), 2).rank == 0

"""Which updates are of exactly low rank up to rounding, and their factors, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.linalg.recognise import low_rank, truncated
from spectra.linalg.svd import NotFiniteError
from spectra.linalg.triplets import singular_values
from spectra.measures.rounding import rounding
from tests.reference import singular
from tests.strategies import DTYPES, orthonormal, seeds

sides = st.integers(24, 72)


def stored_pair(
    seed: int, m: int, n: int, D: np.ndarray, size: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """A stored W, D as it comes out of a stored W', and the noise: D has `size` times the norm of W before storage."""
    generator = np.random.default_rng(seed)
    rows = np.exp(generator.normal(scale=0.3, size=(m, 1)))  # rows of unequal scale, as real weights have
    W = torch.from_numpy(0.02 * rows * generator.normal(size=(m, n))).to(dtype)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    scaled = torch.from_numpy(D) * (size * float(W.double().norm()) / np.linalg.norm(D))
    tuned = (W.double() + scaled).to(dtype)
    difference = tuned.to(kind) - W.to(kind)
    floor = rounding(tuned.to(kind), difference, torch.float64, dtype).floor
    return W, difference, floor * float(tuned.double().norm())


def factors(seed: int, m: int, n: int, rank: int) -> np.ndarray:
    """A product of a rank whose singular values lie between 1 and 2."""
    generator = np.random.default_rng(seed)
    s = generator.uniform(1, 2, rank)
    return np.asarray((orthonormal(generator, m, rank) * s) @ orthonormal(generator, n, rank).T)


@given(sides, sides, st.integers(1, 6), st.sampled_from(DTYPES), st.sampled_from([0.03, 0.3, 3.0]), seeds)
@settings(max_examples=120)
def test_a_stored_merge_is_of_the_rank_that_was_merged(
    m: int, n: int, rank: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    _, D, noise = stored_pair(seed + 1, m, n, factors(seed, m, n, rank), size, dtype)
    found = low_rank(D, noise)
    assert found is not None
    assert found.rank == rank
    expected = singular.svd(D.double().numpy()).s
    assert found.residual == pytest.approx(np.linalg.norm(expected[rank:]), rel=1e-6, abs=1e-9 * expected[0])
    assert found == low_rank(D, noise, singular_values(D))  # whoever has the values pays for no decomposition


@given(sides, sides, st.sampled_from(DTYPES), st.sampled_from([1e-4, 1e-3, 0.004, 0.008, 0.015, 0.03, 0.3]), seeds)
@settings(max_examples=150)
def test_a_dense_update_never_is(m: int, n: int, dtype: torch.dtype, size: float, seed: int) -> None:
    D = np.random.default_rng(seed).normal(size=(m, n))
    _, stored, noise = stored_pair(seed + 1, m, n, D, size, dtype)
    assert low_rank(stored, noise) is None


@given(
    st.integers(120, 160),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.floats(3, 12),
    st.floats(0.5, 0.9),
    seeds,
)
@settings(max_examples=60)
def test_a_spectrum_that_decays_into_the_noise_is_not(
    side: int, dtype: torch.dtype, times_noise: float, slope: float, seed: int
) -> None:
    """As that of a real fine-tune: many of its directions lie below the rounding, and it still is not low rank."""
    generator = np.random.default_rng(seed)
    s = 1 / np.arange(1, side + 1) ** slope
    D = (orthonormal(generator, side, side) * s) @ orthonormal(generator, side, side).T
    floor = {torch.bfloat16: 1.7e-3, torch.float16: 2.1e-4}[dtype]
    _, stored, noise = stored_pair(seed + 1, side, side, D, times_noise * floor, dtype)
    assert low_rank(stored, noise) is None


@given(st.integers(60, 90), st.sampled_from([0.02, 0.2, 0.4]), st.floats(1.6, 1.95), seeds)
@settings(max_examples=40)
def test_strong_directions_on_top_of_a_dense_update_are_not(side: int, share: float, excess: float, seed: int) -> None:
    """What they leave is larger than rounding, though none of its directions sticks out of it."""
    rank = max(1, int(share * side))
    dense = torch.from_numpy(np.random.default_rng(seed + 1).normal(size=(side, side)))
    D = 1000 * torch.from_numpy(factors(seed, side, side, rank)) + excess * dense / dense.norm()
    assert low_rank(D.float(), 1.0) is None
    found = low_rank((D - (excess - 1) * dense / dense.norm()).float(), 1.0)
    assert found is not None
    assert found.rank == rank


def test_a_weak_direction_counts_beside_strong_ones() -> None:
    generator = np.random.default_rng(0)
    noise = torch.from_numpy(generator.normal(size=(144, 144)))
    s = np.array([1000.0, 900.0, 0.67])  # the last is four times the largest of the noise, and no larger than all of it
    D = torch.from_numpy((orthonormal(generator, 144, 3) * s) @ orthonormal(generator, 144, 3).T)
    found = low_rank(D + noise / noise.norm(), 1.0)
    assert found is not None
    assert found.rank == 3


@pytest.mark.parametrize("rank", [1, 4])
def test_below_the_rounding_nothing_has_a_rank(rank: int) -> None:
    W, _, noise = stored_pair(0, 64, 48, factors(1, 64, 48, rank), 1e-3, torch.bfloat16)
    D = torch.from_numpy(factors(1, 64, 48, rank)).float()
    D *= 1.9 * noise / D.norm()
    assert low_rank(D, noise) is None
    assert low_rank(D, noise / 100) is not None
    assert low_rank(torch.zeros_like(W, dtype=torch.float32), noise) is None
    assert low_rank(torch.zeros(5, 3), 0.0) is None


@given(sides, sides, st.integers(1, 12), seeds, st.sampled_from([1e-20, 1.0, 1e20]))
@settings(max_examples=60)
def test_without_noise_it_is_the_numerical_rank_of_any_scale(
    m: int, n: int, rank: int, seed: int, scale: float
) -> None:
    D = torch.from_numpy(scale * factors(seed, m, n, rank))
    found = low_rank(D, 0.0)
    assert found is not None
    assert found.rank == rank
    assert found.residual <= 1e-13 * float(D.norm())


def test_near_the_full_rank_nothing_is_low() -> None:
    D = torch.from_numpy(factors(0, 40, 30, 20))
    assert low_rank(D, 0.0) is None
    found = low_rank(D, 0.0, most=25)
    assert found is not None
    assert found.rank == 20
    assert low_rank(torch.ones(1, 9), 0.0) is None  # of full rank
    assert low_rank(torch.from_numpy(factors(0, 9, 9, 9)), 0.0, most=9) is None


def test_entries_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NotFiniteError, match="1 NaN"):
        low_rank(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 0.0)


@given(sides, sides, st.integers(1, 20), st.sampled_from([torch.float32, torch.float64]), seeds)
@settings(max_examples=60)
def test_a_truncation_is_the_best_one_and_balanced(m: int, n: int, rank: int, dtype: torch.dtype, seed: int) -> None:
    D = torch.from_numpy(np.random.default_rng(seed).normal(size=(m, n))).to(dtype)
    best = truncated(D, rank)
    assert best.B.shape == (m, rank)
    assert best.A.shape == (rank, n)
    assert best.c == 1.0
    assert best.B.dtype == best.A.dtype == dtype
    B, A = best.B.double(), best.A.double()
    expected = singular.svd(D.double().numpy()).s
    residual = float((D.double() - B @ A).norm())
    assert residual == pytest.approx(np.linalg.norm(expected[rank:]), rel=1e-6)
    values = torch.diag(torch.from_numpy(expected[:rank].copy()))
    torch.testing.assert_close(B.T @ B, values, rtol=0, atol=2e-6 * expected[0])
    torch.testing.assert_close(A @ A.T, values, rtol=0, atol=2e-6 * expected[0])

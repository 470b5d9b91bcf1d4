"""All singular values and the leading vectors of the tuned weight, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.linalg.triplets import leading_triplets, singular_values
from tests.reference import singular
from tests.strategies import weights, with_spectrum


@given(weights())
@settings(max_examples=120)
def test_singular_values_equal_the_reference(W: Tensor) -> None:
    expected = singular.svd(W.double().numpy()).s
    S = singular_values(W)
    assert S.dtype == torch.float64
    # Below 1e-8 s_0 the square root of a squared value is all rounding: zeros must still come out as zeros.
    np.testing.assert_allclose(S.numpy(), expected, rtol=0, atol=1e-9 * expected[0])
    large = expected > 1e-4 * expected[0]
    np.testing.assert_allclose(S.numpy()[large], expected[large], rtol=1e-9)


@given(weights(), st.integers(1, 30))
@settings(max_examples=120)
def test_leading_triplets_are_orthonormal_and_satisfy_their_equations(W: Tensor, k: int) -> None:
    m, n = W.shape
    triplets = leading_triplets(W, k)
    count = min(k, m, n)
    Y, S, Z = triplets.Y.double().numpy(), triplets.S.numpy(), triplets.Z.double().numpy()
    assert (Y.shape, Z.shape, S.shape) == ((m, count), (n, count), (min(m, n),))
    np.testing.assert_allclose(Y.T @ Y, np.eye(count), atol=1e-6)
    np.testing.assert_allclose(Z.T @ Z, np.eye(count), atol=1e-6)
    dense = W.double().numpy()
    np.testing.assert_allclose(dense @ Z, Y * S[:count], rtol=0, atol=1e-6 * S[0])
    np.testing.assert_allclose(dense.T @ Y, Z * S[:count], rtol=0, atol=1e-6 * S[0])
    np.testing.assert_allclose(S, singular.svd(dense).s, rtol=0, atol=1e-9 * S[0])


@pytest.mark.parametrize(("m", "n"), [(80, 80), (80, 200), (200, 80)])
@pytest.mark.parametrize("rank", [20, 60])
def test_zero_singular_values_are_zero_whether_few_or_many(m: int, n: int, rank: int) -> None:
    generator = np.random.default_rng(rank)
    W = torch.from_numpy(generator.integers(-2, 3, (m, rank)) @ generator.integers(-2, 3, (rank, n))).float()
    S = singular_values(W).numpy()
    np.testing.assert_allclose(S, singular.svd(W.double().numpy()).s, rtol=0, atol=1e-11 * S[0])


@pytest.mark.parametrize(("m", "n"), [(80, 80), (80, 200), (200, 80)])
def test_leading_vectors_equal_the_reference(m: int, n: int) -> None:
    generator = np.random.default_rng(2)
    W = torch.from_numpy(with_spectrum(generator, m, n, np.sort(generator.uniform(1, 9, 80))[::-1].copy())).float()
    expected = singular.svd(W.double().numpy())
    triplets = leading_triplets(W, 10)
    for got, true in ((triplets.Y, expected.U), (triplets.Z, expected.V)):
        np.testing.assert_allclose(np.abs(np.sum(got.double().numpy() * true[:, :10], axis=0)), 1.0, atol=1e-9)

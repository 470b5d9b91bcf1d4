"""The SVD against LAPACK's gesvd in float64, on every kind of matrix that a checkpoint may hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from spectra.errors import SpectraError
from spectra.linalg.svd import NotFiniteError, direct_values, svd
from tests.reference import singular
from tests.reference.singular import Array
from tests.strategies import Kind, build, pairs, seeds, shapes, weights, with_spectrum


def float64(X: Tensor) -> Array:
    return X.double().numpy()


def tolerance(W: Tensor) -> float:
    """Relative accuracy of stored vectors: the rounding of float32, or well above that of float64."""
    return 1e-9 if W.dtype == torch.float64 else 1e-6


@given(weights())
@settings(max_examples=150)
def test_singular_values_equal_the_reference(W: Tensor) -> None:
    expected = singular.svd(float64(W)).s
    spectrum = svd(W)
    assert spectrum.S.dtype == torch.float64
    np.testing.assert_allclose(spectrum.S.numpy(), expected, rtol=0, atol=1e-9 * expected[0])


@given(weights())
@settings(max_examples=150)
def test_factors_are_orthonormal_ordered_and_multiply_to_the_weight(W: Tensor) -> None:
    m, n = W.shape
    k = min(m, n)
    spectrum = svd(W)
    U, S, V = float64(spectrum.U), spectrum.S.numpy(), float64(spectrum.V)
    assert (U.shape, S.shape, V.shape) == ((m, k), (k,), (n, k))
    assert spectrum.U.dtype == spectrum.V.dtype == (torch.float64 if W.dtype == torch.float64 else torch.float32)
    assert np.all(S[:-1] >= S[1:])
    assert np.all(S >= 0)
    np.testing.assert_allclose(U.T @ U, np.eye(k), atol=tolerance(W))
    np.testing.assert_allclose(V.T @ V, np.eye(k), atol=tolerance(W))
    np.testing.assert_allclose((U * S) @ V.T, float64(W), rtol=0, atol=tolerance(W) * S[0])


@given(weights(kinds=("gaussian", "separated", "decaying")))
@settings(max_examples=100)
def test_isolated_vectors_equal_the_reference_with_one_sign_for_the_pair(W: Tensor) -> None:
    expected = singular.svd(float64(W))
    spectrum = svd(W)
    for cluster in singular.clusters(expected.s, 1e-2):
        i = cluster.start
        if cluster.stop - i > 1 or expected.s[i] < 1e-2 * expected.s[0]:
            continue
        sign = np.sign(float64(spectrum.U)[:, i] @ expected.U[:, i])
        np.testing.assert_allclose(sign * float64(spectrum.U)[:, i], expected.U[:, i], atol=tolerance(W))
        np.testing.assert_allclose(sign * float64(spectrum.V)[:, i], expected.V[:, i], atol=tolerance(W))


@pytest.mark.parametrize(("m", "n"), [(96, 96), (96, 250), (250, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tail_of_an_ill_conditioned_weight_is_right(m: int, n: int, dtype: torch.dtype) -> None:
    """Squaring the condition number, or working in float32, loses these vectors altogether."""
    W = torch.from_numpy(with_spectrum(np.random.default_rng(0), m, n, np.logspace(0, -6, 96))).to(dtype)
    expected = singular.svd(float64(W))
    spectrum = svd(W)
    np.testing.assert_allclose(spectrum.S.numpy(), expected.s, rtol=1e-6, atol=1e-11)
    for got, true in ((spectrum.U, expected.U), (spectrum.V, expected.V)):
        alignment = np.abs(np.sum(float64(got) * true, axis=0))
        np.testing.assert_allclose(alignment, 1.0, atol=1e-6)


@given(weights(kinds=("rank_deficient", "zero")))
@settings(max_examples=80)
def test_rank_deficient_weights_have_whole_orthonormal_bases(W: Tensor) -> None:
    """The null vectors must not be taken from rounding noise: noise may point along a vector that is there already."""
    spectrum = svd(W)
    rank = np.linalg.matrix_rank(np.ldexp(float64(W), -singular.scale_exponent(float64(W))))
    assert np.all(spectrum.S.numpy()[rank:] <= 1e-11 * spectrum.S.numpy()[0])
    for vectors in (float64(spectrum.U), float64(spectrum.V)):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(64, 64), (64, 160), (160, 64)])
@pytest.mark.parametrize("rank", [1, 32, 63])
def test_larger_rank_deficient_weights_too(m: int, n: int, rank: int) -> None:
    generator = np.random.default_rng(rank)
    factors = generator.integers(-2, 3, (m, rank)), generator.integers(-2, 3, (rank, n))
    W = torch.from_numpy((factors[0] @ factors[1]).astype(np.float32))
    spectrum = svd(W)
    U, S, V = float64(spectrum.U), spectrum.S.numpy(), float64(spectrum.V)
    assert np.all(S[rank:] <= 1e-11 * S[0])
    np.testing.assert_allclose(U.T @ U, np.eye(64), atol=1e-6)
    np.testing.assert_allclose(V.T @ V, np.eye(64), atol=1e-6)
    np.testing.assert_allclose((U * S) @ V.T, float64(W), rtol=0, atol=1e-6 * S[0])


@pytest.mark.parametrize(("m", "n"), [(12, 5000), (5000, 12)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["gaussian", "decaying"])
def test_long_sides_that_are_read_in_pieces(m: int, n: int, dtype: torch.dtype, kind: Kind) -> None:
    W = torch.from_numpy(build(np.random.default_rng(8), kind, m, n)).to(dtype)
    spectrum = svd(W)
    expected = singular.svd(float64(W)).s
    np.testing.assert_allclose(spectrum.S.numpy(), expected, rtol=0, atol=1e-9 * expected[0])
    product = (float64(spectrum.U) * spectrum.S.numpy()) @ float64(spectrum.V).T
    np.testing.assert_allclose(product, float64(W), rtol=0, atol=1e-6 * expected[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_that_are_not_finite_are_refused_and_counted(value: float, dtype: torch.dtype) -> None:
    W = torch.ones(4, 6, dtype=dtype)
    W[1, 2] = W[3, 0] = value
    with pytest.raises(SpectraError, match=f"2 {'NaN' if value != value else 'infinite'} among its 24 entries"):
        svd(W)


@given(pairs(kinds=("gaussian",), dtypes=(torch.float32,)))
@settings(max_examples=30)
def test_the_input_is_left_as_it_was_and_may_be_a_view(pair: tuple[Tensor, Tensor]) -> None:
    W, _ = pair
    before = W.clone()
    wide = torch.stack([W, W], dim=2)[:, :, 0]  # strided both ways
    spectrum, again = svd(W), svd(wide)
    assert torch.equal(W, before)
    torch.testing.assert_close(again.S, spectrum.S, rtol=0, atol=1e-12 * float(spectrum.S[0]))


@given(weights(kinds=("gaussian", "decaying", "clustered")))
@settings(max_examples=60)
def test_the_transpose_has_the_same_spectrum_with_its_sides_swapped(W: Tensor) -> None:
    spectrum, swapped = svd(W), svd(W.T)
    np.testing.assert_allclose(swapped.S.numpy(), spectrum.S.numpy(), rtol=0, atol=1e-9 * float(spectrum.S[0]))
    assert swapped.U.shape == spectrum.V.shape
    assert swapped.V.shape == spectrum.U.shape


@given(weights())
@settings(max_examples=60)
def test_gap_is_the_distance_to_the_next_value_relative_to_the_largest(W: Tensor) -> None:
    spectrum = svd(W)
    s = spectrum.S.numpy()
    gap = spectrum.gap
    assert gap.dtype == np.float64
    if s[0] == 0:
        assert gap.shape == s.shape
        return
    np.testing.assert_allclose(gap, (s - np.append(s[1:], 0.0)) / s[0], rtol=1e-12, atol=1e-15)
    assert np.all(gap >= 0)


@given(shapes, seeds)
@settings(max_examples=30)
def test_scaling_by_a_power_of_two_scales_the_values_alone(shape: tuple[int, int], seed: int) -> None:
    W = torch.from_numpy(build(np.random.default_rng(seed), "separated", *shape)).float()
    spectrum, scaled = svd(W), svd(W * 2.0**40)
    np.testing.assert_allclose(scaled.S.numpy(), spectrum.S.numpy() * 2.0**40, rtol=1e-12)


@pytest.mark.parametrize("exponent", [-900, -500, 500, 900])
def test_float64_weights_of_extreme_scale_keep_their_accuracy(exponent: int) -> None:
    """Their squares leave the range of float64."""
    W = np.ldexp(build(np.random.default_rng(1), "separated", 12, 20), exponent)
    spectrum = svd(torch.from_numpy(W))
    np.testing.assert_allclose(spectrum.S.numpy(), singular.svd(W).s, rtol=1e-9)


@pytest.mark.parametrize("shape", [(40, 40), (30, 90), (90, 30), (1, 7)])
def test_values_of_float64_matrices_need_no_vectors(shape: tuple[int, int]) -> None:
    A = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    A[0] *= 1e-7
    expected = np.linalg.svd(A.numpy(), compute_uv=False)
    np.testing.assert_allclose(direct_values(A).numpy(), expected, atol=1e-14 * expected[0])
    with pytest.raises(NotFiniteError, match="1 NaN"):
        direct_values(torch.full((1, 1), torch.nan, dtype=torch.float64))

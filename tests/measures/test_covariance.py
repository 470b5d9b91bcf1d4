"""The shift of a feature covariance, its parts and what stands beside it, against features computed one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from spectra.linalg.svd import svd
from spectra.measures.covariance import (
    data_free,
    data_free_diagonal,
    feature_basis,
    likeness,
    shift,
    slice_shares,
    weight_basis,
)
from spectra.measures.decomposition import decompose
from tests.reference import covariance as brute

Array = NDArray[np.float64]
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
seeds = st.integers(0, 2**32 - 1)


def layer(seed: int, m: int, n: int, size: float = 0.1) -> tuple[Array, Array, Array, Array]:
    """W, D, and the inputs of base and tuned model (N, n)."""
    generator = np.random.default_rng(seed)
    W, X = generator.normal(size=(m, n)), generator.normal(size=(3 * n + 5, n)) @ generator.normal(size=(n, n))
    return W, size * generator.normal(size=(m, n)), X, X + 0.3 * generator.normal(size=X.shape)


def tensors(*arrays: Array) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def close(found: Tensor, expected: Array, scale: float) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12 * scale)


@given(seeds, shapes, st.sampled_from(["weight", "feature"]))
def test_parts_are_those_of_the_features(seed: int, shape: tuple[int, int], basis: str) -> None:
    W, D, X, X_tuned = layer(seed, *shape)
    Sx, Sx_tuned = brute.covariance(X), brute.covariance(X_tuned)
    k = min(shape)
    Q = weight_basis(*tensors(W), k) if basis == "weight" else feature_basis(*tensors(W, Sx), k)
    found = shift(*tensors(W, D), Q, *tensors(Sx, Sx_tuned))
    Y, between, Y_tuned = X @ W.T, X @ (W + D).T, X_tuned @ (W + D).T
    assert found.inherited is not None
    scale = np.trace(brute.covariance(Y)) + np.trace(brute.covariance(Y_tuned))
    close(found.own, brute.delta(Y, between, Q.numpy()), scale)
    close(found.inherited, brute.delta(between, Y_tuned, Q.numpy()), scale)
    close(found.total, brute.delta(Y, Y_tuned, Q.numpy()), scale)
    close(found.variance, np.diag(Q.numpy().T @ brute.covariance(Y) @ Q.numpy()), scale)
    whole = [brute.covariance(between) - brute.covariance(Y), brute.covariance(Y_tuned) - brute.covariance(between)]
    expected = [np.sum(whole[0] ** 2), np.sum(whole[1] ** 2), np.sum(whole[0] * whole[1])]
    np.testing.assert_allclose(
        [found.own_energy, found.inherited_energy, found.product], expected, rtol=0, atol=1e-12 * scale**2
    )
    assert found.energy == pytest.approx(np.sum((whole[0] + whole[1]) ** 2), abs=1e-12 * scale**2)
    assert found.trace == pytest.approx(np.trace(brute.covariance(Y)), abs=1e-12 * scale)
    assert found.trace_tuned == pytest.approx(np.trace(brute.covariance(Y_tuned)), abs=1e-12 * scale)
    assert found.norm == pytest.approx(np.linalg.norm(brute.covariance(Y)), abs=1e-11 * scale)


@given(seeds, shapes)
def test_bases_are_orthonormal_and_descend(seed: int, shape: tuple[int, int]) -> None:
    W, _, X, _ = layer(seed, *shape)
    Sx = brute.covariance(X)
    k = min(shape)
    Sy = W @ Sx @ W.T
    for Q in (weight_basis(*tensors(W), k).numpy(), feature_basis(*tensors(W, Sx), k).numpy()):
        assert Q.shape == (shape[0], k)
        np.testing.assert_allclose(Q.T @ Q, np.eye(k), atol=1e-12)
    inside = Q.T @ Sy @ Q  # of the features' own basis
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-11 * np.trace(Sy))
    assert np.all(np.diff(np.diag(inside)) <= 1e-11 * np.trace(Sy))


def test_a_tiny_update_keeps_its_digits() -> None:
    """Two covariances that agree in eleven digits: their difference in float64 would keep five."""
    W, D, X, _ = layer(0, 7, 9, size=1e-11)
    Sx = brute.covariance(X)
    Q = weight_basis(*tensors(W), 7)
    found = shift(*tensors(W, D), Q, *tensors(Sx)).own.numpy()
    long = [array.astype(np.longdouble) for array in (W, D, Sx, Q.numpy())]
    moved = long[0] + long[1]
    exact = (long[3].T @ (moved @ long[2] @ moved.T - long[0] @ long[2] @ long[0].T) @ long[3]).astype(float)
    naive = Q.numpy().T @ ((W + D) @ Sx @ (W + D).T - W @ Sx @ W.T) @ Q.numpy()
    assert np.abs(found - exact).max() < 1e-7 * np.abs(exact).max()
    assert np.abs(naive - exact).max() > 1e-6 * np.abs(exact).max()  # so the test can fail


@given(seeds, shapes)
def test_data_free_form_is_the_shift_of_white_inputs(seed: int, shape: tuple[int, int]) -> None:
    W, D, *_ = layer(seed, *shape)
    m, n = shape
    base = svd(*tensors(W), torch.float64)
    D_ = torch.from_numpy(D)
    C = base.U.T @ D_ @ base.V
    E = base.U.T @ D_ - C @ base.V.T if n > m else None
    streamed = shift(*tensors(W, D), base.U, *tensors(np.eye(n)))
    scale = streamed.trace + streamed.trace_tuned
    close(data_free(base.S, C, E), streamed.total.numpy(), scale)
    close(shift(*tensors(W, D), base.U).total, streamed.total.numpy(), scale)
    split = decompose(base, D_)
    outside = split.outside_energy if n > m else 0.0
    diagonal = data_free_diagonal(base.S.numpy(), split.diagonal, split.row_energy, outside)
    np.testing.assert_allclose(diagonal, torch.diagonal(streamed.total).numpy(), atol=1e-12 * scale)


@given(seeds, shapes)
def test_likeness_is_that_of_the_features(seed: int, shape: tuple[int, int]) -> None:
    W, D, X, X_tuned = layer(seed, *shape)
    Sx, Sx_tuned = brute.covariance(X), brute.covariance(X_tuned)
    cross = (X - X.mean(0)).T @ (X_tuned - X_tuned.mean(0)) / len(X)
    found = likeness(*tensors(W, W + D, Sx, Sx_tuned, cross), largest=99)
    Y, Y_tuned = X @ W.T, X_tuned @ (W + D).T
    assert found.cka == pytest.approx(brute.linear_cka(Y, Y_tuned), abs=1e-12)
    if shape[0] <= shape[1]:  # scipy's square roots want matrices of full rank
        expected = brute.bures(brute.covariance(Y), brute.covariance(Y_tuned))
        assert found.bures == pytest.approx(expected, rel=1e-5)
    assert np.isnan(likeness(*tensors(W, W + D, Sx, Sx_tuned), None, largest=99).cka)
    assert np.isnan(likeness(*tensors(W, W + D, Sx, Sx_tuned), None, largest=0).bures)


@given(seeds, shapes, st.sampled_from([1e-9, 1e-4, 0.5]))
def test_distance_of_scaled_features_is_exact(seed: int, shape: tuple[int, int], by: float) -> None:
    """Sigma' = (1 + a)^2 Sigma lies a sqrt(trace) away; the textbook formula is lost below a = 1e-8."""
    W, _, X, _ = layer(seed, *shape)
    Sx = brute.covariance(X)
    found = likeness(*tensors(W, (1 + by) * W, Sx, Sx, Sx), largest=99)
    expected = ((1 + by) - 1) * np.sqrt(np.trace(W @ Sx @ W.T))
    assert found.bures == pytest.approx(expected, rel=1e-4)
    assert found.cka == pytest.approx(1.0, abs=1e-12)


@given(seeds, st.integers(1, 12), st.integers(1, 9))
def test_slices_account_for_the_whole_shift(seed: int, k: int, slices: int) -> None:
    generator = np.random.default_rng(seed)
    half = generator.normal(size=(k, k))
    delta, variance = half + half.T, generator.uniform(size=k)
    found = slice_shares(*tensors(delta, variance), slices)
    assert (found.block + found.cross / 2).sum() == pytest.approx((delta**2).sum(), rel=1e-12)
    assert found.variance.sum() == pytest.approx(variance.sum())
    assert found.diagonal.sum() == pytest.approx(np.trace(delta), abs=1e-12)
    low, high = found.bounds[0], found.bounds[1]
    assert found.block[0] == pytest.approx((delta[low:high, low:high] ** 2).sum(), rel=1e-12)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="W is"):
        shift(torch.ones(2, 3).double(), torch.ones(3, 2).double(), torch.eye(2).double())

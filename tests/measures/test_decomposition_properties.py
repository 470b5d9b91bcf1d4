"""Identities and invariances of the split: what must hold for every weight and every update."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.linalg.lowrank import LowRank
from spectra.linalg.svd import Spectrum, svd
from spectra.measures.decomposition import Decomposition, decompose
from tests.reference.decomposition import coefficients, slice_energies
from tests.reference.singular import SVD
from tests.strategies import build, orthonormal, pairs, seeds, shapes, weights

ENERGIES = ("row_energy", "column_energy", "outside_energy")
COSINES = ("left_stability", "right_stability", "stability")
SHARES = ("diagonal_share", "off_diagonal_share", "outside_share", "diagonal_enrichment")
FLOAT64 = (torch.float64,)
TRANSPOSED = {"row_energy": "column_energy", "left_stability": "right_stability"}


def assert_same(got: Decomposition, expected: Decomposition, tolerance: float, rotation: bool = True) -> None:
    """Every column and share of two decompositions agree, to `tolerance` relative to ||D||."""
    total = expected.update_energy
    assert got.update_energy == pytest.approx(total, rel=10 * tolerance)
    np.testing.assert_allclose(got.diagonal, expected.diagonal, rtol=0, atol=tolerance * np.sqrt(total))
    for name in (*ENERGIES, "block_energy", "cross_energy"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=0, atol=tolerance * total)
    for name in ("plasticity", *COSINES):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=0, atol=tolerance, err_msg=name)
    for name in SHARES:
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=tolerance, atol=10 * tolerance)
    if rotation:
        np.testing.assert_allclose(got.rotation, expected.rotation, rtol=0, atol=1e3 * tolerance * np.sqrt(total))


@given(pairs())
@settings(max_examples=150)
def test_the_energies_add_up_to_the_norm_of_the_update(pair: tuple[Tensor, Tensor]) -> None:
    W, D = pair
    got = decompose(svd(W), D)
    total = float(torch.sum(D.double() ** 2))
    allowed = (1e-10 if W.dtype == torch.float64 else 1e-6) * total
    diagonal, outside = float(np.sum(got.diagonal**2)), float(np.sum(got.outside_energy))
    assert got.update_energy == pytest.approx(total, rel=1e-9)
    assert diagonal + np.sum(got.row_energy) + outside == pytest.approx(total, rel=0, abs=allowed)
    assert diagonal + np.sum(got.column_energy) + outside == pytest.approx(total, rel=0, abs=allowed)
    assert all(np.all(getattr(got, name) >= 0) for name in ENERGIES)
    if W.shape[0] == W.shape[1]:
        assert outside == 0
    if total > 0:
        assert np.sum(got.plasticity) == pytest.approx(1, abs=1e-6)
        assert np.all(got.plasticity >= 0)
        assert got.diagonal_share + got.off_diagonal_share + got.outside_share == pytest.approx(1, abs=1e-6)
        assert got.diagonal_share == pytest.approx(diagonal / total, abs=1e-6)
        assert got.outside_share == pytest.approx(outside / total, abs=1e-6)
        assert got.diagonal_enrichment == pytest.approx(got.diagonal_share * max(W.shape))


@given(pairs(), st.integers(1, 12))
@settings(max_examples=100)
def test_slices_part_the_components_and_their_energies(pair: tuple[Tensor, Tensor], slices: int) -> None:
    W, D = pair
    k = min(W.shape)
    spectrum = svd(W)
    got = decompose(spectrum, D, slices=slices)
    bounds = got.slice_bounds
    assert bounds[0] == 0
    assert bounds[-1] == k
    assert np.all(np.diff(bounds) >= (1 if k >= slices else 0))
    assert np.ptp(np.diff(bounds)) <= 1
    assert len(got.block_energy) == len(got.cross_energy) == len(bounds) - 1 <= slices
    basis = SVD(spectrum.U.double().numpy(), spectrum.S.numpy(), spectrum.V.double().numpy())
    C, _ = coefficients(basis, D.double().numpy())
    total = got.update_energy
    allowed = 1e-6 * total
    for index, (start, stop) in enumerate(pairwise(bounds)):
        block, cross = slice_energies(C, int(start), int(stop))
        assert got.block_energy[index] == pytest.approx(block, rel=0, abs=allowed)
        assert got.cross_energy[index] == pytest.approx(cross, rel=0, abs=allowed)
    together = np.sum(got.block_energy) + np.sum(got.cross_energy) / 2 + np.sum(got.outside_energy)
    assert together == pytest.approx(total, rel=0, abs=allowed)


@given(pairs(), seeds)
@settings(max_examples=80)
def test_nothing_depends_on_the_sign_of_a_pair_of_vectors(pair: tuple[Tensor, Tensor], seed: int) -> None:
    W, D = pair
    spectrum = svd(W)
    signs = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], min(W.shape))).to(spectrum.U.dtype)
    flipped = dataclasses.replace(spectrum, U=spectrum.U * signs, V=spectrum.V * signs)
    got, expected = decompose(flipped, D), decompose(spectrum, D)
    for field in dataclasses.fields(Decomposition):
        scale = float(np.max(np.abs(np.nan_to_num(getattr(expected, field.name))), initial=0.0))
        np.testing.assert_allclose(
            getattr(got, field.name), getattr(expected, field.name), rtol=1e-6, atol=1e-6 * scale, err_msg=field.name
        )


@given(pairs(kinds=("separated",), dtypes=FLOAT64, unscaled=True), seeds)
@settings(max_examples=60)
def test_nothing_depends_on_the_bases_that_inputs_and_outputs_are_written_in(
    pair: tuple[Tensor, Tensor], seed: int
) -> None:
    W, D = pair
    generator = np.random.default_rng(seed)
    P, Q = (torch.from_numpy(orthonormal(generator, side, side)) for side in W.shape)
    assert_same(decompose(svd(P @ W @ Q), P @ D @ Q), decompose(svd(W), D), 1e-9)


@given(
    weights(kinds=("gaussian", "separated", "decaying", "clustered"), unscaled=True), st.sampled_from([1e-3, -0.5, 2])
)
@settings(max_examples=80)
def test_a_scaled_weight_moves_singular_values_alone(W: Tensor, factor: float) -> None:
    W = W.double()
    got = decompose(svd(W), factor * W)
    assert got.diagonal_share == pytest.approx(1, abs=1e-9)
    assert got.diagonal_enrichment == pytest.approx(max(W.shape), rel=1e-9)
    np.testing.assert_allclose(got.relative_diagonal, factor, rtol=1e-8)


@given(weights(kinds=("gaussian", "separated", "decaying", "clustered"), unscaled=True), seeds, st.booleans())
@settings(max_examples=80)
def test_an_infinitesimal_rotation_moves_directions_alone(W: Tensor, seed: int, of_outputs: bool) -> None:
    """D = K W with K skew turns the outputs, D = W K the inputs; to first order no singular value moves."""
    W = W.double()
    side = W.shape[0 if of_outputs else 1]
    generator = np.random.default_rng(seed)
    K = torch.from_numpy(generator.normal(size=(side, side)))
    K = K - K.T
    D = K @ W if of_outputs else W @ K
    got = decompose(svd(W), D)
    np.testing.assert_allclose(got.diagonal, 0, atol=1e-9 * float(torch.linalg.norm(K)) * float(torch.linalg.norm(W)))
    if side > 1:
        assert got.diagonal_share < 1e-9


@given(weights())
@settings(max_examples=60)
def test_no_update_is_full_stability(W: Tensor) -> None:
    spectrum = svd(W)
    got = decompose(spectrum, torch.zeros(W.shape, dtype=spectrum.U.dtype))
    assert got.update_energy == 0
    for name in ("diagonal", *ENERGIES, "plasticity", "block_energy", "cross_energy"):
        assert np.all(getattr(got, name) == 0), name
    S = spectrum.S.numpy()
    alive = max(W.shape) * np.finfo(np.float64).eps * S[0] < S
    for name in COSINES:
        assert np.all(getattr(got, name)[alive] == 1), name
    isolated = alive & ~np.isnan(got.rotation)
    assert np.all(got.rotation[isolated] == 0)


@given(shapes, st.integers(1, 6), seeds, st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=80)
def test_factors_give_the_rows_of_their_product(
    shape: tuple[int, int], rank: int, seed: int, dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(seed)
    m, n = shape
    W = torch.from_numpy(build(generator, "separated", m, n)).to(dtype)
    B = torch.from_numpy(generator.normal(size=(m, rank))).to(dtype)
    A = torch.from_numpy(generator.normal(size=(rank, n))).to(dtype)
    spectrum = svd(W)
    dense = (0.25 * (B.double() @ A.double())).to(dtype)
    got, expected = decompose(spectrum, LowRank(B, A, 0.25)), decompose(spectrum, dense)
    assert_same(got, expected, 1e-9 if dtype == torch.float64 else 2e-6)


@given(pairs(kinds=("gaussian", "separated"), unscaled=True))
@settings(max_examples=60)
def test_the_transpose_swaps_left_with_right_and_rows_with_columns(pair: tuple[Tensor, Tensor]) -> None:
    W, D = pair
    spectrum = svd(W)
    swapped = Spectrum(U=spectrum.V, S=spectrum.S, V=spectrum.U, algorithm=spectrum.algorithm)
    got, expected = decompose(swapped, D.T), decompose(spectrum, D)
    renamed = {old: getattr(got, new) for pair in TRANSPOSED.items() for old, new in (pair, pair[::-1])}
    assert_same(dataclasses.replace(got, **renamed), expected, 1e-9 if W.dtype == torch.float64 else 1e-6, False)


@given(
    pairs(kinds=("gaussian", "separated"), dtypes=(torch.float32, torch.float64), unscaled=True), st.integers(-90, 60)
)
@settings(max_examples=60)
def test_the_scale_of_weight_and_update_together_changes_no_share(pair: tuple[Tensor, Tensor], exponent: int) -> None:
    W, D = pair
    scale = 2.0**exponent
    got, expected = decompose(svd(W * scale), D * scale), decompose(svd(W), D)
    for name in (*SHARES, *COSINES, "plasticity", "relative_diagonal", "gap"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(got.diagonal / scale, expected.diagonal, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(20, 30), (30, 20), (24, 24), (1, 40)])
def test_a_random_update_has_mean_diagonal_enrichment_one(m: int, n: int) -> None:
    """A Gaussian D points uniformly, so that its diagonal share is Beta(k/2, (mn - k)/2) distributed."""
    k, draws = min(m, n), 400
    generator = np.random.default_rng(7)
    spectrum = svd(torch.from_numpy(generator.normal(size=(m, n))))
    found = [
        decompose(spectrum, torch.from_numpy(generator.normal(size=(m, n)))).diagonal_enrichment for _ in range(draws)
    ]
    a, b = k / 2, (m * n - k) / 2
    deviation = max(m, n) * np.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))
    assert np.mean(found) == pytest.approx(1, abs=4 * deviation / np.sqrt(draws))
    assert np.std(found) == pytest.approx(deviation, rel=0.25)

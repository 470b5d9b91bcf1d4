"""Intruder dimensions: planted ones are found and nothing else, and every cosine equals the published definition's."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.linalg.batched import spectra, triplets
from spectra.linalg.svd import svd
from spectra.linalg.triplets import leading_triplets
from spectra.measures.intruders import best_cosines, cluster_cosines, intruders, zero_to_rounding
from tests.reference import intruders as reference
from tests.reference.singular import Array
from tests.reference.singular import svd as reference_svd
from tests.strategies import orthonormal, pairs, seeds

Side = Literal["left", "right"]
SIDES: tuple[Side, ...] = ("left", "right")


def planted(generator: np.random.Generator, m: int, n: int, strengths: Array) -> tuple[Tensor, Tensor]:
    """W with distinct singular values 20 ... 11 and a weak rest, and W' = W + new directions of the given strengths.

    Each new left vector is an even mixture of 12 weak base vectors, so that its best cosine is 12^(-1/2) = 0.29; the
    strong base vectors are orthogonal to it and stay.
    """
    k = min(m, n)
    U, V = orthonormal(generator, m, k), orthonormal(generator, n, k)
    s = np.concatenate([np.arange(20.0, 10.0, -1.0), np.linspace(0.2, 0.1, k - 10)])
    W = (U * s) @ V.T
    tuned = W.copy()
    for j, strength in enumerate(strengths):
        weak = slice(10 + 12 * j, 22 + 12 * j)
        tuned += strength * np.outer(U[:, weak].mean(axis=1), V[:, weak].mean(axis=1)) * 12
    return torch.from_numpy(W).float(), torch.from_numpy(tuned).float()


@pytest.mark.parametrize(("m", "n"), [(60, 60), (60, 90), (90, 60)])
@pytest.mark.parametrize("strengths", [[], [30.0], [30.0, 15.5], [25.0, 18.5, 13.5]])
def test_planted_directions_are_found_and_nothing_else(m: int, n: int, strengths: list[float]) -> None:
    W, tuned = planted(np.random.default_rng(0), m, n, np.array(strengths))
    order = sorted([*range(20, 10, -1), *strengths], reverse=True)[:10]
    expected = [j for j, strength in enumerate(order) if strength in strengths]
    found = intruders(svd(W), leading_triplets(tuned, 10))
    assert found.index.tolist() == expected
    assert found.count == len(strengths)
    np.testing.assert_allclose(found.singular_value, sorted(strengths, reverse=True), rtol=0.02)
    for j in range(10):
        if j in expected:
            assert found.best_cosine[j] == pytest.approx(12**-0.5, abs=0.03)
        else:
            assert found.best_cosine[j] == pytest.approx(1, abs=1e-5)
            assert found.partner[j] == 20 - int(order[j])


def test_weak_directions_of_a_long_matrix_are_looked_at() -> None:
    """s_j = 1e-3 s_0 is far above what float32 does to it, however long the matrix is."""
    generator = np.random.default_rng(1)
    m, n = 30_000, 16
    U, V = orthonormal(generator, m, n + 3), orthonormal(generator, n, n)
    s = np.geomspace(1.0, 2e-4, n)
    after = s.copy()
    new = U[:, :n].copy()
    new[:, [3, 6, 9]] = U[:, n:]  # of the tuned weight
    W, tuned = (torch.from_numpy((Y * values) @ V.T).float() for Y, values in ((U[:, :n], s), (new, after)))
    expected = reference.best_matches(W.double().numpy(), tuned.double().numpy(), 10, "left")
    assert [match.best_cosine < 0.5 for match in expected] == [j in (3, 6, 9) for j in range(10)]
    assert intruders(svd(W), leading_triplets(tuned, 10)).index.tolist() == [3, 6, 9]


def test_directions_of_zeros_are_not_counted() -> None:
    """The float32 of a product of rank 4 has singular values of rounding behind them, whose directions mean nothing."""
    generator = np.random.default_rng(2)
    W = torch.from_numpy(generator.standard_normal((300, 4)) @ generator.standard_normal((4, 200))).float()
    assert intruders(svd(W), leading_triplets(W + 0, 10)).count == 0
    assert len(intruders(svd(W), leading_triplets(1.5 * W, 10)).best_cosine) == 4


@given(pairs(kinds=("separated",), unscaled=True), st.sampled_from(SIDES))
@settings(max_examples=60)
def test_best_cosines_and_partners_equal_the_definition(pair: tuple[Tensor, Tensor], side: Side) -> None:
    W, D = pair
    tuned = W.to(D.dtype) + D
    expected = reference.best_matches(W.double().numpy(), tuned.double().numpy(), 10, side)
    s = np.linalg.svd(tuned.double().numpy(), compute_uv=False)
    if np.any(s[:-1] - s[1:] < 0.02 * s[0]) or s[-1] < 0.02 * s[0]:
        return  # tuned vectors inside a cluster are not defined
    found = intruders(svd(W), leading_triplets(tuned, 10), side=side)
    np.testing.assert_allclose(found.best_cosine, [match.best_cosine for match in expected], atol=1e-5)
    base, after = (reference_svd(X.double().numpy()) for X in (W, tuned))
    vectors, others = (base.U, after.U) if side == "left" else (base.V, after.V)
    for j, match in enumerate(expected):  # of two partners equally near, either is right
        assert abs(vectors[:, found.partner[j]] @ others[:, j]) == pytest.approx(match.best_cosine, abs=1e-5)


def test_the_threshold_is_strict_and_k_limits_the_search() -> None:
    """W' has one direction halfway between u_8 and u_9: its best cosine is 2^(-1/2)."""
    s = np.arange(12.0, 0.0, -1.0)
    W = torch.diag(torch.from_numpy(s)).float()
    y = torch.zeros(12)
    y[8:10] = 0.5**0.5
    tuned = W + 20 * torch.outer(y, y)
    base = svd(W)
    triplets = leading_triplets(tuned, 10)
    best = float(intruders(base, triplets).best_cosine[0])
    assert best == pytest.approx(0.5**0.5, abs=0.03)
    assert intruders(base, triplets, epsilon=best + 1e-6).index.tolist()[0] == 0
    assert 0 not in intruders(base, triplets, epsilon=best - 1e-6).index
    assert len(intruders(base, triplets, k=3, epsilon=1.1).index) == 3


@given(seeds)
@settings(max_examples=10)
def test_an_unchanged_weight_has_none_on_either_side(seed: int) -> None:
    W = torch.from_numpy(np.random.default_rng(seed).normal(size=(24, 40))).float()
    for side in SIDES:
        found = intruders(svd(W), leading_triplets(W, 10), side=side)
        assert found.count == 0
        assert found.partner.tolist() == list(range(10))


@pytest.mark.parametrize("shape", [(12, 12), (1, 9), (9, 1), (1, 1)])
def test_zero_weights_have_no_directions_and_so_no_intruders(shape: tuple[int, int]) -> None:
    zero = torch.zeros(shape)
    assert intruders(svd(zero), leading_triplets(zero, 10)).count == 0


def test_cosines_with_clusters_equal_the_definition_of_single_matrices_and_of_stacks() -> None:
    generator = np.random.default_rng(4)
    U, V = orthonormal(generator, 30, 20), orthonormal(generator, 20, 20)
    s = np.concatenate([[9.0], 5 * (1 + 1e-3 * np.arange(4)[::-1]), np.linspace(2, 1, 15)])
    W = (U * s) @ V.T
    tuned = W + 2 * np.outer(U[:, 1:5].sum(1), V[:, 1:5].sum(1)) / 4 + 0.3 * generator.normal(size=W.shape)
    both = torch.from_numpy(np.stack([W, W])), torch.from_numpy(np.stack([W + 0.1, tuned]))
    base, found = spectra(both[0], squarable=True), triplets(both[1], 6, squarable=True)
    for side in SIDES:
        many = cluster_cosines(base, found, best_cosines(base, found, 6, side)[1], side)
        for at in range(2):
            one = svd(both[0][at]), leading_triplets(both[1][at], 6)
            partner = best_cosines(*one, 6, side)[1]
            cosines, members = cluster_cosines(*one, partner, side)
            np.testing.assert_allclose(many[0][at], cosines, atol=1e-9)
            assert many[1][at].tolist() == members.tolist()
            basis, vectors = (one[0].U, one[1].Y) if side == "left" else (one[0].V, one[1].Z)
            for j, i in enumerate(partner):
                near = np.abs(s - s[i]) <= 0.01 * s[i]
                assert members[j] == near.sum()
                assert cosines[j] == pytest.approx(np.linalg.norm((basis.T @ vectors[:, j]).numpy()[near]), abs=1e-9)
    assert 4 in members


def test_null_is_near_the_best_cosine_of_random_directions() -> None:
    """The asymptotic sqrt(2 ln d / d) is some 8 % above the mean at d = 512."""
    d = 512
    generator = np.random.default_rng(1)
    random = generator.normal(size=(500, d))
    mean = np.mean(np.max(np.abs(random), axis=1) / np.linalg.norm(random, axis=1))
    W = torch.diag(torch.arange(d, 0, -1).float())
    found = intruders(svd(W), leading_triplets(W, 10))
    assert mean < found.null < 1.12 * mean


def test_zero_to_rounding_follows_the_dtype_of_the_triplets() -> None:
    """float32 weights are moved by their storage, float64 ones by their solver alone."""
    W = torch.from_numpy(np.random.default_rng(3).normal(size=(20, 30)))
    stored, solved = 20**0.5 * 2.0**-23, 30 * 2.0**-52
    wide, narrow = (svd(W), leading_triplets(2 * W, 3)), (svd(W.float()), leading_triplets(2 * W.float(), 3))
    assert zero_to_rounding(*wide) == solved and zero_to_rounding(*narrow) == stored
    assert zero_to_rounding(wide[0], narrow[1]) == stored and zero_to_rounding(narrow[0], wide[1]) == stored
    assert zero_to_rounding(svd(W.float(), torch.float64), wide[1]) == 1e-11  # of a base that was squared
    assert zero_to_rounding(wide[0], replace(wide[1], residual=1e-9)) == stored  # iterated
    stack = spectra(W[None], squarable=False), triplets(2 * W[None], 3, squarable=False)
    assert zero_to_rounding(*stack) == stored and zero_to_rounding(*stack, torch.float64) == solved

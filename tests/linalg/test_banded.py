"""Large matrices, reduced in two stages, give what small ones give: held here at sizes that take no time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from spectra.linalg import symmetric
from spectra.linalg.banded import BAND, MOST_VECTORS, reduce_to_band
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.perturbed import perturbed_triplets
from spectra.linalg.slices import singular_slice
from spectra.linalg.svd import svd
from spectra.linalg.triplets import leading_triplets, singular_values
from tests.reference import singular
from tests.reference.singular import Array
from tests.strategies import orthonormal, with_spectrum

SPECTRA: dict[str, Callable[[int], Array]] = {
    "even": lambda k: np.linspace(2.0, 1.0, k),
    "decaying": lambda k: np.logspace(0, -6, k),
    "clustered": lambda k: np.sort(np.resize([3.0, 2.0, 1.0], k))[::-1],
    "few": lambda k: np.where(np.arange(k) < 7, 2.0 - np.arange(k) / 7, 0.0),
    "half": lambda k: np.where(np.arange(k) < k // 2, 2.0 - np.arange(k) / k, 0.0),
}


@pytest.fixture(autouse=True)
def all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "LARGE", BAND + 2)


def gram_with(p: int, eigenvalues: Array) -> Array:
    Q = orthonormal(np.random.default_rng(p), p, p)
    return np.asfortranarray((Q * eigenvalues) @ Q.T)


@pytest.mark.parametrize("p", [BAND + 1, BAND + 2, 2 * BAND, 2 * BAND + 1, 2 * BAND + 2, 150, 241])
def test_values_and_vectors_are_those_of_the_matrix(p: int) -> None:
    """Whatever is left over for the last panel."""
    eigenvalues = np.linspace(3.0, -1.0, p)
    G = gram_with(p, eigenvalues)
    banded = reduce_to_band(np.asfortranarray(np.tril(G)))  # the upper triangle is not read
    np.testing.assert_allclose(banded.eigenvalues, eigenvalues, rtol=0, atol=1e-13)
    for start, stop in ((0, 10), (p // 2, p // 2 + 3), (p - 2, p)):
        X = banded.eigenvectors_between(start, stop)
        np.testing.assert_allclose(G @ X, X * eigenvalues[start:stop], rtol=0, atol=1e-12)
        np.testing.assert_allclose(X.T @ X, np.eye(stop - start), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 1e-15, 1e-13, 1e-10])
def test_vectors_of_a_cluster_are_orthonormal_and_span_it(spread: float) -> None:
    p = 120
    eigenvalues = np.concatenate([2 + spread * np.arange(5, 0, -1), np.linspace(1, 0, p - 5)])
    G = gram_with(p, eigenvalues)
    X = reduce_to_band(G.copy(order="F")).eigenvectors_between(0, 5)
    np.testing.assert_allclose(X.T @ X, np.eye(5), rtol=0, atol=1e-12)
    np.testing.assert_allclose(G @ X, 2 * X, rtol=0, atol=1e-9)


def test_too_many_vectors_are_refused() -> None:
    banded = reduce_to_band(gram_with(120, np.linspace(1, 0, 120)))
    with pytest.raises(LapackError, match="too many"):
        banded.eigenvectors_between(0, MOST_VECTORS + 1)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(160, 160), (160, 240), (240, 160)])
def test_what_stands_on_it_is_as_exact_as_ever(kind: str, m: int, n: int) -> None:
    s = SPECTRA[kind](min(m, n))
    W = torch.from_numpy(with_spectrum(np.random.default_rng(0), m, n, s)).float()
    expected = singular.svd(W.double().numpy())
    tolerance = 1e-9 * s[0]
    np.testing.assert_allclose(singular_values(W).numpy(), expected.s, rtol=0, atol=tolerance)
    triplets = leading_triplets(W, 10)
    np.testing.assert_allclose(triplets.S.numpy(), expected.s, rtol=0, atol=tolerance)
    Y, Z = triplets.Y.double().numpy(), triplets.Z.double().numpy()
    np.testing.assert_allclose(W.double().numpy() @ Z, Y * expected.s[:10], rtol=0, atol=1e-6 * s[0])
    np.testing.assert_allclose(Y.T @ Y, np.eye(10), rtol=0, atol=1e-6)
    part = singular_slice(W, 20, 12)
    np.testing.assert_allclose(part.S.numpy(), expected.s[20:32], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(160, 160), (160, 240), (240, 160)])
def test_adapters_too(kind: str, m: int, n: int) -> None:
    generator = np.random.default_rng(1)
    W = torch.from_numpy(with_spectrum(generator, m, n, SPECTRA[kind](min(m, n)))).float()
    B, A = (torch.from_numpy(0.1 * generator.normal(size=shape)).float() for shape in ((m, 4), (4, n)))
    tuned = W.double().numpy() + 0.5 * (B.double() @ A.double()).numpy()
    expected = singular.svd(tuned)
    found = perturbed_triplets(svd(W, torch.float64), LowRank(B, A, 0.5), 10)
    np.testing.assert_allclose(found.S.numpy(), expected.s, rtol=0, atol=1e-9 * expected.s[0])
    Y, Z = found.Y.numpy(), found.Z.numpy()
    np.testing.assert_allclose(tuned @ Z, Y * expected.s[:10], rtol=0, atol=1e-8 * expected.s[0])
    np.testing.assert_allclose(Y.T @ Y, np.eye(10), rtol=0, atol=1e-8)

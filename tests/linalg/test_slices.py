"""Slices of singular triplets against the float64 reference, the last ones included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.linalg.slices import singular_slice
from tests.reference import singular
from tests.strategies import weights


def graded(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    generator = np.random.default_rng(seed)
    k = min(m, n)
    U = np.linalg.qr(generator.standard_normal((m, k)))[0]
    V = np.linalg.qr(generator.standard_normal((n, k)))[0]
    return torch.from_numpy((U * np.geomspace(1, 1 / condition, k)) @ V.T).float()


@pytest.mark.parametrize("shape", [(60, 60), (40, 160), (160, 40), (320, 5), (1, 30)])
@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
def test_first_middle_and_last_slices_are_exact(shape: tuple[int, int], condition: float) -> None:
    """The product u_i s_i v_i^T of each component, whatever the signs: float32 SVDs are 26 % off in the last slice."""
    W = graded(*shape, condition)
    reference = singular.svd(W.double().numpy())
    k = min(shape)
    rank = max(1, k // 8)
    for start in {0, (k - rank) // 2, k - rank}:
        found = singular_slice(W, start, rank)
        for j in range(rank):
            i = start + j
            exact = np.outer(reference.U[:, i], reference.V[:, i]) * reference.s[i]
            component = torch.outer(found.U[:, j], found.V[:, j]).numpy() * float(found.S[j])
            assert np.linalg.norm(component - exact) <= 2e-6 * reference.s[i], (start, j)


@given(weights(), st.data())
@settings(max_examples=40)
def test_a_slice_is_part_of_the_decomposition(W: Tensor, data: st.DataObject) -> None:
    k = min(W.shape)
    start = data.draw(st.integers(0, k - 1))
    rank = data.draw(st.integers(1, k - start))
    found = singular_slice(W, start, rank)
    reference = singular.svd(W.double().numpy())
    scale = reference.s[0] or 1.0
    np.testing.assert_allclose(found.S.numpy(), reference.s[start : start + rank], atol=1e-9 * scale)
    residual = W.double().numpy() @ found.V.double().numpy() - found.U.double().numpy() * found.S.numpy()
    assert np.linalg.norm(residual) <= 1e-7 * scale * np.sqrt(rank)
    for vectors in (found.U, found.V):
        np.testing.assert_allclose((vectors.T @ vectors).double().numpy(), np.eye(rank), atol=1e-7)


@pytest.mark.parametrize(("start", "rank"), [(-1, 2), (0, 0), (4, 2), (5, 1)])
def test_a_slice_outside_the_matrix_is_refused_in_numbers(start: int, rank: int) -> None:
    with pytest.raises(ValueError, match="5 components of a 5 x 9"):
        singular_slice(torch.ones(5, 9), start, rank)

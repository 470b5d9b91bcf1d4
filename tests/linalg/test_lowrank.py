"""A low-rank product keeps its factors and still is the matrix that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.linalg.lowrank import LowRank
from tests.strategies import seeds, shapes


@given(shapes, st.integers(1, 8), seeds)
@settings(max_examples=50)
def test_views_of_the_factors_are_views_of_the_product(shape: tuple[int, int], rank: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    m, n = shape
    B, A = torch.from_numpy(generator.normal(size=(m, rank))), torch.from_numpy(generator.normal(size=(rank, n)))
    update = LowRank(B, A, 0.5)
    dense = torch.from_numpy(0.5 * np.einsum("ir,rj->ij", B.numpy(), A.numpy()))
    half, third = m // 2, n // 3
    assert update.shape == shape
    assert update.rank == rank
    torch.testing.assert_close(update.dense(), dense)
    torch.testing.assert_close(update.T.dense(), dense.T)
    torch.testing.assert_close(update.rows(half, m).dense(), dense[half:])
    torch.testing.assert_close(update.columns(third, n).dense(), dense[:, third:])
    assert update.rows(0, m).B.data_ptr() == B.data_ptr()


@pytest.mark.parametrize(("B", "A"), [((4, 2), (3, 5)), ((4,), (2, 5)), ((4, 2), (2, 5, 1))])
def test_factors_that_do_not_multiply_are_refused_with_their_shapes(B: tuple[int, ...], A: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not multiply") as refusal:
        LowRank(torch.zeros(B), torch.zeros(A))
    assert str(B) in str(refusal.value)
    assert str(A) in str(refusal.value)

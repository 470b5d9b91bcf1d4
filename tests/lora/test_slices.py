"""Slices of a weight as LoRA factors, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.errors import SpectraError
from spectra.linalg.svd import svd
from spectra.lora import slice_init, slice_start
from tests.reference import lora as reference
from tests.strategies import weights

SCALES = ["sqrt_sigma", "orthonormal"]


def made(m: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(24, 24), (12, 60), (60, 12), (1, 7)])
def test_first_middle_and_last_slices_are_those_of_a_float64_svd(
    shape: tuple[int, int], dtype: torch.dtype, scale: str
) -> None:
    W = made(*shape, dtype)
    k = min(shape)
    rank, c = max(1, k // 6), 2.5
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    for start in {0, (k - rank) // 2, k - rank}:
        for spectrum in (None, svd(W)):
            init = slice_init(W, start=start, rank=rank, scaling=c, scale=scale, spectrum=spectrum)
            assert init.A0.shape == (rank, shape[1])
            assert init.B0.shape == (shape[0], rank)
            assert init.A0.dtype == init.B0.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            exact = reference.slice_product(W.double().numpy(), start, rank, scale)
            product = c * (init.B0.double() @ init.A0.double()).numpy()
            assert np.linalg.norm(product - exact) <= tolerance * max(np.linalg.norm(exact), 1e-300)
            whole = init.W_frozen.double() + c * init.B0.double() @ init.A0.double()
            assert float((whole - W.double()).norm()) <= 3e-7 * float(W.double().norm())


@pytest.mark.parametrize("scale", SCALES)
def test_the_factors_are_balanced_and_orthogonal(scale: str) -> None:
    """B0^T B0 = A0 A0^T = diag(s) / c: neither factor learns faster than the other."""
    W, c = made(30, 20), 4.0
    init = slice_init(W, position=0.3, rank=4, scaling=c, scale=scale)
    assert init.singular_values is not None
    s = init.singular_values if scale == "sqrt_sigma" else torch.ones(4, dtype=torch.float64)
    for gram in (init.B0.T @ init.B0, init.A0 @ init.A0.T):
        torch.testing.assert_close(gram.double(), torch.diag(s) / c, atol=1e-5, rtol=1e-5)


def test_a_kept_spectrum_and_none_give_the_same_factors_with_their_signs() -> None:
    W = made(40, 28)
    alone, kept = (slice_init(W, start=9, rank=5, spectrum=spectrum) for spectrum in (None, svd(W)))
    torch.testing.assert_close(alone.A0, kept.A0, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.B0, kept.B0, atol=1e-5, rtol=0)


@given(weights(), st.floats(0, 1), st.data())
@settings(max_examples=30)
def test_a_slice_anywhere_of_any_weight_preserves_it(W: Tensor, position: float, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(W.shape)))
    init = slice_init(W, position=position, rank=rank, scaling=0.5)
    assert init.start == round(position * (min(W.shape) - rank))
    rest = W.double() - init.W_frozen.double() - 0.5 * init.B0.double() @ init.A0.double()
    assert float(rest.norm()) <= 1e-6 * float(W.double().norm()) + 1e-40


def test_a_rank_deficient_weight_has_zero_factors_past_its_rank() -> None:
    W = made(20, 3, torch.float64) @ made(3, 16, torch.float64, seed=1)
    init = slice_init(W, start=2, rank=4)
    lengths = init.A0.norm(dim=1)
    assert lengths[0] > 0.1
    assert float(lengths[1:].max()) < 1e-6
    unit = slice_init(W, start=2, rank=4, scale="orthonormal")
    torch.testing.assert_close(unit.A0 @ unit.A0.T, torch.eye(4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_slice_may_not_be_cut_from_another_weights_spectrum() -> None:
    W = made(20, 12)
    kept = svd(W)
    moved = W + 1e-2 * made(20, 12, seed=5)
    with pytest.raises(SpectraError, match="is not of this weight"):
        slice_init(moved, start=3, rank=2, spectrum=kept)
    with pytest.raises(SpectraError, match=r"20 x 12 weight .* was given for a 12 x 20 weight"):
        slice_init(W.T, start=3, rank=2, spectrum=kept)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 4}, "exactly one"),
        ({"rank": 4, "start": 0, "position": 0.0}, "exactly one"),
        ({"rank": 11, "start": 0}, "10 components and no slice of rank 11"),
        ({"rank": 0, "start": 0}, "no slice of rank 0"),
        ({"rank": 4, "start": 7}, r"\[7, 11\) does not lie in the 10"),
        ({"rank": 4, "position": 1.01}, "position is 1.01; give a number from 0"),
        ({"rank": 4, "position": "0.5"}, "position is .0.5.; give a number"),
        ({"rank": 4, "start": 1.5}, "start of a slice is 1.5; give a whole number from 0 to 6"),
        ({"rank": 2.5, "start": 1}, "rank of a slice is 2.5; give a whole number"),
        ({"rank": 4, "start": 0, "scaling": "2"}, "a scaling of .2. cannot"),
        ({"rank": 4, "start": 0, "scaling": 0.0}, "above 0"),
        ({"rank": 4, "start": 0, "scale": "sigma"}, "no scale"),
    ],
)
def test_impossible_slices_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(SpectraError, match=words):
        slice_init(made(10, 14), **options)  # type: ignore[arg-type]


def test_what_is_no_real_matrix_is_refused() -> None:
    for tensor in (torch.ones(3), torch.ones(3, 3, dtype=torch.int32), torch.ones(0, 3), torch.ones(2, 2, 2)):
        with pytest.raises(SpectraError, match="no singular slices"):
            slice_start(tensor, 1, start=0)
    with pytest.raises(SpectraError, match="NaN"):
        slice_init(torch.full((4, 4), torch.nan), start=0, rank=1)

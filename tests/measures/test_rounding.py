"""The rounding floor against rounding itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.measures.rounding import rounding
from tests.reference import rounding as reference
from tests.reference import whole
from tests.reference.singular import Array
from tests.strategies import seeds

STORAGE = [torch.bfloat16, torch.float16, torch.float32]
SHAPE = (300, 400)


def rounding_floor(W: torch.Tensor, base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> float:
    wide = W if W.dtype == torch.float64 else W.float()
    return rounding(wide, torch.zeros_like(wide), base_dtype, tuned_dtype).floor


def draw(distribution: str, generator: np.random.Generator) -> Array:
    match distribution:
        case "gaussian":
            return generator.normal(0, 0.02, SHAPE)
        case "laplace":
            return generator.laplace(0, 0.02, SHAPE)
        case "uniform":
            return generator.uniform(-0.05, 0.05, SHAPE)
        case _:  # rows of very different scale
            return generator.normal(0, 0.02, SHAPE) * np.logspace(-1, 1, SHAPE[0])[:, None]


@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "uniform", "scaled rows"])
@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype"),
    [*((dtype, dtype) for dtype in STORAGE), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
def test_the_floor_is_the_noise_that_storage_leaves(
    distribution: str, base_dtype: torch.dtype, tuned_dtype: torch.dtype
) -> None:
    """Measured at an update of many spacings, where the two roundings are independent, on 120 000 entries."""
    generator = np.random.default_rng(0)
    W = draw(distribution, generator)
    D = 0.1 * draw(distribution, generator)
    noise = reference.storage_noise(W, D, base_dtype, tuned_dtype)
    stored = torch.from_numpy(W).to(base_dtype)
    assert rounding_floor(stored, base_dtype, tuned_dtype) == pytest.approx(noise, rel=0.03)
    assert rounding_floor(stored.float(), base_dtype, tuned_dtype) == pytest.approx(noise, rel=0.03)


@pytest.mark.parametrize(
    ("dtype", "known"), [(torch.bfloat16, 1.66e-3), (torch.float16, 2.07e-4), (torch.float32, 2.5e-8)]
)
def test_gaussian_weights_have_the_known_floors(dtype: torch.dtype, known: float) -> None:
    W = torch.from_numpy(np.random.default_rng(1).normal(0, 0.02, SHAPE))
    assert rounding_floor(W, dtype, torch.float64) == pytest.approx(known, rel=0.02)
    assert rounding_floor(W, dtype, dtype) == pytest.approx(known * 2**0.5, rel=0.02)


def test_float16_below_its_normal_range_keeps_an_absolute_spacing() -> None:
    W = np.random.default_rng(2).normal(0, 1e-6, SHAPE)  # the spacing of subnormals is 6e-8
    noise = reference.storage_noise(W, 0.3 * W[::-1], torch.float16, torch.float16)
    assert rounding_floor(torch.from_numpy(W), torch.float16, torch.float16) == pytest.approx(noise, rel=0.05)


@given(seeds, st.sampled_from(STORAGE), st.integers(-40, 40))
@settings(max_examples=20)
def test_the_floor_is_relative(seed: int, dtype: torch.dtype, exponent: int) -> None:
    W = torch.from_numpy(np.random.default_rng(seed).normal(size=(20, 30))).float()
    wide = torch.float32 if dtype == torch.float16 else dtype  # float16 has not the range
    assert rounding_floor(W * 2.0**exponent, wide, wide) == pytest.approx(rounding_floor(W, wide, wide), rel=1e-9)


def test_exact_zeros_carry_no_noise_and_a_zero_weight_has_no_floor() -> None:
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([W, torch.zeros(20, 30)], dim=1)
    assert rounding_floor(padded, torch.bfloat16, torch.bfloat16) == pytest.approx(
        rounding_floor(W, torch.bfloat16, torch.bfloat16), rel=1e-9
    )
    assert rounding_floor(torch.zeros(3, 4), torch.bfloat16, torch.bfloat16) == 0


@pytest.mark.parametrize("dtype", [*STORAGE, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_unmoved_share_counts_steps_of_one_spacing(dtype: torch.dtype, size: float) -> None:
    generator = np.random.default_rng(3)
    W = torch.from_numpy(generator.normal(size=SHAPE)).to(dtype)
    D = size * float(torch.finfo(dtype).eps) * 40 * generator.normal(size=SHAPE)
    tuned = (W.double() + torch.from_numpy(D)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    update = tuned.to(wide) - W.to(wide)
    assert rounding(W.to(wide), update, dtype, dtype).unmoved_share == pytest.approx(
        whole.unmoved_share(W, tuned), abs=1e-12
    )


@pytest.mark.parametrize(("one", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_unmoved_is_told_by_the_coarser_dtype(one: torch.dtype, other: torch.dtype) -> None:
    W = torch.from_numpy(np.random.default_rng(4).uniform(1, 2, SHAPE)).float()  # spacing eps in every dtype
    coarse, fine = sorted((torch.finfo(one).eps, torch.finfo(other).eps), reverse=True)
    for pair in ((one, other), (other, one)):
        assert rounding(W, torch.full(SHAPE, 0.9 * coarse), *pair).unmoved_share == 1
        assert rounding(W, torch.full(SHAPE, 1.1 * coarse), *pair).unmoved_share == 0
    assert fine < coarse

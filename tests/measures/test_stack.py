"""A stack of matrices is measured as its matrices are: against the definitions, and against `measure`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.linalg.batched import spectra
from spectra.linalg.svd import svd
from spectra.measures.matrix import Measured, measure
from spectra.measures.stack import measure_stack
from tests.reference import decomposition, whole
from tests.reference import intruders as reference
from tests.reference.singular import clusters
from tests.reference.singular import svd as reference_svd
from tests.strategies import build, seeds, shapes

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def measured(W: Tensor, tuned: Tensor, dtype: torch.dtype) -> list[Measured]:
    base = spectra(W.double(), squarable=dtype != torch.float64)
    return measure_stack(W.double(), base, tuned.double(), base_dtype=dtype, tuned_dtype=dtype, top=5)


def made(seed: int, shape: tuple[int, int], size: float, dtype: torch.dtype, b: int = 3) -> tuple[Tensor, Tensor]:
    """Weights of distinct singular values, and the same with random updates of a size, as `dtype` stores them."""
    generator = np.random.default_rng(seed)
    W = torch.from_numpy(np.stack([build(generator, "separated", *shape) for _ in range(b)])).to(dtype)
    D = torch.from_numpy(size * generator.normal(size=tuple(W.shape)))
    return W, (W.double() + D).to(dtype)


@given(shapes, seeds, st.sampled_from([0.3, 1e-3]), st.sampled_from(DTYPES))
@settings(max_examples=50)
def test_every_number_equals_its_definition(shape: tuple[int, int], seed: int, size: float, dtype: torch.dtype) -> None:
    W, tuned = made(seed, shape, size, dtype)
    for got, before, after in zip(measured(W, tuned, dtype), W.double().numpy(), tuned.double().numpy(), strict=True):
        D = after - before
        total = float(np.sum(D**2))
        if total == 0:
            continue
        layer, columns = got.layer, got.components
        expected = {
            "relative_update": whole.relative_update(before, D),
            "nuclear_norm_update": whole.nuclear_norm(D),
            "stable_rank": whole.stable_rank(D),
            "effective_rank": whole.effective_rank(D),
            "effective_rank_tuned": whole.effective_rank(after),
            "spectral_norm_tuned": whole.spectral_norm(after),
            "energy_rank_90": whole.energy_rank(D, 0.9),
            "numerical_rank": whole.numerical_rank(D, layer["rank_tolerance"]),
        }
        for name, value in expected.items():
            assert layer[name] == pytest.approx(value, rel=1e-6), name
        assert layer["spectral_shift"] == pytest.approx(whole.spectral_shift(before, after), rel=1e-6, abs=1e-9)
        if len(clusters(reference_svd(before).s, 1e-2)) < min(shape):
            continue
        split = decomposition.decompose(before, D)
        for name in ("row_energy", "column_energy", "outside_energy"):
            np.testing.assert_allclose(columns[name], getattr(split, name), rtol=0, atol=1e-6 * total, err_msg=name)
        for name in ("plasticity", "left_stability", "right_stability", "stability"):
            np.testing.assert_allclose(columns[name], getattr(split, name), rtol=0, atol=1e-6, err_msg=name)
        if dtype != torch.float64:
            assert layer["unmoved_share"] == whole.unmoved_share(
                *(torch.from_numpy(X).to(dtype) for X in (before, after))
            )
        if len(clusters(reference_svd(after).s, 1e-2)) == min(shape):
            assert layer["left_overlap"] == pytest.approx(whole.subspace_overlap(before, after, 5), abs=1e-6)
            matches = reference.best_matches(before, after, 5)
            assert layer["lowest_best_cosine"] == pytest.approx(min(match.best_cosine for match in matches), abs=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 6), (6, 1), (1, 1), (150, 140)])
@pytest.mark.parametrize("kind", ["gaussian", "rank_deficient", "zero"])
def test_a_stack_says_what_a_single_matrix_says(shape: tuple[int, int], kind: str) -> None:
    generator = np.random.default_rng(0)
    W = torch.from_numpy(np.stack([build(generator, kind, *shape) for _ in range(2)])).float()  # type: ignore[arg-type]
    tuned = W + 0.1 * torch.from_numpy(generator.normal(size=tuple(W.shape))).float()
    stack = measured(W, tuned, torch.float32)
    for got, before, after in zip(stack, W, tuned, strict=True):
        alone = measure(before, svd(before), after, base_dtype=torch.float32, tuned_dtype=torch.float32, top=5)
        assert list(got.layer) == list(alone.layer)
        depends_on_a_basis = kind != "gaussian"  # of the directions of zeros, which are each solver's choice
        chosen = ("share", "enrich", "cos", "overlap", "angle", "intruders") if depends_on_a_basis else ()
        for name, value in alone.layer.items():
            if name.endswith("algorithm") or any(word in name for word in chosen):
                continue
            assert type(got.layer[name]) is type(value), name
            if isinstance(value, float):
                assert got.layer[name] == pytest.approx(value, rel=1e-5, abs=2e-6, nan_ok=True), name
            else:
                assert got.layer[name] == value, name
        assert list(got.components) == list(alone.components)
        assert list(got.slices) == list(alone.slices)
        for name in ("singular_value", "tuned_singular_value", "update_singular_value", "gap"):
            np.testing.assert_allclose(got.components[name], alone.components[name], atol=1e-7, err_msg=name)
        for name in ("slice", "start", "stop"):
            np.testing.assert_array_equal(got.slices[name], alone.slices[name])
        if not depends_on_a_basis:
            for name in ("block_energy", "cross_energy", "block_share", "cross_share", "plasticity"):
                np.testing.assert_allclose(got.slices[name], alone.slices[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("shape", [(63, 63), (24, 24), (17, 90), (90, 17), (1, 5), (5, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_of_a_row_depends_on_the_others(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W, tuned = made(1, shape, 0.05, dtype, b=40)
    W[5] = 0
    tuned[6] = 0
    W[7, :, 1:] = 0
    tuned[8] = W[8] + tuned[8, :, :1] @ W[8, :1]
    whole_stack = measured(W, tuned, dtype)
    for index in ([0], [5], [6], [7], [8], [39], [3, 8], [6, 2, 39]):
        for got, i in zip(measured(W[index], tuned[index], dtype), index, strict=True):
            expected = whole_stack[i]
            assert repr(got.layer) == repr(expected.layer)
            for tables in ("components", "slices"):
                for name, column in getattr(expected, tables).items():
                    np.testing.assert_array_equal(getattr(got, tables)[name], column, err_msg=f"{name} of {i}")


def test_a_merged_adapter_is_recognised_in_a_stack_and_nothing_else_is() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 64, 48, generator=generator)
    D = 0.05 * torch.randn(3, 64, 48, generator=generator)
    D[1] = 0.05 * torch.randn(64, 3, generator=generator) @ torch.randn(3, 48, generator=generator)
    layers = [row.layer for row in measured(W, W + D, torch.float32)]
    assert [layer["low_rank"] for layer in layers] == [None, 3, None]
    assert layers[1]["numerical_rank"] == 3
    assert 0 < layers[1]["low_rank_residual"] < 1e-4

"""Stacks of matrices against LAPACK's gesvd in float64, one matrix at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.linalg.batched import gram_spectra, gram_triplets, gram_values, is_small, matmul, spectra, triplets, values
from spectra.linalg.lapack import LapackError
from tests.reference import singular
from tests.reference.singular import Array
from tests.strategies import KINDS, build, seeds, shapes, with_spectrum

SHAPES = [(16, 16), (9, 31), (31, 9), (1, 7), (7, 1), (1, 1)]


def stack_of_all_kinds(seed: int, m: int, n: int, dtype: torch.dtype = torch.float32, exponent: int = 0) -> Tensor:
    """One matrix of every kind, as float64 numbers that `dtype` holds."""
    generator = np.random.default_rng(seed)
    stack = np.stack([np.ldexp(build(generator, kind, m, n), exponent) for kind in KINDS])
    return torch.from_numpy(stack).to(dtype).double()


def references(stack: Tensor) -> list[singular.SVD]:
    return [singular.svd(W.numpy()) for W in stack]


def gram(D: Tensor) -> Tensor:
    A = D if D.shape[1] <= D.shape[2] else D.mT
    return matmul(A, A.mT)


@given(shapes, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.sampled_from([0, -100, 100]))
@settings(max_examples=80)
def test_values_and_factors_equal_the_reference(
    shape: tuple[int, int], seed: int, dtype: torch.dtype, exponent: int
) -> None:
    stack = stack_of_all_kinds(seed, *shape, dtype, exponent)
    squarable, k = dtype != torch.float64, min(shape)
    found, leading = spectra(stack, squarable), triplets(stack, 5, squarable)
    of_update = values(stack, gram(stack), squarable)
    for i, expected in enumerate(references(stack)):
        scale = expected.s[0]
        for S in (found.S, leading.S, of_update):
            np.testing.assert_allclose(S[i].numpy(), expected.s, rtol=0, atol=1e-9 * scale)
        U, S, V = (X[i].numpy() for X in (found.U, found.S, found.V))
        np.testing.assert_allclose(U.T @ U, np.eye(k), atol=1e-6)
        np.testing.assert_allclose(V.T @ V, np.eye(k), atol=1e-6)
        np.testing.assert_allclose((U * S) @ V.T, stack[i].numpy(), rtol=0, atol=1e-9 * scale)
        for j in range(min(5, k)):
            image = stack[i].numpy() @ leading.Z[i, :, j].numpy()
            np.testing.assert_allclose(image, expected.s[j] * leading.Y[i, :, j].numpy(), rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48)])
def test_what_squaring_spoils_is_told_and_solved_again(shape: tuple[int, int]) -> None:
    generator, k = np.random.default_rng(0), min(shape)
    made: dict[str, Array] = {
        "bulk": np.linspace(2.0, 1.0, k),
        "decaying": np.logspace(0, -6, k),
        "rank deficient": np.append(np.linspace(2.0, 1.0, k - 3), np.zeros(3)),
        "zero": np.zeros(k),
    }
    stack = torch.from_numpy(np.stack([with_spectrum(generator, *shape, s) for s in made.values()])).float().double()
    assert gram_spectra(stack).sound.tolist() == [True, False, False, False]
    assert gram_triplets(stack, 5).sound.tolist() == [True, False, False, False]
    assert gram_values(gram(stack))[1].tolist() == [True, False, False, False]
    found = spectra(stack, squarable=True)
    assert found.algorithms == ("gram64", "gesdd64", "gesdd64", "gesdd64")
    assert triplets(stack, 5, squarable=True).algorithms == found.algorithms
    for i, expected in enumerate(references(stack)):
        np.testing.assert_allclose(found.S[i].numpy(), expected.s, rtol=1e-9, atol=1e-14 * max(expected.s[0], 1))
    tail = references(stack)[1]
    for got, true in ((found.U[1], tail.U), (found.V[1], tail.V)):
        np.testing.assert_allclose(np.abs(np.sum(got.numpy() * true, axis=0)), 1.0, atol=1e-6)


def test_a_wrong_eigenvalue_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of_all_kinds(0, 12, 12)[:2]
    right = np.linalg.eigh

    def wrong(G: Array) -> tuple[Array, Array]:
        squares, vectors = right(G)
        squares[1, -1] *= 1.0001
        return squares, vectors

    monkeypatch.setattr(np.linalg, "eigh", wrong)
    assert gram_spectra(stack).sound.tolist() == [True, False]


def test_large_matrices_that_squaring_spoils_take_the_way_of_a_single_one() -> None:
    shape = (140, 150)
    assert not is_small(*shape)
    generator = np.random.default_rng(1)
    made = [np.linspace(2.0, 1.0, 140), np.logspace(0, -6, 140), np.append(np.linspace(2.0, 1.0, 70), np.zeros(70))]
    stack = torch.from_numpy(np.stack([with_spectrum(generator, *shape, s) for s in made])).float().double()
    found, leading = spectra(stack, squarable=True), triplets(stack, 3, squarable=True)
    of_update = values(stack, gram(stack), squarable=True)
    assert found.algorithms == ("gram64",) * 3  # two-level: squared, and its tail once more without squaring
    for i, expected in enumerate(references(stack)):
        for S in (found.S, leading.S, of_update):
            np.testing.assert_allclose(S[i].numpy(), expected.s, rtol=0, atol=1e-9 * expected.s[0])
        U, S, V = (X[i].numpy() for X in (found.U, found.S, found.V))
        np.testing.assert_allclose((U * S) @ V.T, stack[i].numpy(), rtol=0, atol=1e-9 * expected.s[0])


@pytest.mark.parametrize("shape", [(64, 64), (63, 63), (17, 31), (129, 7), (1, 9), (33, 768)])
@pytest.mark.parametrize("squarable", [True, False])
def test_the_bits_of_a_matrix_do_not_depend_on_its_company(shape: tuple[int, int], squarable: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(20, *shape, generator=generator).double()
    stack[3] = 0
    stack[7, :, 1:] = 0
    G = gram(stack)
    whole, leading, of_update = spectra(stack, squarable), triplets(stack, 4, squarable), values(stack, G, squarable)
    for index in ([0], [3], [7], [19], [5, 3], [8, 7, 2]):
        part = stack[index].clone()
        some, some_leading = spectra(part, squarable), triplets(part, 4, squarable)
        for X, Y in ((whole.U, some.U), (whole.S, some.S), (whole.V, some.V), (leading.Y, some_leading.Y)):
            assert torch.equal(X[index], Y)
        assert torch.equal(leading.Z[index], some_leading.Z)
        assert torch.equal(gram(part), G[index])
        assert torch.equal(values(part, gram(part), squarable), of_update[index])


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_hold_on_a_device_without_data(shape: tuple[int, int]) -> None:
    """What runs on `meta` asks no number of a tensor, and makes none on another device."""
    b, (m, n), k = 5, shape, min(shape)
    stack = torch.empty(b, m, n, dtype=torch.float64, device="meta")
    found, leading = gram_spectra(stack), gram_triplets(stack, 4)
    S, sound = gram_values(gram(stack))
    j = min(4, k)
    assert (found.U.shape, found.S.shape, found.V.shape) == ((b, m, k), (b, k), (b, n, k))
    assert (leading.Y.shape, leading.S.shape, leading.Z.shape) == ((b, m, j), (b, k), (b, n, j))
    assert S.shape == (b, k)
    for flags in (found.sound, leading.sound, sound):
        assert (flags.shape, flags.dtype, flags.device.type) == ((b,), torch.bool, "meta")
    for X in (found.U, found.S, found.V, leading.Y, leading.S, leading.Z, S):
        assert (X.dtype, X.device.type) == (torch.float64, "meta")


def test_a_solver_that_fails_is_a_lapack_error() -> None:
    with pytest.raises(LapackError):
        spectra(torch.full((2, 3, 3), torch.nan, dtype=torch.float64), squarable=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [*SHAPES, (150, 140)])
def test_cuda_agrees_with_the_reference(shape: tuple[int, int]) -> None:
    stack = stack_of_all_kinds(0, *shape)
    there = stack.cuda()
    found, leading = spectra(there, squarable=True), triplets(there, 3, squarable=True)
    for i, expected in enumerate(references(stack)):
        for S in (found.S, leading.S, values(there, gram(there), squarable=True)):
            np.testing.assert_allclose(S[i].cpu().numpy(), expected.s, rtol=0, atol=1e-9 * expected.s[0])
        U, S, V = (X[i].cpu().numpy() for X in (found.U, found.S, found.V))
        np.testing.assert_allclose((U * S) @ V.T, stack[i].numpy(), rtol=0, atol=1e-6 * expected.s[0])

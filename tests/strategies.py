"""Hypothesis strategies for weight matrices: their shapes, spectra, dtypes and scales."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Kind = Literal["gaussian", "separated", "decaying", "clustered", "rank_deficient", "zero"]

KINDS: tuple[Kind, ...] = ("gaussian", "separated", "decaying", "clustered", "rank_deficient", "zero")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Binary exponents that bring entries near 1e-30 and 1e30, and below the smallest normal number (2^-126, float16 2^-14).
SCALES = {
    torch.bfloat16: (0, -100, 100, -130),
    torch.float16: (0, -16, 10),
    torch.float32: (0, -100, 100, -130),
    torch.float64: (0, -100, 100),
}

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(2, 24)
vectors = st.one_of(st.tuples(st.just(1), sides), st.tuples(sides, st.just(1)), st.just((1, 1)))
shapes = st.one_of(*[st.tuples(sides, sides)] * 5, sides.map(lambda side: (side, side)), vectors)


def orthonormal(generator: np.random.Generator, rows: int, columns: int) -> Array:
    """A random (rows, columns) matrix with orthonormal columns; rows >= columns."""
    Q, R = np.linalg.qr(generator.normal(size=(rows, columns)))
    signed: Array = Q * np.sign(np.diag(R))
    return signed


def with_spectrum(generator: np.random.Generator, m: int, n: int, s: Array) -> Array:
    """A random m x n matrix with the singular values s (min(m, n) of them)."""
    product: Array = (orthonormal(generator, m, len(s)) * s) @ orthonormal(generator, n, len(s)).T
    return product


def build(generator: np.random.Generator, kind: Kind, m: int, n: int) -> Array:
    """A random m x n matrix of a kind, largest entries near 1."""
    k = min(m, n)
    match kind:
        case "gaussian":
            return generator.normal(size=(m, n))
        case "separated":  # every gap is at least 0.75 / k, so that every singular vector is well defined
            return with_spectrum(generator, m, n, np.linspace(2.0, 1.0, k) + generator.uniform(0, 0.25 / k, k))
        case "decaying":
            return with_spectrum(generator, m, n, np.logspace(0, -6, k))
        case "clustered":
            return with_spectrum(generator, m, n, np.sort(generator.choice([1.0, 0.6, 0.3], k))[::-1])
        case "rank_deficient":  # small integers, exact in every dtype: the zero singular values are exactly zero
            r = int(generator.integers(0, k))
            return (generator.integers(-2, 3, (m, r)) @ generator.integers(-2, 3, (r, n))).astype(float) / 4
        case "zero":
            return np.zeros((m, n))


@st.composite
def weights(
    draw: st.DrawFn,
    *,
    kinds: tuple[Kind, ...] = KINDS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    shapes: st.SearchStrategy[tuple[int, int]] = shapes,
    unscaled: bool = False,
) -> Tensor:
    """A weight matrix W (m x n) of any kind, dtype and scale."""
    dtype = draw(st.sampled_from(dtypes))
    m, n = draw(shapes)
    W = build(np.random.default_rng(draw(seeds)), draw(st.sampled_from(kinds)), m, n)
    exponent = 0 if unscaled else draw(st.sampled_from(SCALES[dtype]))
    return torch.from_numpy(np.ldexp(W, exponent)).to(dtype)


@st.composite
def pairs(
    draw: st.DrawFn,
    *,
    kinds: tuple[Kind, ...] = KINDS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    shapes: st.SearchStrategy[tuple[int, int]] = shapes,
    unscaled: bool = False,
) -> tuple[Tensor, Tensor]:
    """A weight W and an update D of its shape and scale, in float64 where W is and in float32 elsewhere."""
    W = draw(weights(kinds=kinds, dtypes=dtypes, shapes=shapes, unscaled=unscaled))
    generator = np.random.default_rng(draw(seeds))
    size = draw(st.sampled_from([1.0, 1e-2, 1e-5, 0.0]))
    scale = float(W.double().abs().max()) or 1.0
    D = torch.from_numpy(size * scale * generator.normal(size=tuple(W.shape)))
    return W, D if W.dtype == torch.float64 else D.float()

"""Large symmetric matrices reduced in two stages: by matrix products to a band, and the band to tridiagonal form.

Half of the flops of the usual reduction (dsytrd) are matrix-vector products, which read the whole matrix for each of
its columns. Once it does not fit into the processor's cache, they take most of the time. To a band of some columns, all
of the work is done in products of matrices; the band fits into the cache. The price is paid by eigenvectors, which have
to go back through both stages: so only values and a few vectors are to be had here.

Source: Bischof, Lang, Sun, *A framework for symmetric band reduction*, ACM Trans. Math. Softw. 26 (2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spectra.linalg.lapack import Float64Array, LapackError, call, run

BAND = 48  # subdiagonals of the band: wider ones make better products, and more rotations afterwards
MOST_VECTORS = 64  # each costs the solution of a banded system
AGREEMENT = 1e-12  # of the largest eigenvalue: how near vectors must come to the eigenvalues that are known


@dataclass(frozen=True)
class Banded:
    """G = Q B Q^T with B symmetric of BAND subdiagonals. Eigenvalues are numbered from the largest down."""

    reflectors: Float64Array  # (p, p) Fortran order: Q as Householder vectors, under the band
    tau: Float64Array  # (p,)
    band: Float64Array  # (BAND + 1, p) Fortran order: B_{i+j, j} at [i, j]
    eigenvalues: Float64Array  # (p,) descending

    def eigenvectors_between(self, start: int, stop: int) -> Float64Array:
        """Vectors [start, stop) as columns (p, stop - start), by inverse iteration on the band: 300 p r BAND^2 flops.

        Raises LapackError for more than MOST_VECTORS, and where what is found does not belong to the eigenvalues.
        """
        p, values = len(self.tau), self.eigenvalues[start:stop]
        if len(values) > MOST_VECTORS:
            raise LapackError(f"{len(values)} eigenvectors are too many for a matrix reduced to a band")
        X = np.random.default_rng(0).standard_normal((p, len(values)))
        for column, value in zip(X.T, values, strict=True):
            column[:] = self._nearest(value, column)
        X = np.linalg.qr(X).Q  # neighbours closer than rounding are found mixed
        B_X = self._times(X)
        found, mixing = np.linalg.eigh(X.T @ B_X)  # ascending
        found, mixing = found[::-1], mixing[:, ::-1]
        error = max(np.abs(found - values).max(), np.linalg.norm(B_X @ mixing - (X @ mixing) * found, axis=0).max())
        if not error <= AGREEMENT * max(self.eigenvalues[0], -self.eigenvalues[-1]):
            raise LapackError(f"the eigenvectors of a band are off by {error:.1e}")
        return self._back_transformed(np.asfortranarray(X @ mixing))

    def _nearest(self, value: float, start: Float64Array) -> Float64Array:
        """The unit vector of the eigenvalue nearest to `value`: two solutions with B - value."""
        p, b = len(start), BAND
        A = np.zeros((3 * b + 1, p), order="F")  # general band storage with room for pivoting
        A[2 * b :] = self.band
        for i in range(1, b + 1):
            A[2 * b - i, i:] = self.band[i, : p - i]
        # On the eigenvalue itself the system would be singular; this far off, every other vector is still damped.
        A[2 * b] -= value + np.finfo(np.float64).eps * p * self.eigenvalues[0]
        pivots, x = np.empty(p, dtype=np.intc), start.copy()
        run("dgbtrf", p, p, b, b, A, 3 * b + 1, pivots)
        for _ in range(2):
            run("dgbtrs", b"N", p, b, b, 1, A, 3 * b + 1, pivots, x, p)
            x /= np.linalg.norm(x)
        return x

    def _times(self, X: Float64Array) -> Float64Array:
        """B X."""
        product: Float64Array = self.band[0][:, None] * X
        for i in range(1, BAND + 1):
            below = self.band[i, : len(X) - i, None]
            product[i:] += below * X[:-i]
            product[:-i] += below * X[i:]
        return product

    def _back_transformed(self, X: Float64Array) -> Float64Array:
        """Q X, 2 p^2 r flops. Overwrites X (p, r) in Fortran order."""
        p, r = X.shape
        for j in reversed(range(0, p - BAND - 1, BAND)):
            rows, tau = p - j - BAND, self.tau[j : j + BAND]
            V, count = self.reflectors[j + BAND :, j:], min(BAND, rows)
            run("dormqr", b"L", b"N", rows, r, count, V, p, tau, X[j + BAND :], p, workspace=1)
        return X


def reduce_to_band(G: Float64Array) -> Banded:
    """The band and all eigenvalues of G, 4/3 p^3 + 6 p^2 BAND flops. Overwrites the p x p Fortran-ordered array `G`.

    Only the lower triangle of `G` is read; p > BAND.
    """
    p, tau = len(G), np.zeros(len(G))
    for j in range(0, p - BAND - 1, BAND):
        panel, A = G[j + BAND :, j:], G[j + BAND :, j + BAND :]
        _annihilate(panel, A, p, tau[j : j + BAND])
    band = np.zeros((BAND + 1, p), order="F")
    for i in range(BAND + 1):
        band[i, : p - i] = np.diagonal(G, -i)
    d, e = np.empty(p), np.empty(p)
    run("dsbtrd", b"N", b"L", p, BAND, band.copy(order="F"), BAND + 1, d, e, np.empty(1), 1, np.empty(p))
    run("dsterf", p, d, e)
    return Banded(G, tau, band, d[::-1].copy())


def _annihilate(panel: Float64Array, A: Float64Array, leading: int, tau: Float64Array) -> None:
    """What lies under the band in the panel's first columns becomes zero; A, right of them, becomes Q^T A Q.

    With Q = 1 - V T V^T and X = A V T, Q^T A Q = A - V Y^T - Y V^T where Y = X - V (T^T V^T X) / 2.
    """
    n, k = len(panel), min(BAND, len(panel))
    run("dgeqrf", n, BAND, panel, leading, tau, workspace=1)
    V = np.tril(panel[:, :k], -1)  # (n, k)
    np.fill_diagonal(V, 1.0)
    V = np.asfortranarray(V)
    T = np.zeros((k, k), order="F")
    call("dlarft", b"F", b"C", n, k, V, n, tau, T, k)
    VT, X = np.asfortranarray(V @ T), np.empty((n, k), order="F")
    call("dsymm", b"L", b"L", n, k, 1.0, A, leading, VT, n, 0.0, X, n)
    Y = np.asfortranarray(X - V @ (VT.T @ X) / 2)
    call("dsyr2k", b"L", b"N", n, k, -1.0, V, n, Y, n, 1.0, A, leading)

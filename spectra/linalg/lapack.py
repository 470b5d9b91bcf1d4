"""The LAPACK and BLAS routines that SciPy carries, called without the interpreter lock.

`scipy.linalg` holds the lock while LAPACK works, so threads would wait for each other. SciPy exports the same routines
as plain function pointers for Cython; calling those through `ctypes` releases the lock. All arrays are float64,
symmetric matrices are given whole or by their lower triangle in Fortran order, and are overwritten where a docstring
says so.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# At import time, so that whoever limits BLAS threads afterwards limits SciPy's library too.
from scipy.linalg import cython_blas, cython_lapack

Float64Array = NDArray[np.float64]

REFLECTORS = 96  # Householder reflectors that are applied at once


class LapackError(ArithmeticError):
    """A LAPACK routine reported failure (info != 0)."""


def reduce_to_tridiagonal(G: Float64Array) -> Tridiagonal:
    """G = Q T Q^T with T tridiagonal (dsytrd), 4/3 p^3 flops. Overwrites the p x p Fortran-ordered array `G`.

    Only the lower triangle of `G` is read.
    """
    p = G.shape[0]
    d, e, tau = np.empty(p), np.empty(max(p - 1, 1)), np.empty(max(p - 1, 1))
    run("dsytrd", b"L", p, G, p, d, e, tau, workspace=1)
    return Tridiagonal(G, d, e[: p - 1], tau)


@dataclass(frozen=True)
class Tridiagonal:
    """The reduced form G = Q T Q^T of a symmetric p x p matrix; what is asked of it later costs less than G did.

    Eigenvalues and vectors are numbered from the largest eigenvalue down, as singular values are.
    """

    reflectors: Float64Array  # (p, p) Fortran order: Q as Householder vectors below the subdiagonal
    diagonal: Float64Array  # (p,)
    subdiagonal: Float64Array  # (p - 1,)
    tau: Float64Array  # (p - 1,)

    @property
    def size(self) -> int:
        return len(self.diagonal)

    def eigenvalues(self) -> Float64Array:
        """All eigenvalues, descending (dsterf), O(p^2) flops."""
        d, e = self.diagonal.copy(), _padded(self.subdiagonal)
        run("dsterf", self.size, d, e)
        return d[::-1].copy()

    def eigenvectors(self) -> tuple[Float64Array, Float64Array]:
        """All eigenvalues, descending, and their vectors (p x p) (dstedc): up to 10/3 p^3 flops."""
        p = self.size
        d, e = self.diagonal.copy(), _padded(self.subdiagonal)
        Z = np.empty((p, p), order="F")
        run("dstedc", b"I", p, d, e, Z, p, workspace=2)
        return d[::-1].copy(), self._back_transformed(Z)

    def eigenvectors_between(self, start: int, stop: int) -> tuple[Float64Array, Float64Array]:
        """Eigenvalues and vectors [start, stop), counted from the largest (dstemr): 2 p^2 r + O(p^2) flops."""
        p, r = self.size, stop - start
        if r == 0:
            return np.empty(0), np.empty((p, 0), order="F")
        d, e = self.diagonal.copy(), _padded(self.subdiagonal)
        found, values = np.zeros(1, dtype=np.intc), np.empty(p)
        Z = np.empty((p, r), order="F")
        support, try_high_accuracy = np.empty(2 * max(r, 1), dtype=np.intc), np.ones(1, dtype=np.intc)
        run(
            "dstemr", b"V", b"I", p, d, e, 0.0, 0.0, p - stop + 1, p - start, found, values, Z, p, r, support,
            try_high_accuracy, workspace=2,
        )  # fmt: skip
        if found[0] != r:
            raise LapackError(f"dstemr found {found[0]} of {r} eigenvectors")
        return values[:r][::-1].copy(), self._back_transformed(Z)

    def _back_transformed(self, Z: Float64Array) -> Float64Array:
        """Q Z with the order of the columns turned around (LAPACK counts from the smallest), 2 p^2 r flops.

        dormtr from the left copies rows of Z, which lie a column apart, and spends a third of its time on that. Here
        blocks of reflectors meet Z^T from the right.
        """
        p = self.size
        X = np.array(Z[:, ::-1].T, order="F")  # (r, p)
        r = X.shape[0]
        for start in range((p - 2) // REFLECTORS * REFLECTORS, -1, -REFLECTORS):
            V, rows, size = self.reflectors[start + 1 :, start:], p - 1 - start, min(REFLECTORS, p - 1 - start)
            T, work = np.empty((size, size), order="F"), np.empty((r, size), order="F")
            call("dlarft", b"F", b"C", rows, size, V, p, self.tau[start:], T, size)
            block = (rows, size, V, p, T, size, X[:, start + 1 :], r, work, r)
            call("dlarfb", b"R", b"T", b"F", b"C", r, *block)
        return X.T


def add_gram(A: Float64Array, G: Float64Array) -> None:
    """G += A A^T on the lower triangle (dsyrk), p^2 n flops. A is (p, n) in either order, G (p, p) in Fortran order."""
    p, n = A.shape
    if A.flags.f_contiguous:
        transposed, leading = b"N", p
    elif A.flags.c_contiguous:
        transposed, leading = b"T", n
    else:
        raise ValueError("A must be contiguous")
    call("dsyrk", b"L", transposed, p, n, 1.0, A, leading, 1.0, G, p)


def add_symmetric_product(P: Float64Array, Z: Float64Array, G: Float64Array) -> None:
    """G += P Z^T + Z P^T on the lower triangle (dsyr2k), 2 p^2 r flops. All in Fortran order, P and Z (p, r)."""
    p, r = P.shape
    call("dsyr2k", b"L", b"N", p, r, 1.0, P, p, Z, p, 1.0, G, p)


def call(name: str, *arguments: Any) -> None:
    """Call a BLAS or LAPACK routine that reports nothing. Arrays are passed by their first element."""
    _routine(name)(*_arguments(*arguments))


def _padded(e: Float64Array) -> Float64Array:
    """A copy of the off-diagonal with room for the p-th element that some routines write to."""
    return np.append(e, 0.0)


def run(name: str, *arguments: Any, workspace: int = 0) -> None:
    """Call a LAPACK routine with its workspaces (1: work, 2: work and iwork), whose sizes it is asked for first.

    Raises LapackError where it reports info != 0.
    """
    info = np.zeros(1, dtype=np.intc)
    routine = _routine(name)
    if workspace:
        work, iwork = np.zeros(1), np.zeros(1, dtype=np.intc)
        asked = (work, -1, iwork, -1) if workspace == 2 else (work, -1)
        routine(*_arguments(*arguments, *asked, info))
        work, iwork = np.empty(max(int(work[0]), 1)), np.empty(max(int(iwork[0]), 1), dtype=np.intc)
        given = (work, work.size, iwork, iwork.size) if workspace == 2 else (work, work.size)
        routine(*_arguments(*arguments, *given, info))
    else:
        routine(*_arguments(*arguments, info))
    if info[0] != 0:
        raise LapackError(f"{name} returned info = {info[0]}")


def _arguments(*values: Any) -> list[Any]:
    """Fortran takes every argument by reference."""
    references: list[Any] = []
    for value in values:
        match value:
            case np.ndarray():
                references.append(ctypes.c_void_p(value.ctypes.data))
            case bytes():
                references.append(ctypes.byref(ctypes.c_char(value)))
            case float():
                references.append(ctypes.byref(ctypes.c_double(value)))
            case _:
                references.append(ctypes.byref(ctypes.c_int(value)))
    return references


@cache
def _routine(name: str) -> Any:
    exported: dict[str, Any] = {**cython_blas.__pyx_capi__, **cython_lapack.__pyx_capi__}
    capsule = exported[name]
    capsule_name = ctypes.pythonapi.PyCapsule_GetName
    capsule_name.restype, capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    capsule_pointer.restype, capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    # CFUNCTYPE releases the interpreter lock during the call; PYFUNCTYPE would keep it.
    return ctypes.CFUNCTYPE(None)(capsule_pointer(capsule, capsule_name(capsule)))

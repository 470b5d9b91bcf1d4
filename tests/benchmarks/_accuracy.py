"""How far each side is from a float64 SVD: the largest errors of singular values / s_0 and of energies / ||D||^2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from _sides import ADAPTER, ADAPTER_TOP, CACHED, COLD, Plain
from _synthetic import Weights
from numpy.typing import NDArray

from spectra.measures.matrix import Measured

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """A pair in float64: singular values of both sides, and diagonal, row and column energies of C (3, k)."""

    base_values: Array
    tuned_values: Array
    energies: Array
    update_energy: float


def references(pair: Weights) -> dict[str, Reference]:
    """The exact answers for the dense update and for the adapter's, by `numpy.linalg.svd` of the stored values."""
    W = pair.base.double().numpy()
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    adapter = pair.adapter
    dense = pair.tuned.double().numpy() - W
    factored = adapter.c * (adapter.B.double() @ adapter.A.double()).numpy()
    found = {}
    for job, D in ((COLD, dense), (ADAPTER, factored)):
        values = np.asarray(np.linalg.svd(W + D, compute_uv=False), np.float64)
        found[job] = Reference(np.asarray(s, np.float64), values, _energies(U.T @ D @ Vh.T), float((D * D).sum()))
    return {**found, CACHED: found[COLD], ADAPTER_TOP: found[ADAPTER]}


def errors_of_measured(measured: Measured, exact: Reference) -> tuple[float, float]:
    """(values, energies); what a mode leaves out (NaN, or fewer values) is not held against it."""
    table = measured.components
    values = [table["singular_value"], table["tuned_singular_value"]]
    energies = np.stack([table["diagonal"] ** 2, table["row_energy"], table["column_energy"]])
    return _errors(values, energies, exact)


def errors_of_plain(plain: Plain, exact: Reference) -> tuple[float, float]:
    """(values, energies) of a loop."""
    values = [side.double().numpy() for side in (plain.base_values, plain.tuned_values)]
    return _errors(values, _energies(plain.C.double().numpy()), exact)


def _errors(values: list[Array], energies: Array, exact: Reference) -> tuple[float, float]:
    pairs = zip(values, (exact.base_values, exact.tuned_values), strict=True)
    worst = max(float(np.nanmax(np.abs(found - true[: len(found)]))) for found, true in pairs)
    return worst / float(exact.base_values[0]), float(
        np.nanmax(np.abs(energies - exact.energies))
    ) / exact.update_energy


def _energies(C: Array) -> Array:
    """Diagonal, row and column energies, the latter two without the diagonal; (3, k)."""
    diagonal = np.diag(C) ** 2
    return np.stack([diagonal, (C * C).sum(1) - diagonal, (C * C).sum(0) - diagonal])

"""What is measured of two matrices held against each other: subspaces, cosine, signs, each with its null."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

from torch import Tensor

from spectra.linalg.lowrank import LowRank
from spectra.measures.subspaces import (
    Leading,
    angles_null,
    overlap_null,
    overlaps,
    principal_angles,
    products,
)


@dataclass(frozen=True)
class Held:
    """A matrix X (m x n) whose leading directions are known."""

    X: Tensor | LowRank
    leading: Leading


@dataclass(frozen=True)
class Against:
    """The measures of a pair of matrices.

    Attributes:
        row: a value per measure, by column name; those of the sides are missing where the first has no directions.
        cells: (side, i, j, phi, its null) of the leading i and j directions.
    """

    row: dict[str, Any]
    cells: list[tuple[str, int, int, float, float]]


def hold_against(first: Held, second: Held, i: int, j: int) -> Against:
    """Measure two matrices of one shape: i leading directions of the first, j of the second, or as many as there are.

    Cost: O((m + n) i j), and that of `products`.

    >>> import torch
    >>> from spectra.measures.subspaces import leading
    >>> X, Y = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([-1.0, 0.0]))
    >>> found = hold_against(*(Held(D, leading(D, 1)) for D in (X, Y)), 1, 1).row
    >>> found["left_overlap"], found["sign_agreement"], found["shared_entries"]
    (1.0, 0.0, 1)
    """
    m, n = first.X.shape
    i, j = min(i, first.leading.rank), min(j, second.leading.rank)
    row: dict[str, Any] = {"first_rank": i, "second_rank": j}
    cells = []
    for side, d in (("left", m), ("right", n)) if i else ():
        A, B = (h.leading.Y if side == "left" else h.leading.Z for h in (first, second))
        A, B = A[:, :i], B[:, :j]
        phi, angles, nulls = overlaps(A, B), principal_angles(A, B), angles_null(d, i, j)
        row |= {
            f"{side}_overlap": float(phi[-1, -1]),
            f"{side}_overlap_null": overlap_null(d, i, j),
            f"{side}_smallest_angle": float(angles[0]),
            f"{side}_smallest_angle_null": nulls[0],
            f"{side}_largest_angle": float(angles[-1]),
            f"{side}_largest_angle_null": nulls[1],
        }
        cells += [
            (side, a + 1, b + 1, float(phi[a, b]), overlap_null(d, a + 1, b + 1)) for a in range(i) for b in range(j)
        ]
    both = products(first.X, second.X)
    scale = both.norms[0] * both.norms[1]
    row |= {
        "update_cosine": both.inner / scale if scale else nan,
        "update_cosine_null": 1 / sqrt(m * n),
        "sign_agreement": both.agreeing / both.moved if both.moved else nan,
        "sign_agreement_null": 0.5,
        "shared_entries": both.moved,
        "first_norm": both.norms[0],
        "second_norm": both.norms[1],
        "entries": m * n,
    }
    return Against(row, cells)

"""Edits of one update D = W' - W as formulas: pure functions of D, and of W's spectrum where they need it.

Each takes D dense (m x n, float64) or as factors, and returns the new D in the same form: W + D is the edited weight.
Where an edit changes nothing, D itself comes back, the same object, so that the caller can leave every bit as it is.
Factors keep their scaling c, and what is added to them is appended: the first r rows of A stay.

Sources: the scaling of intruders, Shuttleworth et al. (arXiv 2410.21228), section on causal interventions; the
truncation, Eckart and Young (1936).
"""

from __future__ import annotations

from math import copysign
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.lowrank import LowRank
from spectra.linalg.products import matmul
from spectra.linalg.svd import Spectrum, svd

if TYPE_CHECKING:
    from numpy.typing import NDArray

Update = Tensor | LowRank
Keep = Literal["top", "bottom", "random"]


def scaled_triplets(D: Update, Y: Tensor, s: Tensor, Z: Tensor, factor: float) -> Update:
    """D + (factor - 1) sum_j s_j y_j z_j^T: the triplets of W' scaled by `factor`, everything else as it was.

    Args: Y (m, q), s (q,), Z (n, q): triplets of W' (intruders), or of W (their control).
    Returns: of factors c B A, [B, B_q] and [A; A_q] of rank r + q, exact; D itself for factor 1 or q = 0.
    Cost: 2 m n q flops dense, O((m + n) q) otherwise.

    >>> D = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    >>> e = torch.eye(2, dtype=torch.float64)
    >>> scaled_triplets(D, e[:, :1], torch.tensor([3.0]), e[:, :1], 0.5).tolist()
    [[1.5, 0.0], [0.0, 1.0]]
    """
    if factor == 1 or len(s) == 0:
        return D
    s = s.double()
    if isinstance(D, LowRank):
        weight = (factor - 1) / D.c
        root = (abs(weight) * s).sqrt()  # the two sides share the strength, so that neither is rounded more coarsely
        B_q = copysign(1.0, weight) * Y.double() * root  # (m, q)
        A_q = (Z.double() * root).T  # (q, n)
        return LowRank(torch.cat([D.B.double(), B_q], 1), torch.cat([D.A.double(), A_q]), D.c)
    return D + (factor - 1) * matmul((Y.double() * s).contiguous(), Z.double().T.contiguous())


def scaled(D: Update, factor: float) -> Update:
    """factor D: 0 gives the base back (factors of rank 0), 1 the tuned weight, 2 twice the change."""
    if factor == 1:
        return D
    if factor == 0 and isinstance(D, LowRank):
        return LowRank(D.B[:, :0], D.A[:0], D.c)
    return LowRank(D.B, D.A, factor * D.c) if isinstance(D, LowRank) else factor * D


def truncated(
    D: Update,
    rank: int | None = None,
    energy: float | None = None,
    keep: Keep = "top",
    seed: int = 0,
    digits: torch.dtype = torch.float64,
) -> Update:
    """D cut to some of its own singular components: the best approximation of its rank, or a control of equal rank.

    Args:
        rank: how many components stay; or `energy`: as many as the leading ones need for this share of ||D||_F^2.
        keep: the leading components (top), the last ones that are not zero to rounding (bottom), or a choice of them
            that `seed` decides (random).
        digits: how exact a dense D is: float32 saves most of the time, and is wrong by 1e-7 ||D||_F.
    Returns: D itself where all components stay.   Cost: an SVD of D, or of its r x r core.

    >>> D = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    >>> truncated(D, rank=1).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    Y, S, Z = components(D, digits)
    count = len(S)
    if rank is None:
        assert energy is not None
        rank = components_for(S, energy)
    if rank >= count:
        return D
    order = {"top": np.arange(count), "bottom": np.arange(count)[::-1], "random": _shuffled(count, seed)}[keep]
    kept = torch.from_numpy(np.sort(order[:rank])).to(S.device)
    if not isinstance(D, LowRank):
        return matmul((Y[:, kept] * S[kept]).contiguous(), Z[:, kept].T.contiguous())
    root = (S[kept] / abs(D.c)).sqrt()
    return LowRank(copysign(1.0, D.c) * Y[:, kept] * root, (Z[:, kept] * root).T, D.c)


def components(D: Update, digits: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of D, float64, without the components that are zero to rounding: Y (m, q), S (q,), Z (n, q)."""
    if isinstance(D, LowRank):
        Q_B, R_B = torch.linalg.qr(D.B.double())  # (m, r), (r, r)
        Q_A, R_A = torch.linalg.qr(D.A.double().T)  # (n, r), (r, r)
        core = svd(D.c * matmul(R_B, R_A.T))
        Y, S, Z, digits = matmul(Q_B, core.U), core.S, matmul(Q_A, core.V), torch.float64
    else:
        whole = svd(D.to(digits), torch.float64)
        Y, S, Z = whole.U, whole.S, whole.V
    zero = max(D.shape) * torch.finfo(digits).eps * S[0]
    count = int((zero < S).sum())
    return Y[:, :count], S[:count], Z[:, :count]


def components_for(S: Tensor, energy: float) -> int:
    """The least number of leading components with a share `energy` of sum s_i^2."""
    if len(S) == 0:
        return 0
    share = torch.cumsum(S.square(), 0) / S.square().sum()
    return min(int((share < energy * (1 - 1e-12)).sum()) + 1, len(S))


def rewound_components(D: Update, base: Spectrum, start: int, stop: int) -> Update:
    """D without what it does to base components [start, stop): (1 - U_s U_s^T) D (1 - V_s V_s^T).

    The edited weight has the base's triplets (u_i, s_i, v_i) of the slice as its own again: W v_i = s_i u_i, and
    W^T u_i = s_i v_i. An empty slice gives D itself.

    Raises: ValueError where the slice does not lie in [0, min(m, n)].   Cost: 4 m n (stop - start) flops dense.
    """
    if not 0 <= start <= stop <= len(base.S):
        raise ValueError(f"components [{start}, {stop}) do not lie among {len(base.S)}")
    if start == stop:
        return D
    U, V = (X[:, start:stop].double().contiguous() for X in (base.U, base.V))
    if isinstance(D, LowRank):
        B, A = D.B.double(), D.A.double()
        return LowRank(_outside(U, B), _outside(V, A.T).T, D.c)
    return _outside(V, _outside(U, D).T).T


def rewound_entries(D: Update, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> Update:
    """D without its change of some rows (outputs) and columns (inputs): an attention head, say. D itself for none.

    Args: rows (m,), columns (n,): True where the base is to come back.
    """
    if not rows.any() and not columns.any():
        return D
    left, right = (torch.from_numpy(~gone) for gone in (rows, columns))
    if isinstance(D, LowRank):
        B, A = D.B, D.A
        return LowRank(B * left.to(B)[:, None], A * right.to(A), D.c)
    return D * left.to(D)[:, None] * right.to(D)


def _outside(basis: Tensor, X: Tensor) -> Tensor:
    """X - Q Q^T X, for orthonormal columns Q (d, q) and X (d, r)."""
    X = X.contiguous()
    return X - matmul(basis, matmul(basis.T.contiguous(), X))


def _shuffled(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)


def nearest_components(base: Spectrum, strengths: Tensor) -> list[int]:
    """For each strength s'_j the base component of the nearest singular value, none of them twice, in that order."""
    S = base.S.cpu().numpy()
    taken: list[int] = []
    for strength in strengths.tolist():
        distance = np.abs(S - strength)
        distance[taken] = np.inf
        if len(taken) < len(S):
            taken.append(int(distance.argmin()))
    return taken


def change_norm(before: Update, after: Update) -> float:
    """||D_after - D_before||_F, in float64; 0 for the same object."""
    if before is after:
        return 0.0
    if isinstance(before, LowRank) and isinstance(after, LowRank):
        both = LowRank(
            torch.cat([after.c * after.B.double(), -before.c * before.B.double()], 1),
            torch.cat([after.A.double(), before.A.double()]),
        )
        return float(torch.linalg.vector_norm(both.core()))
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    return float(torch.linalg.vector_norm(after.double() - before.double()))


def norm(D: Update) -> float:
    """||D||_F in float64."""
    if isinstance(D, LowRank):
        return float(torch.linalg.vector_norm(D.core()))
    return float(torch.linalg.vector_norm(D.double()))

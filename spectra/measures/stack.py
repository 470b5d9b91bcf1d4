"""Everything that is measured of many small matrices of one shape, each step for all of them together."""

from __future__ import annotations

import torch
from torch import Tensor

from spectra.linalg.batched import Spectra, matmul, triplets, values
from spectra.measures.decomposition import decompose
from spectra.measures.rounding import rounding
from spectra.measures.rows import Measured, rows

STACKS = 10  # how many float64 stacks the size of the weights are alive at once, with their workspace


def measure_stack(
    W: Tensor,
    base: Spectra,
    tuned: Tensor,
    *,
    base_dtype: torch.dtype,
    tuned_dtype: torch.dtype,
    slices: int = 8,
    top: int = 10,
    epsilon: float = 0.5,
) -> list[Measured]:
    """What `measure` says of each pair of a stack, in float64 throughout; on the CPU no row depends on the others.

    Args: W and tuned W', both (b, m, n) float64, finite, on the device of `base`, the spectra of W; the dtypes as
        stored; the rest as of `measure`.
    Raises: LapackError where a solver fails for one of them: measure them in smaller stacks then.
    Cost: b (8 p^2 q + 25 p^3) flops, p = min(m, n), q = max(m, n); memory about STACKS times that of W.
    """
    D = tuned - W
    short = D if W.shape[1] <= W.shape[2] else D.mT
    G = matmul(short, short.mT)  # (b, p, p)
    of_tuned = triplets(tuned, top, squarable=tuned_dtype != torch.float64)
    split = decompose(base, D, slices, gram=torch.tril(G))
    of_update = values(D, G, squarable=torch.float64 not in (base_dtype, tuned_dtype))
    stored = rounding(W, D, base_dtype, tuned_dtype)
    exact = base_dtype == tuned_dtype == torch.float64
    return rows(
        base,
        of_tuned,
        split,
        of_update.cpu().numpy(),
        stored,
        update_form="dense",
        digits=torch.float64 if exact else torch.float32,
        tuned_digits=tuned_dtype,
        top=top,
        epsilon=epsilon,
    )

"""The few leading triplets of a matrix by Lanczos iteration, with the residual that tells how good they are.

For who needs neither all singular values nor ranks. Randomised sketches are not used: with the usual settings they
invent and lose intruder directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spectra.linalg.lapack import LapackError
from spectra.linalg.products import matmul
from spectra.linalg.triplets import Triplets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LANCZOS = "lanczos"
TOLERANCE = 1e-7  # relative accuracy of s^2 that the iteration is asked for
RESIDUAL = 1e-4  # residual over s_0 at which a result is not believed
ITERATIONS = 1000


def lanczos_triplets(W: Tensor, count: int, gram: Tensor | None = None) -> Triplets:
    """The `count` leading triplets of W and their residual, in float32.

    Args:
        W: (m, n), float32 on the CPU.   gram: the Gram matrix of W on its short side, float32, where the caller has it.
    Returns: `Triplets` whose S holds the leading values only; cosines with other vectors are good to about 1e-5.
    Raises: LapackError where the iteration does not converge or the residual is above RESIDUAL: take the direct way
        then.
    Cost: p^2 q + O(p^2) per iteration float32 flops.
    """
    m, n = W.shape
    A = W if m <= n else W.T
    G = (float32_gram(A) if gram is None else gram).numpy()
    short = torch.from_numpy(leading_eigenvectors(lambda x: G @ x.astype(np.float32), len(G), count)[1]).float()
    image = matmul(A.T, short)  # (q, count)
    S = torch.linalg.vector_norm(image, dim=0, dtype=torch.float64)
    order = torch.argsort(S, descending=True)
    S, short, long = S[order], short[:, order], image[:, order] / S[order].float()
    residual = float(torch.linalg.vector_norm(matmul(A, long) - short * S.float(), dim=0).max() / S[0])
    if not residual <= RESIDUAL:
        raise LapackError(f"the residual of the leading triplets is {residual:.1e}")
    Y, Z = (short, long) if m <= n else (long, short)
    return Triplets(Y, S, Z, LANCZOS, residual)


def float32_gram(A: Tensor) -> Tensor:
    """A A^T in float32. Raises LapackError where squares would leave its range, or an entry is not finite."""
    norm = float(torch.linalg.vector_norm(A, dtype=torch.float64))
    if not 1e-12 < norm < 1e12:
        raise LapackError(f"squares of a matrix of norm {norm:.1e} leave the range of float32")
    return matmul(A, A.T)


def leading_eigenvectors(
    apply: Callable[[Array], Array], size: int, count: int, tolerance: float = TOLERANCE
) -> tuple[Array, Array]:
    """The `count` largest eigenvalues (descending) and their vectors (size x count) of a symmetric operator, by ARPACK.

    The starting vector is fixed: the same operator gives the same answer. Raises LapackError without convergence, and
    for operators so small that iteration makes no sense.
    """
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

    if size <= 3 * count:
        raise LapackError(f"{count} of {size} eigenvectors are no few")
    operator = LinearOperator((size, size), matvec=apply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    try:
        values, vectors = eigsh(
            operator, count, which="LA", v0=start, tol=tolerance, maxiter=ITERATIONS, ncv=min(size, 3 * count)
        )
    except (ArpackError, ArpackNoConvergence) as error:
        raise LapackError(f"the iteration did not converge: {error}") from error
    order = np.argsort(values)[::-1]
    return values[order], np.ascontiguousarray(vectors[:, order])

"""The leading triplets of a tuned weight: by the way that suits how it is given, and a full SVD where that fails."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spectra.linalg.iterative import lanczos_triplets
from spectra.linalg.lapack import LapackError
from spectra.linalg.lowrank import LowRank
from spectra.linalg.perturbed import perturbed_triplets
from spectra.linalg.products import matmul
from spectra.linalg.svd import GRAM, TAIL, Spectrum, svd
from spectra.linalg.triplets import Triplets, leading_triplets

# What `Triplets.algorithm` ends in where leading triplets are from a full SVD of W'.
NOT_CONVERGED = "for its leading triplets did not converge"
UNSQUARED = "without squaring"  # of a tail that the leading triplets reach into, those under TAIL s'_0
FALLBACKS = {NOT_CONVERGED: "their own solver did not converge", UNSQUARED: "squaring would spoil them"}


def tuned_triplets(weight: Tensor, base: Spectrum, tuned: Tensor | LowRank, count: int, fast: bool = False) -> Triplets:
    """The `count` leading triplets of W', without a full SVD of it where they converge.

    They come from the base's spectrum and the update where the update comes as factors; of a dense W', whose update has
    no small rank, from one reduction of its float64 Gram matrix. A float64 W' is decomposed in full: squaring it would
    cost half of its digits.

    Args:
        weight: W (m x n) and `base`, its spectrum, with float64 vectors where `tuned` is an update.
        tuned: W', or the update D = W' - W as factors: then W' is not formed (see `perturbed_triplets`).
        fast: iterate those triplets alone by Lanczos: cosines are good to 1e-5 for a dense W', and a direction may be
            missed where several singular values are equal.
    Returns: `Triplets`; where no other way converged, or squaring would spoil the last of them, of a full float64 SVD
        of W', and `algorithm` says so: of the latter, that its tail was solved again without squaring.
    Raises: NotFiniteError where W' is not finite; LapackError where no solver converges.
    """
    if isinstance(tuned, LowRank):
        return factored_triplets(weight, base, tuned, count, fast)
    if fast and tuned.dtype == torch.float32 and tuned.device.type == "cpu":
        try:
            return lanczos_triplets(tuned, count)
        except LapackError:
            pass  # small, clustered or out of float32's range: the direct way copes
    found = leading_triplets(tuned, count)
    if tuned.dtype == torch.float64:
        return found
    if found.S[found.Y.shape[1] - 1] <= TAIL * found.S[0]:
        return _in_full(found, f"its tail solved again {UNSQUARED}" if found.algorithm == GRAM else UNSQUARED)
    return _in_full(found, NOT_CONVERGED) if found.algorithm.startswith("ges") else found


def why_in_full(tuned: Triplets) -> str:
    """Why the triplets are from a full SVD of W', where a quicker way did not do; "" otherwise."""
    return next((why for ending, why in FALLBACKS.items() if tuned.algorithm.endswith(ending)), "")


def without_directions(base: Spectrum, tuned: Triplets) -> str:
    """Why nothing can be said of the directions of W', which is so where W or W' is all zero; "" otherwise."""
    zero = " and the ".join(name for name, S in (("base", base.S), ("tuned", tuned.S)) if S[0] == 0)
    return f"the {zero} weight is all zero and has no directions" if zero else ""


def factored_triplets(weight: Tensor, base: Spectrum, update: LowRank, count: int, fast: bool = False) -> Triplets:
    """The `count` leading triplets of W' = W + D from the base's spectrum and the factors of D.

    Arguments as of `tuned_triplets`; `update` may be a `Projected` one. W' is formed only where they do not converge:
    then its full float64 SVD takes over, and `algorithm` says so.
    Raises: LapackError where that does not converge either.
    """
    for iterate in (True, False) if fast else (False,):
        try:
            return perturbed_triplets(base, update, count, iterate=iterate)
        except LapackError:
            continue
    full = svd(weight.double() + update.c * matmul(update.B.double(), update.A.double()))
    return _in_full(Triplets(full.U[:, :count], full.S, full.V[:, :count], full.algorithm), NOT_CONVERGED)


def _in_full(found: Triplets, why: str) -> Triplets:
    return replace(found, algorithm=f"{found.algorithm} of all of W', {why}")

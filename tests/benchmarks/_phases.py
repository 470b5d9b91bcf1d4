"""Where the CPU seconds of spectra go, phase by phase, and how few the flops of each phase could take.

The pieces are timed where they run, inside the whole job: each function below is wrapped while a `Ledger` is open, and
its seconds are its own, without those of the pieces that it calls. So the phases add up to the job. A name that
spectra no longer has is counted with its caller.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from _sides import ADAPTER, ADAPTER_TOP, CACHED, COLD, TOP
from _synthetic import RANK

OTHER = "everything else"
# (module, class or nothing, function, phase); the phases are printed in this order
PIECES = (
    ("linalg.products", "", "gram", "Gram matrices"),
    ("linalg.lapack", "", "reduce_to_tridiagonal", "tridiagonal reduction"),
    ("linalg.banded", "", "reduce_to_band", "tridiagonal reduction"),
    ("linalg.lapack", "Tridiagonal", "eigenvalues", "eigenvalues"),
    ("linalg.lapack", "Tridiagonal", "eigenvectors", "eigenvectors"),
    ("linalg.lapack", "Tridiagonal", "eigenvectors_between", "eigenvectors"),
    ("linalg.lapack", "Tridiagonal", "_back_transformed", "back-transformation"),
    ("linalg.banded", "Banded", "eigenvectors_between", "eigenvectors"),
    ("linalg.banded", "Banded", "_back_transformed", "back-transformation"),
    ("linalg.svd", "", "svd", "long-side vectors"),
    ("linalg.products", "", "product64", "long-side vectors"),
    ("linalg.perturbed", "", "perturbed_triplets", "base coordinates"),
    ("linalg.iterative", "", "leading_eigenvectors", "Lanczos iteration"),
    ("measures.decomposition", "", "_dense_core", "C"),
    ("linalg.projected", "", "project", "C"),
    ("measures.decomposition", "", "_dense_outside", "E"),
    ("measures.decomposition", "", "_factored_outside", "E"),
    ("measures.decomposition", "", "decompose", "sums over C"),
    ("measures.rounding", "", "rounding", "rounding"),
    ("measures.intruders", "", "intruders", "leading directions"),
    ("measures.whole", "", "subspace_overlap", "leading directions"),
)
PHASES = (*dict.fromkeys(phase for *_, phase in PIECES), OTHER)


class Ledger:
    """CPU seconds by phase; a phase that starts inside another stops the other's clock."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside to `name`."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._mark
        self._mark = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted to `name`."""

        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **options)

        return counted


def by_phase(job: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds of each phase of one run of `job`; their sum is the run."""
    ledger = Ledger()
    replaced: list[tuple[Any, str, Any]] = []
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("spectra", "_sides")]
    try:
        for module, owner, name, phase in PIECES:
            home: Any = sys.modules.get(f"spectra.{module}")
            original = vars(getattr(home, owner, None) if owner else home).get(name) if home else None
            if original is None:
                continue
            # Functions were imported by name into the modules that use them.
            places = [getattr(home, owner)] if owner else [m for m in modules if vars(m).get(name) is original]
            for place in places:
                replaced.append((place, name, original))
                setattr(place, name, ledger.timed(phase, original))
        with ledger.phase(OTHER):
            job()
    finally:
        for place, name, original in reversed(replaced):
            setattr(place, name, original)
    return dict(ledger.seconds)


def gemm_speeds(size: int = 1536, laps: int = 5) -> dict[int, dict[str, float]]:
    """Flops a second of each library's matrix product, by bits (32, 64); the best of some laps."""
    found = {}
    for bits, dtype in ((32, torch.float32), (64, torch.float64)):
        a = torch.ones(size, size, dtype=dtype)
        b = a.numpy()
        fastest = {"numpy": float("inf"), "torch": float("inf")}
        for _ in range(laps):
            fastest["numpy"] = min(fastest["numpy"], _seconds(np.matmul, b, b))
            fastest["torch"] = min(fastest["torch"], _seconds(torch.matmul, a, a))
        found[bits] = {library: 2 * size**3 / seconds for library, seconds in fastest.items()}
    return found


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def flops(m: int, n: int) -> dict[str, dict[str, tuple[float, int]]]:
    """The least flops of each phase of each job, and the bits that they are done in.

    What is not here (sums, rounding, eigenvalues) grows with the entries only. No processor reaches the floor of the
    reduction: half of its flops are matrix-vector products, which wait for memory.
    """
    p, q = sorted((m, n))
    square, cube, gram = float(p) ** 2, float(p) ** 3, float(p) ** 2 * q
    base = {
        "Gram matrices": (gram, 64),
        "tridiagonal reduction": (4 / 3 * cube, 64),
        "eigenvectors": (4 / 3 * cube, 64),
        "back-transformation": (2 * cube, 64),
        "long-side vectors": (2 * gram, 32),
    }
    cached = {
        "Gram matrices": (2 * gram, 64),
        "tridiagonal reduction": (8 / 3 * cube, 64),
        "back-transformation": (2 * square * TOP, 64),
        "long-side vectors": (2.0 * p * q * TOP, 64),
        "C": (2 * gram + 2 * cube, 32),
        "E": (2 * cube if p < q else 0.0, 32),
    }
    adapter = {
        "tridiagonal reduction": (4 / 3 * cube, 64),
        "back-transformation": (2 * square * TOP, 64),
        "base coordinates": (2.0 * (p + q) * p * TOP + 4 * square * RANK, 64),
        "C": (2.0 * (p + q) * p * RANK, 64),
        "E": (2.0 * p * q * RANK if p < q else 0.0, 64),
        "sums over C": (2 * square * RANK, 64),
    }
    top = {
        "base coordinates": (2.0 * (p + q) * p * TOP, 32),
        "C": (2.0 * (p + q) * p * RANK, 32),
        "E": (2.0 * p * q * RANK if p < q else 0.0, 32),
    }
    cold = dict(cached)
    for phase, (count, bits) in base.items():
        cold[phase] = (count + cached.get(phase, (0.0, bits))[0], bits)
    return {COLD: cold, CACHED: cached, ADAPTER: adapter, ADAPTER_TOP: top}

"""Mean and covariance of a stream of vectors, in one pass and in memory that does not grow with it.

Batches are centred by their own mean before they are squared, and joined by the update of Chan, Golub and LeVeque
(*Algorithms for computing the sample variance*, 1983):

    M = M_a + M_b + (mean_b - mean_a) (mean_b - mean_a)^T N_a N_b / N
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from spectra.atomic import replacing
from spectra.engines.devices import ieee_products
from spectra.errors import SpectraError
from spectra.linalg.lapack import add_gram
from spectra.linalg.products import gemm_library, matmul
from spectra.linalg.svd import describe_not_finite
from spectra.tensor_files import write_tensors

ROWS = 4096  # vectors that are squared at once: bounds the copies, and the rounding of float32 sums
SMALLEST = 2.0**-60  # of the largest float32 product: what is 2^-60 of it is still a normal float32


class CovarianceAccumulator:
    """Running mean and co-moment of n-dimensional vectors; what is kept is float64 and takes 8 n^2 bytes.

    Two accumulators `merge` into what one would have found in one pass. Means and covariances are of the population
    (divided by N, not by N - 1).

    Args:
        size: n.
        device: where to accumulate; by default that of the first batch. On "mps", which has no float64, the CPU.
        name: whose vectors these are, for messages.
        dtype: of the products within a batch. float64: exact to rounding, any partition of the stream agrees to 1e-10.
            float32: half the time, and the covariance is good to 1e-6 of its norm (1e-7 as a rule); what is too large
            or too small to be squared in it is squared in float64.

    >>> moments = CovarianceAccumulator(2)
    >>> moments.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> moments.mean.tolist(), moments.covariance().tolist()
    ([2.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(
        self,
        size: int,
        *,
        device: torch.device | str | None = None,
        name: str = "",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not hasattr(size, "__index__") or size < 1:
            raise SpectraError(f"an accumulator takes vectors of at least one entry, and the size given is {size!r}")
        if dtype not in (torch.float32, torch.float64):
            raise SpectraError(f"dtype is {dtype!r}, which the products cannot have; give torch.float32 or float64")
        self.size, self.name, self.dtype = size, name, dtype
        self.count = 0
        self._device = None if device is None else _with_float64(torch.device(device))
        self._mean: Tensor | None = None  # (n,) float64
        self._moment: Tensor | None = None  # (n, n) float64, sum of (x - mean)(x - mean)^T

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take the vectors x (..., n) in, of any floating dtype and device.

        Args:
            mask: of x's leading shape; vectors where it is zero or False are passed over (padding).
        Raises: SpectraError for another size, for a mask of another shape, and for NaN, infinite entries, and squares
            beyond float64; nothing of the batch is then taken in.
        Cost: N n^2 flops (a symmetric product); copies of at most 4096 vectors.
        """
        for what, given in (("batch", x), ("mask", mask)):
            if not isinstance(given, Tensor) and (what, given) != ("mask", None):
                raise SpectraError(f"{self._owner()}the {what} is a {type(given).__name__}; give a torch.Tensor")
        if x.ndim == 0 or x.shape[-1] != self.size:
            raise SpectraError(f"{self._owner()}vectors of {self.size} entries are expected, and the batch is "
                               f"{tuple(x.shape)}")  # fmt: skip
        if mask is not None and mask.shape != x.shape[:-1]:
            raise SpectraError(
                f"{self._owner()}the mask is {tuple(mask.shape)}, and the batch {tuple(x.shape)}; "
                "give one number per vector"
            )
        rows = x.detach().reshape(-1, self.size)
        if mask is not None:
            rows = rows[mask.reshape(-1).to(rows.device, torch.bool)]
        blocks = torch.split(rows, ROWS)
        if len(blocks) > 1:  # or the first would stay in where a later one is refused
            for block in blocks:
                self._refuse_not_finite(block)
        for block in blocks:
            self._add(block)

    def merge(self, other: CovarianceAccumulator) -> Self:
        """Take in what `other` has seen; `other` stays as it is. Returns self. Cost: O(n^2).

        Raises: SpectraError for moments of another size, and for what is no accumulator.
        """
        if not isinstance(other, CovarianceAccumulator):
            raise SpectraError(f"{self._owner()}a {type(other).__name__} cannot be merged; give an accumulator")
        if other.size != self.size:
            raise SpectraError(f"{self._owner()}moments of {self.size} and of {other.size} entries cannot be merged")
        if other._mean is not None and other._moment is not None:
            self._join(other.count, other._mean, other._moment)
        return self

    @property
    def mean(self) -> Tensor:
        """(n,) float64; NaN where nothing was seen."""
        return torch.full((self.size,), torch.nan, dtype=torch.float64) if self._mean is None else self._mean

    def covariance(self, centred: bool = True) -> Tensor:
        """E[(x - mean)(x - mean)^T], or the second moment E[x x^T]; (n, n) float64, divided by N. NaN for N = 0."""
        if self._mean is None or self._moment is None:
            return torch.full((self.size, self.size), torch.nan, dtype=torch.float64)
        covariance = self._moment / self.count
        return covariance if centred else covariance + torch.outer(self._mean, self._mean)

    def copy(self) -> CovarianceAccumulator:
        """An accumulator of its own that has seen the same."""
        return CovarianceAccumulator(self.size, device=self._device, name=self.name, dtype=self.dtype).merge(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file, atomically, from which `load` goes on. Returns its path.

        Raises: SpectraError where it cannot be written.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     CovarianceAccumulator.load(CovarianceAccumulator(3, name="fc").save(f"{folder}/fc.safetensors")).count
        0
        """
        target = Path(path)
        described = {"count": self.count, "size": self.size, "name": self.name, "dtype": str(self.dtype)}
        state = {} if self._mean is None or self._moment is None else {"mean": self._mean, "moment": self._moment}
        try:
            with replacing(target) as temporary:
                stored = {key: value.cpu() for key, value in state.items()}
                write_tensors(stored, temporary, metadata={"accumulator": json.dumps(described)})
        except OSError as error:
            raise SpectraError(
                f"cannot write the moments to {target}: {error.strerror or error}; "
                "free some space or choose another place"
            ) from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> CovarianceAccumulator:
        """Read what `save` wrote. Raises: SpectraError where the file is missing or holds something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                described = json.loads((file.metadata() or {})["accumulator"])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            size, count = described["size"], described["count"]
            dtype = torch.float32 if described["dtype"] == "torch.float32" else torch.float64
            found = cls(size, device=device, name=described["name"], dtype=dtype)
            shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
            if shapes != ({"mean": (size,), "moment": (size, size)} if count else {}):
                raise ValueError(f"its tensors are {shapes}, and {count} vectors of {size} entries were counted")
            if state:
                found._join(int(count), state["mean"].double(), state["moment"].double())
        except (OSError, ValueError, TypeError, KeyError, SpectraError, SafetensorError) as error:
            raise SpectraError(
                f"{Path(path)} holds no saved moments ({error}); give a file that an accumulator's `save` wrote"
            ) from error
        return found

    def _add(self, rows: Tensor) -> None:
        """Join one block (N, n): its sum in float64, its centred square in `dtype`."""
        count = len(rows)
        if not count:
            return
        rows = rows.to(self._device or _with_float64(rows.device))
        X, mean, rest = _centred(rows, self.dtype)
        if not bool(torch.isfinite(mean).all()):
            self._refuse_not_finite(rows)
        moment = _square64(X) if X.dtype == torch.float64 else _square32(X)
        if X.dtype == torch.float32 and not _is_in_range(moment.diagonal()):  # which bounds all others
            X, mean, rest = _centred(rows.double(), torch.float64)
            moment = _square64(X)
        if not bool(torch.isfinite(moment.diagonal()).all()):
            raise SpectraError(
                f"{self._owner()}the input holds entries as large as {float(rows.abs().max()):.1e}, whose squares are "
                "beyond float64; look at the batch that it came with"
            )
        self._join(count, mean, moment.addr_(rest, rest, alpha=-count))

    def _refuse_not_finite(self, rows: Tensor) -> None:
        if not bool(torch.isfinite(rows).all()):
            raise SpectraError(
                f"{self._owner()}the input holds {describe_not_finite(rows)}; "
                "look at the batch that it came with, or run the model in float32"
            )

    def _join(self, count: int, mean: Tensor, moment: Tensor) -> None:
        if self._mean is None or self._moment is None:
            self._device = self._device or mean.device
            self.count, self._mean, self._moment = count, mean.to(self._device, copy=True), moment.to(
                self._device, copy=True
            )  # fmt: skip
            return
        total = self.count + count
        step = mean.to(self._mean.device) - self._mean
        self._moment += moment.to(self._moment.device)
        self._moment.addr_(step, step, alpha=self.count * count / total)
        self._mean += step * (count / total)
        self.count = total

    def _owner(self) -> str:
        return f"{self.name}: " if self.name else ""


class CrossAccumulator:
    """Running cross-moment of two streams of vectors that come in pairs: x (n) and y (m). float64, 8 n m bytes.

    Args: dtype: of the products within a batch, as in `CovarianceAccumulator`.

    >>> moments = CrossAccumulator()
    >>> moments.update(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0, 2.0], [0.0, 6.0]]))
    >>> moments.covariance().tolist()
    [[0.0, 2.0]]
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.count = 0
        self._means: tuple[Tensor, Tensor] | None = None
        self._moment: Tensor | None = None  # (n, m) sum of (x - mean)(y - mean)^T

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take pairs in: x (N, n), y (N, m), row for row. Raises: ValueError where they are not as many."""
        if len(x) != len(y):
            raise ValueError(f"{len(x)} vectors cannot be paired with {len(y)}")
        for one, other in zip(torch.split(x, ROWS), torch.split(y, ROWS), strict=True):
            self._add(one, other)

    def _add(self, x: Tensor, y: Tensor) -> None:
        if not len(x):
            return
        device = _with_float64(x.device)
        dtype = torch.promote_types(x.dtype, y.dtype) if torch.float64 in (x.dtype, y.dtype) else self.dtype
        (X, mean_x, rest_x), (Y, mean_y, rest_y) = (_centred(rows.to(device), dtype) for rows in (x, y))
        with ieee_products(), np.errstate(over="ignore", invalid="ignore"):
            moment = matmul(X.T, Y).double()
        if X.dtype == torch.float32 and not _is_in_range(moment):
            (X, mean_x, rest_x), (Y, mean_y, rest_y) = (
                _centred(rows.to(device).double(), torch.float64) for rows in (x, y)
            )
            moment = matmul(X.T, Y)
        self._join(len(x), (mean_x, mean_y), moment.addr_(rest_x, rest_y, alpha=-len(x)))

    def merge(self, other: CrossAccumulator) -> Self:
        """Take in what `other` has seen. Returns self."""
        if other._means is not None and other._moment is not None:
            self._join(other.count, other._means, other._moment)
        return self

    def copy(self) -> CrossAccumulator:
        """An accumulator of its own that has seen the same."""
        return CrossAccumulator(self.dtype).merge(self)

    def covariance(self) -> Tensor:
        """E[(x - mean)(y - mean)^T], (n, m) float64, divided by N. Raises: ValueError where nothing was seen."""
        if self._moment is None:
            raise ValueError("no pairs were seen")
        return self._moment / self.count

    def _join(self, count: int, means: tuple[Tensor, Tensor], moment: Tensor) -> None:
        if self._means is None or self._moment is None:
            self.count, self._means, self._moment = count, (means[0].clone(), means[1].clone()), moment.clone()
            return
        total = self.count + count
        steps = [new - old for new, old in zip(means, self._means, strict=True)]
        self._moment += moment
        self._moment.addr_(steps[0], steps[1], alpha=self.count * count / total)
        for old, step in zip(self._means, steps, strict=True):
            old += step * (count / total)
        self.count = total


def _with_float64(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _centred(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """X = rows - c with c near their mean, the mean, and mean - c: sum of (x - mean)(x - mean)^T is X^T X less the last
    one's square, N times. X (N, n) is of `dtype`, and float64 where the rows are; the others are float64.

    The mean is not finite where an entry is not.
    """
    if dtype == torch.float64 or rows.dtype == torch.float64:
        wide = rows.double()
        centre = wide.mean(0)
    else:
        wide = rows.float()
        centre = wide.mean(0)
        if not bool(torch.isfinite(centre).all()):  # of a float32 sum that overflowed, perhaps
            centre = wide.mean(0, dtype=torch.float64).float()
    X = wide - centre
    rest = X.mean(0).double()  # what rounding and a float32 sum left of the mean
    return X, centre.double() + rest, rest


def _is_in_range(products: Tensor) -> bool:
    """Whether float32 sums of products neither overflowed nor are so small that terms of them may have vanished."""
    return SMALLEST < float(products.abs().max()) < float("inf")


def _square32(X: Tensor) -> Tensor:
    """X^T X of a float32 X (N, n), as float64. numpy takes it for what it is, symmetric, and halves the work."""
    if X.device.type == "cpu" and gemm_library() == "numpy":
        array = X.numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks
            return torch.from_numpy(array.T @ array).double()
    with ieee_products():
        return (X.T @ X).double()


def _square64(X: Tensor) -> Tensor:
    """X^T X of a float64 X (N, n)."""
    if X.device.type != "cpu":
        return X.T @ X
    G = np.zeros((X.shape[1], X.shape[1]), order="F")
    add_gram(X.contiguous().numpy().T, G)  # the lower triangle
    lower = torch.from_numpy(G)
    return lower + lower.tril(-1).T

"""How a tensor that enters or leaves a module is read as vectors: the x of y = W x + b, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

PATCH_ENTRIES = 1 << 24  # of unfolded patches that exist at once: 64 MiB in float32


class View(Protocol):
    """A way to read a tensor as vectors of `width` entries. Equal views read alike."""

    @property
    def width(self) -> int: ...

    def takes(self, x: Tensor, mask: Tensor) -> bool:
        """Whether a mask has one number for each vector."""
        ...

    def blocks(self, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """The vectors (N, width), in blocks; without those where a mask that is taken is zero."""
        ...


@dataclass(frozen=True)
class Rows:
    """The last dimension holds the vector. A mask of the leading dimensions leaves padding out, also where they were
    flattened into one."""

    width: int

    def takes(self, x: Tensor, mask: Tensor) -> bool:
        return mask.shape == x.shape[:-1] or (x.ndim == 2 and len(x) == mask.numel())

    def blocks(self, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        rows = x.reshape(-1, self.width)
        if mask is not None and self.takes(x, mask):
            rows = rows[mask.reshape(-1).to(rows.device, torch.bool)]
        yield rows


@dataclass(frozen=True)
class Turned:
    """As `Rows`, of a (sequence, batch, width) tensor."""

    width: int

    def takes(self, x: Tensor, mask: Tensor) -> bool:
        return Rows(self.width).takes(self._turned(x), mask)

    def blocks(self, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        yield from Rows(self.width).blocks(self._turned(x), mask)

    def _turned(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if x.ndim == 3 else x


@dataclass(frozen=True)
class Channels:
    """The features of a convolution: (batch, channels, ...), or without the batch; every place is a vector."""

    width: int
    dimensions: int  # of space

    def takes(self, x: Tensor, mask: Tensor) -> bool:
        return False

    def blocks(self, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        yield x.movedim(-self.dimensions - 1, -1).reshape(-1, self.width)


@dataclass(frozen=True)
class Patches:
    """What a kernel sees: every patch as a vector of in x height x width entries, the columns of the flattened kernel.

    A convolution in one dimension has kernels of height 1.
    """

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, ...]  # as torch's `pad` takes it: left, right, top, bottom
    padding_mode: str
    dimensions: int  # of space: 1 or 2

    @property
    def width(self) -> int:
        return self.channels * self.kernel[0] * self.kernel[1]

    def takes(self, x: Tensor, mask: Tensor) -> bool:
        return False

    def blocks(self, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        if x.ndim == self.dimensions + 1:
            x = x[None]
        if self.dimensions == 1:
            x = x[:, :, None]  # (B, channels, 1, length)
        if self.padding_mode == "zeros":
            x = F.pad(x, self.padding)
        elif self.dimensions == 1:  # the other modes pad as many dimensions as they are given numbers for
            x = F.pad(x[:, :, 0], self.padding[:2], mode=self.padding_mode)[:, :, None]
        else:
            x = F.pad(x, self.padding, mode=self.padding_mode)
        samples = max(1, PATCH_ENTRIES // (self.width * x.shape[2] * x.shape[3]))
        for part in torch.split(x, samples):
            patches = F.unfold(part, self.kernel, dilation=self.dilation, stride=self.stride)  # (B, width, places)
            yield patches.transpose(1, 2).reshape(-1, self.width)

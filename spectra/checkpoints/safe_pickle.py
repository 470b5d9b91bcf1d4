"""The pickle inside a torch file, read by torch's weights-only unpickler with storages that hold no memory.

Two fences stand one behind the other: the types a pickle names are compared with a list of our own, narrower than
torch's, before anything is built; then torch's own unpickler, which knows no other types, builds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pickle import UnpicklingError
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor
from torch import _weights_only_unpickler as weights_only

from spectra.checkpoints.checkpoint import CheckpointError
from spectra.checkpoints.wording import listed, quoted

Result = TypeVar("Result")

OLDEST_SAFE_TORCH = (2, 10)
# Some 80 000 tensors, at 110 bytes and 51 reads each. Every read may make an object of two hundred bytes.
MOST_PICKLE_BYTES = 16 << 20
MOST_READS = 4_000_000

# Left out of torch's list: bytearray and `_codecs.encode`, whose arguments in a 1 kB file can fill any memory, and
# the sparse, nested, NumPy and subclass rebuilders, which make no plain weights.
BUILDERS = frozenset(
    {
        "builtins.complex",
        "builtins.set",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch.Tensor",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.storage.UntypedStorage",
    }
)
# Of those left out, the tensors that a user may well have saved among the weights: what they are, and the remedy.
OTHER_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": ("sparse tensors", "tensor.to_dense()"),
    "torch._utils._rebuild_sparse_csr_tensor": ("sparse tensors", "tensor.to_dense()"),
    "torch._utils._rebuild_qtensor": ("tensors packed by torch's quantisation", "tensor.dequantize()"),
    "torch._utils._rebuild_nested_tensor": ("nested tensors", "the list of tensor.unbind(), each by its own name"),
}
# What the pickles of those name besides.
OF_OTHER_TENSORS = re.compile(r"torch\.serialization\._get_layout|torch\.per_(tensor|channel)_\w+")


@dataclass(frozen=True)
class StorageClaim:
    """What a pickle says of a storage: its key, its size in bytes, and where in the storage of that key it begins."""

    key: str
    itemsize: int
    root_bytes: int
    start: int
    bytes: int


@dataclass(frozen=True)
class Unpickled:
    """The object of a pickle, its tensors on the meta device, and the storage that each of them claims."""

    content: object
    claims: dict[int, tuple[StorageClaim, torch.UntypedStorage]]

    def claim(self, tensor: Tensor) -> StorageClaim | None:
        """The storage a tensor lies in; None for a tensor that lies in none of the file."""
        found = self.claims.get(tensor.untyped_storage()._cdata)
        return found[0] if found else None


def require_safe_torch(where: str, version: str = torch.__version__) -> None:
    """Refuse torch files under a torch whose weights-only loading is known to be unsafe.

    Raises `CheckpointError` below torch 2.10 (CVE-2025-32434, CVE-2026-24747).
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_SAFE_TORCH:
        raise CheckpointError(
            f"{where} is a torch file, and safe loading in torch {version} can be made to run code; "
            "install torch 2.10 or later, or convert the file to safetensors"
        )


def unpickle(stream: BinaryIO, where: str, largest_storage: int) -> Unpickled:
    """Read one pickle from `stream`, which is left behind it. Builds no tensor data and runs no code of the file's.

    Raises `CheckpointError`, naming the types, where the pickle holds anything but tensors and plain values, claims
    storages above `largest_storage` bytes, or is damaged.
    """
    start = stream.tell()
    _check_types(_Bounded(stream, where), where)
    stream.seek(start)
    unpickler = _Unpickler(_Bounded(stream, where), where, largest_storage)
    content = _damage_as_error(unpickler.load, where)
    return Unpickled(content, unpickler.claims)


class _Bounded:
    """The bytes of one pickle, as many and in as many reads as pickles of weights can need.

    The unpickler asks for whatever length the file claims, and goes on for as long as there are bytes.
    """

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self._stream = stream
        self._where = where
        self._bytes_left = MOST_PICKLE_BYTES
        self._reads_left = MOST_READS

    def read(self, length: int) -> bytes:
        self._spend(length)
        return self._stream.read(length)

    def readline(self) -> bytes:
        line = self._stream.readline(self._bytes_left)
        self._spend(len(line))
        return line

    def _spend(self, length: int) -> None:
        self._bytes_left -= length
        self._reads_left -= 1
        if self._bytes_left < 0 or self._reads_left < 0:
            raise CheckpointError(
                f"{self._where} holds a pickle larger than weights need; "
                "save only the weights, or convert it to safetensors"
            )


def _check_types(stream: _Bounded, where: str) -> None:
    named = _damage_as_error(lambda: weights_only.get_globals_in_pkl(stream), where)
    foreign = sorted(named - _allowed())
    other = [OTHER_TENSORS[name] for name in foreign if name in OTHER_TENSORS]
    code = [name for name in foreign if name not in OTHER_TENSORS and not OF_OTHER_TENSORS.fullmatch(name)]
    if other and not code:
        kind, remedy = other[0]
        raise CheckpointError(
            f"{where} holds {kind}, and only dense ones are read; where it was made, save {remedy} in their place"
        )
    if foreign:
        raise CheckpointError(
            f"{where} holds {listed(code or foreign)}, which is code or an object and not weights, "
            "and none of it was run; where it was made, save only the weights: torch.save(model.state_dict(), ...), "
            "or as safetensors"
        )


@lru_cache(maxsize=1)
def _allowed() -> frozenset[str]:
    data_types = (torch.dtype, torch.serialization.StorageType)
    every = weights_only._get_allowed_globals()
    return BUILDERS | {name for name, value in every.items() if isinstance(value, data_types)}


class _Unpickler(weights_only.Unpickler):
    """torch's weights-only unpickler, with storages on the meta device whose claims are written down."""

    def __init__(self, stream: _Bounded, where: str, largest_storage: int) -> None:
        super().__init__(stream, encoding="utf-8")
        self.claims: dict[int, tuple[StorageClaim, torch.UntypedStorage]] = {}
        self._where = where
        self._largest = largest_storage

    def persistent_load(self, pid: object) -> torch.storage.TypedStorage:
        # Zip: (kind, type, key, device, elements). Legacy: the same and either None or (key, first element, elements).
        if not isinstance(pid, tuple) or len(pid) not in (5, 6):
            raise UnpicklingError("a reference to a storage is damaged")
        _, storage_type, key, _, elements, *view = pid
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        first, count = (view[0][1], view[0][2]) if view and view[0] is not None else (0, elements)
        if type(key) is not str or any(type(size) is not int or size < 0 for size in (elements, first, count)):
            raise UnpicklingError("a reference to a storage is damaged")
        root_bytes = elements * dtype.itemsize
        if root_bytes > self._largest or first + count > elements:
            raise CheckpointError(
                f"{self._where} claims a storage {quoted(key)} of {root_bytes} bytes, more than the file holds; "
                "download it again"
            )
        claim = StorageClaim(key, dtype.itemsize, root_bytes, first * dtype.itemsize, count * dtype.itemsize)
        untyped = torch.UntypedStorage(claim.bytes, device="meta")  # type: ignore[no-untyped-call]
        # Kept, so that no other storage can come to lie at the same address.
        self.claims[untyped._cdata] = (claim, untyped)
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _damage_as_error(read: Callable[[], Result], where: str) -> Result:
    try:
        return read()
    except CheckpointError:
        raise
    # A damaged stream can make the unpickler fail in any way at all; each of them is the file's fault.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        reason = reason if reason.isprintable() else repr(reason)
        raise CheckpointError(
            f"{where} cannot be loaded safely ({reason}); it is damaged, or no state dict: "
            "download it again, or save only the weights with torch.save(model.state_dict(), ...)"
        ) from error

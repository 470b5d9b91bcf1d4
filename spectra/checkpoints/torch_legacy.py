"""The file that `torch.save` wrote before torch 1.6: five pickles, then the storages one behind the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spectra.checkpoints.checkpoint import CheckpointError
from spectra.checkpoints.safe_pickle import StorageClaim, Unpickled, unpickle
from spectra.checkpoints.stored_file import StoredFile, cannot_read
from spectra.checkpoints.wording import listed, quoted, shown

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
# The pickle of that number, with which every such file begins.
MAGIC = b"\x80\x02\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little") + b"."
PROTOCOL_VERSION = 1001
COUNT_BYTES = 8


@dataclass(frozen=True)
class LegacyFile:
    """A legacy torch file: its object, and the first byte of every storage's data by its key."""

    where: str
    unpickled: Unpickled
    storages: Mapping[str, int]

    def start(self, claim: StorageClaim) -> int:
        """The position in the file of a claimed storage. Raises `CheckpointError` where it is absent."""
        if claim.key not in self.storages:
            raise CheckpointError(f"{self.where} lacks the data of storage {quoted(claim.key)}; download it again")
        return self.storages[claim.key] + claim.start


def read_legacy(file: StoredFile) -> LegacyFile:
    """Read the pickles of a legacy torch file and find its storages, without reading their data.

    Raises `CheckpointError` for code or objects in a pickle, and where the storages do not fit into the file.
    """
    where = shown(file.path)
    try:
        with file.path.open("rb") as handle:
            magic, version, _ = (unpickle(handle, where, file.size).content for _ in range(3))
            if magic != MAGIC_NUMBER or version != PROTOCOL_VERSION:
                raise CheckpointError(f"{where} is no torch file of a known version; save it again with torch.save")
            unpickled = unpickle(handle, where, file.size)
            keys = unpickle(handle, where, file.size).content
            position = handle.tell()
    except OSError as error:
        raise cannot_read(file.path, error) from error
    return LegacyFile(where, unpickled, _storage_starts(file, unpickled, keys, position))


def _storage_starts(file: StoredFile, unpickled: Unpickled, keys: object, position: int) -> dict[str, int]:
    """Walk over the storages, each a count of elements and its data, in the order of `keys`."""
    where = shown(file.path)
    sizes = {claim.key: (claim.itemsize, claim.root_bytes) for claim, _ in unpickled.claims.values()}
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in sizes for key in keys):
        raise CheckpointError(f"{where} is damaged: its list of storages does not fit its tensors; download it again")
    starts: dict[str, int] = {}
    for key in keys:
        itemsize, size = sizes[key]
        count = file.read(position, COUNT_BYTES)
        if len(count) < COUNT_BYTES or position + COUNT_BYTES + size > file.size:
            raise CheckpointError(
                f"{where} is truncated: storage {listed([key])} reaches past the end; download it again"
            )
        if int.from_bytes(count, "little", signed=True) * itemsize != size:
            raise CheckpointError(
                f"{where} is damaged: storage {listed([key])} has another size than claimed; download it again"
            )
        starts[key] = position + COUNT_BYTES
        position = starts[key] + size
    return starts

"""The zip container that `torch.save` writes: where the pickle and each storage lie, checked before any is read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from spectra.checkpoints.checkpoint import CheckpointError
from spectra.checkpoints.foreign import foreign_archive
from spectra.checkpoints.safe_pickle import MOST_PICKLE_BYTES, StorageClaim
from spectra.checkpoints.stored_file import Record, StoredFile
from spectra.checkpoints.wording import quoted, shown

END_RECORD_BYTES = 22
LONGEST_COMMENT = 65_535
# About 110 bytes a record: room for some 300 000 storages. zipfile needs ten times as much memory.
MOST_DIRECTORY_BYTES = 32 << 20
LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class TorchArchive:
    """A torch zip file: the pickle's bytes, and the record of every storage by its key."""

    where: str
    pickle: bytes
    storages: Mapping[str, Record]

    def start(self, claim: StorageClaim) -> int:
        """The position in the file of a claimed storage. Raises `CheckpointError` where its record does not hold it."""
        if claim.key not in self.storages:
            raise CheckpointError(f"{self.where} lacks the data of storage {quoted(claim.key)}; download it again")
        record = self.storages[claim.key]
        if claim.root_bytes > record.size:
            raise CheckpointError(
                f"{self.where} claims {claim.root_bytes} bytes for storage {quoted(claim.key)} "
                f"and holds {record.size}; download it again"
            )
        return record.start + claim.start


def read_archive(file: StoredFile) -> TorchArchive:
    """Read the directory and the pickle of a torch zip file.

    Raises `CheckpointError` for a damaged or foreign archive or pickle, and for a record that is compressed,
    encrypted, named twice or reaches past the file's end.
    """
    where = shown(file.path)
    _check_directory_size(file, where)
    try:
        with zipfile.ZipFile(file.path) as archive:
            records = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{where} is a truncated or damaged zip file ({error}); download it again") from error
    names = [record.filename for record in records]
    foreign = foreign_archive(names)
    if foreign:
        raise CheckpointError(f"{where} is {foreign}")
    if len(set(names)) != len(names):
        raise CheckpointError(f"{where} holds two records of one name; save it again with torch.save")
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{where} is a zip archive without a torch pickle; "
            "unpack it and give the checkpoint inside, or save it with torch.save"
        )
    found = {
        record.filename: Record(_data_start(file, where, record), record.file_size, record.CRC) for record in records
    }
    prefix = pickles[0].removesuffix("data.pkl")
    order = found.get(prefix + "byteorder")
    if order and file.read(order.start, order.size) == b"big":
        raise CheckpointError(f"{where} was written by a big-endian machine; load and save it there as safetensors")
    pickle = found[pickles[0]]
    if pickle.size > MOST_PICKLE_BYTES:
        raise CheckpointError(
            f"{where} has a pickle of {pickle.size} bytes, more than weights need; save only the weights"
        )
    content = file.read(pickle.start, pickle.size)
    if not pickle.agrees(content):
        raise CheckpointError(
            f"{where} is damaged: its pickle does not fit the checksum that was written with it; "
            "download or save it again"
        )
    data = prefix + "data/"
    storages = {name.removeprefix(data): record for name, record in found.items() if name.startswith(data)}
    return TorchArchive(where, content, storages)


def _check_directory_size(file: StoredFile, where: str) -> None:
    """Refuse a directory too large to be parsed; zipfile itself would take any."""
    tail = file.read(max(0, file.size - END_RECORD_BYTES - LONGEST_COMMENT), END_RECORD_BYTES + LONGEST_COMMENT)
    position = tail.rfind(b"PK\x05\x06")
    if position < 0 or len(tail) < position + END_RECORD_BYTES:
        raise CheckpointError(
            f"{where} is a truncated zip file (its directory, at the end, is missing); download it again"
        )
    if int.from_bytes(tail[position + 12 : position + 16], "little") > MOST_DIRECTORY_BYTES:
        raise CheckpointError(
            f"{where} has a zip directory larger than any checkpoint's; save it again with torch.save"
        )


def _data_start(file: StoredFile, where: str, record: zipfile.ZipInfo) -> int:
    """The first byte of a record's data, read from its local header."""
    name = quoted(record.filename)
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 or record.compress_size != record.file_size:
        raise CheckpointError(
            f"{where} holds the compressed or encrypted record {name}, which torch.save never writes; "
            "save it again with torch.save"
        )
    header = file.read(record.header_offset, LOCAL_HEADER_BYTES) if record.header_offset >= 0 else b""
    if len(header) < LOCAL_HEADER_BYTES or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{where} has no data where its record {name} should be; download it again")
    names_length = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = record.header_offset + LOCAL_HEADER_BYTES + names_length
    if start + record.file_size > file.size:
        raise CheckpointError(f"{where} is truncated: its record {name} reaches past the end; download it again")
    return start

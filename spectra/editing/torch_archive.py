"""The checksums of a torch zip file, after some of its records were overwritten in place.

Source: PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.9 (data descriptor) and 4.3.12 (central directory).
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 22
LOCAL_HEADER, CENTRAL_HEADER = 30, 46
HAS_DESCRIPTOR = 1 << 3
DESCRIPTOR = b"PK\x07\x08"


def mend_checksums(path: Path, starts: Collection[int]) -> None:
    """Write the CRC-32 of the records whose data begin at `starts` anew, wherever the archive keeps it.

    A record whose writer left no checksum (0) stays without one.
    """
    with zipfile.ZipFile(path) as archive:
        records, directory = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for info, entry in zip(records, _entries(file, directory, len(records)), strict=True):
            file.seek(info.header_offset + 26)
            start = info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))
            if start not in starts or info.CRC == 0:
                continue
            crc = struct.pack("<I", _crc(file, start, info.file_size))
            places = [entry + 16]
            if info.flag_bits & HAS_DESCRIPTOR:
                file.seek(start + info.file_size)
                signed = file.read(4) == DESCRIPTOR  # the signature is optional
                places.append(start + info.file_size + (4 if signed else 0))
            file.seek(info.header_offset + 14)
            if file.read(4) != bytes(4):
                places.append(info.header_offset + 14)
            for place in places:
                file.seek(place)
                file.write(crc)


def _entries(file: BinaryIO, position: int, count: int) -> Iterator[int]:
    """Where the entries of the central directory begin."""
    for _ in range(count):
        file.seek(position + 28)
        lengths = struct.unpack("<HHH", file.read(6))  # name, extra field, comment
        yield position
        position += CENTRAL_HEADER + sum(lengths)


def _crc(file: BinaryIO, start: int, size: int) -> int:
    crc = 0
    file.seek(start)
    while size > 0 and (block := file.read(min(CHUNK, size))):
        crc = zlib.crc32(block, crc)
        size -= len(block)
    return crc

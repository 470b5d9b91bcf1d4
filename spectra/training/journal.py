"""metrics.jsonl: a line of JSON for every step and every evaluation, cut back to the last saved state on resuming."""

from __future__ import annotations

import json
import os
from math import isfinite
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


class Journal:
    """Appends lines to a file. `size` is where it stands; opening with a size drops what was written after it."""

    def __init__(self, folder: Path, size: int = 0) -> None:
        self._file = (folder / METRICS).open("ab")
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    @property
    def size(self) -> int:
        """Bytes, all of them on their way to the disk."""
        self._file.flush()
        return self._file.tell()

    def write(self, **values: Any) -> None:
        """One line, flushed, so that others may watch the run."""
        for key, value in values.items():
            if isinstance(value, float) and not isfinite(value):
                values[key] = None  # JSON has no NaN
        self._file.write((json.dumps(values) + "\n").encode())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All lines; one that is not finished yet is left out."""
    lines = (folder / METRICS).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]

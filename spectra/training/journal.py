"""metrics.jsonl: a line of JSON for every step and every evaluation, cut back to the last saved state on resuming."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from spectra.errors import SpectraError

METRICS = "metrics.jsonl"


class Journal:
    """Appends lines to a file. `size` is where it stands; opening with a size drops what was written after it.

    Raises: SpectraError, on opening and on writing, where the disk does not take it.
    """

    def __init__(self, folder: Path, size: int = 0) -> None:
        self._path = folder / METRICS
        try:
            self._file = self._path.open("ab", buffering=0)  # so that others may watch the run
            self._file.truncate(size)
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._refused(error) from error

    @property
    def size(self) -> int:
        """Bytes, all of them on their way to the disk."""
        return self._file.tell()

    def write(self, **values: Any) -> None:
        """One line."""
        for key, value in values.items():
            if isinstance(value, float) and not isfinite(value):
                values[key] = None  # JSON has no NaN
        line = (json.dumps(values) + "\n").encode()
        try:
            while line:  # a disk that is nearly full takes a part, and refuses the next
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        self._file.close()

    def _refused(self, error: OSError) -> SpectraError:
        return SpectraError(
            f"cannot write {self._path}: {error.strerror or error}; free some space, then go on with --resume"
        )


class Log:
    """The lines of a run, to its journal and its trackers; held back until the run begins.

    A run that fails before its first step thus leaves no file that would be taken for a run.

    Args:
        begin: makes the folder the run's own, and gives the journal; None in all processes but the first.
        track: takes names and values, and the step, to the trackers.
    """

    def __init__(
        self, begin: Callable[[], Journal | None], track: Callable[[Mapping[str, Any], int], None] = lambda *_: None
    ) -> None:
        self._begin, self._track = begin, track
        self._held: list[tuple[int, str, Mapping[str, Any], float]] | None = []
        self.journal: Journal | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the folder is this run's own."""
        return self._held is None

    def begin(self) -> None:
        """Write what was held back. Nothing happens the second time. Raises: SpectraError as `Journal`."""
        if self._held is not None:
            held, self._held = self._held, None
            self.journal = self._begin()
            for line in held:
                self.write(*line)

    def write(self, step: int, split: str, values: Mapping[str, Any], seconds: float) -> None:
        """A line of one split ("train", "test", a retained task) after a step. Raises: SpectraError as `Journal`."""
        if self._held is not None:
            self._held.append((step, split, values, seconds))
            return
        if self.journal is not None:
            self.journal.write(step=step, split=split, **values, seconds=seconds)
        self._track({f"{split}/{key}": value for key, value in values.items()}, step)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """All lines; one that is not finished yet is left out."""
    lines = (folder / METRICS).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]

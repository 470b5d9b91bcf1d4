"""Rows of a table in a file: CSV, JSON, Parquet or lines of text, read through the library `datasets`."""

from __future__ import annotations

import difflib
import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from spectra.errors import SpectraError
from spectra.sources.libraries import first_line, library, quietly

# By ending: the reader of `datasets` and its options. Only an empty cell of a CSV is missing: "NA" is a word.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".tsv": ("csv", {"keep_default_na": False, "na_values": [""], "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
FORMATS = tuple(_READERS)


def read_columns(
    file: str | PathLike[str],
    columns: list[str],
    *,
    limit: int | None = None,
    cache: str | PathLike[str] | None = None,
) -> dict[str, list[Any]]:
    """The values of some columns of a table, in the order of its rows, as Python objects; None where a cell is empty.

    Args:
        file: .csv, .tsv, .json (a list of objects), .jsonl, .ndjson, .parquet, or .txt (one column, `text`).
        columns: their names.   limit: read the first so many rows only, and nothing of the file after them.
        cache: where `datasets` keeps its lock files; a temporary folder where None.
    Raises: SpectraError that names the file and, of a column that is not there, those that are.
    """
    path = Path(file)
    kind, options = _reader(path)
    datasets = library("datasets", "to read tables of examples")
    if limit is not None and limit < 1:
        raise SpectraError(f"a limit of {limit} rows leaves nothing of {path}; give at least 1")
    if kind == "csv" and limit is not None:  # its reader keeps the file open where it is left half-way
        options, limit = {**options, "nrows": limit}, None
    with _cache_folder(cache) as folder, quietly():
        try:
            rows = datasets.load_dataset(
                kind, data_files=glob.escape(str(path.absolute())), split="train", streaming=True,
                cache_dir=str(folder), **options,
            )  # fmt: skip
            taken = list(islice(rows, limit))
        except Exception as error:  # pandas, pyarrow and datasets raise what they like
            raise SpectraError(
                f"{path} is no readable {path.suffix} table: {first_line(error)}; mend the file"
            ) from error
    if not taken:
        raise SpectraError(f"{path} holds no rows; give a file with examples")
    for column in columns:
        if column not in taken[0]:
            raise _no_column(path, column, list(taken[0]))
    return {column: [row.get(column) for row in taken] for column in columns}


def _reader(path: Path) -> tuple[str, dict[str, Any]]:
    if path.is_dir():
        raise SpectraError(f"{path} is a folder and no table of texts; give a file ({', '.join(FORMATS)})")
    if not path.is_file():
        raise SpectraError(f"there is no file {path}; check the path")
    if path.suffix.lower() not in _READERS:
        raise SpectraError(
            f"{path} is of no format that is known by its ending; name it {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    return _READERS[path.suffix.lower()]


def _no_column(path: Path, column: str, there: list[str]) -> SpectraError:
    close = difflib.get_close_matches(column, there, n=1)
    guess = f", perhaps {close[0]!r}" if close else ""
    return SpectraError(
        f"{path} has no column {column!r}; it has {', '.join(map(repr, there))}: name one of them{guess}"
    )


@contextmanager
def _cache_folder(given: str | PathLike[str] | None) -> Iterator[Path]:
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="spectra-") as folder:
        yield Path(folder)

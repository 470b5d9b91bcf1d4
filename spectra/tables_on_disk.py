"""A result's tables in a folder, as Parquet files beside one JSON file that says where they came from; and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.atomic import replacing
from spectra.errors import SpectraError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1


@dataclass(frozen=True)
class Kind:
    """A kind of result: its name in messages, the command that makes it, and how its files are called."""

    name: str
    command: str
    provenance: str  # the JSON file
    prefix: str  # of the Parquet files, before the table's name

    def table(self, name: str) -> str:
        """The file of a table."""
        return f"{self.prefix}{name}.parquet"

    def begun_in(self, folder: Path) -> bool:
        """Whether the folder holds a result of this kind.

        Raises `SpectraError` where it holds something else, other than what a killed save leaves.
        """
        if (folder / self.provenance).exists():
            return True
        if any(not path.name.startswith((".", self.prefix)) for path in folder.iterdir()):
            raise SpectraError(f"{folder} holds files that are no {self.name}; choose another folder")
        return False

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """Make the folder, and turn an `OSError` of the block into a `SpectraError` that names it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise SpectraError(
                f"cannot write the {self.name} into {folder}: {error.strerror or error}; "
                "free some space or choose another folder"
            ) from error


def save_tables(
    folder: str | os.PathLike[str], kind: Kind, tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any]
) -> Path:
    """Write the tables and then the provenance, each file atomically; the folder is made where there is none.

    Returns the folder. Raises `SpectraError` where it cannot be written.
    """
    target = Path(folder)
    with kind.writing(target):
        for name, table in tables.items():
            with replacing(target / kind.table(name)) as path:
                table.to_parquet(path, index=False)
        with replacing(target / kind.provenance) as path:
            text = json.dumps({"format": FORMAT, **provenance}, indent=2, default=str)
            path.write_text(text + "\n", encoding="utf-8")
    return target


def load_tables(
    folder: str | os.PathLike[str], kind: Kind, names: Sequence[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The tables and the provenance that `save_tables` wrote.

    Raises `SpectraError` where `folder` holds none of this kind, or one of a later format.
    """
    import pandas as pd

    source, again = Path(folder), f"run `spectra {kind.command}` again"
    try:
        provenance = json.loads((source / kind.provenance).read_text(encoding="utf-8"))
        if not isinstance(provenance, dict) or provenance.pop("format", None) != FORMAT:
            raise SpectraError(
                f"{source / kind.provenance} is not of format {FORMAT}, which this version of spectra reads; {again}"
            )
        return {name: pd.read_parquet(source / kind.table(name)) for name in names}, provenance
    except FileNotFoundError as error:
        raise SpectraError(
            f"{source} holds no saved {kind.name} ({Path(str(error.filename)).name} is missing); "
            f"give the folder that `spectra {kind.command} --out` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise SpectraError(f"the {kind.name} in {source} cannot be read: {error}; {again}") from error

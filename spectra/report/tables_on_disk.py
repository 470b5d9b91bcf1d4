"""A result's tables in a folder, as Parquet files beside one JSON file that says where they came from; and back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.atomic import replacing
from spectra.errors import SpectraError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1


def save_tables(
    folder: str | os.PathLike[str], kind: str, tables: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any]
) -> Path:
    """Write `kind`_TABLE.parquet and `kind`.json, each file atomically; the folder is made where there is none.

    Returns the folder. Raises `SpectraError` where it cannot be written.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            with replacing(target / f"{kind}_{name}.parquet") as path:
                table.to_parquet(path, index=False)
        with replacing(target / f"{kind}.json") as path:
            text = json.dumps({"format": FORMAT, **provenance}, indent=2, default=str)
            path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SpectraError(
            f"cannot write the {kind} into {target}: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from error
    return target


def load_tables(
    folder: str | os.PathLike[str], kind: str, names: Sequence[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The tables and the provenance that `save_tables` wrote.

    Raises `SpectraError` where `folder` holds none of this kind, or one of a later format.
    """
    import pandas as pd

    source = Path(folder)
    try:
        provenance = json.loads((source / f"{kind}.json").read_text(encoding="utf-8"))
        if not isinstance(provenance, dict) or provenance.pop("format", None) != FORMAT:
            raise SpectraError(
                f"{source / kind}.json is not of format {FORMAT}, which this version of spectra reads; "
                f"run `spectra {kind}` again"
            )
        return {name: pd.read_parquet(source / f"{kind}_{name}.parquet") for name in names}, provenance
    except FileNotFoundError as error:
        raise SpectraError(
            f"{source} holds no saved {kind} ({Path(str(error.filename)).name} is missing); "
            f"give the folder that `spectra {kind} --out` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise SpectraError(f"the {kind} in {source} cannot be read: {error}; run `spectra {kind}` again") from error

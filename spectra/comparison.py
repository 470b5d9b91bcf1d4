"""The result of a comparison: tables, and where they came from. Everything shown or drawn is made from this alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.atomic import replacing
from spectra.errors import SpectraError

if TYPE_CHECKING:
    import pandas as pd

    from spectra.report.diagnosis import Finding
    from spectra.report.plots import Plots

FORMAT = 1
TABLES = ("layers", "components", "slices", "unmatched")
PROVENANCE = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """What fine-tuning did to every weight matrix, in the base's own singular basis.

    Every column is defined, with its symbol, in `spectra/definitions.md` (`spectra define COLUMN` prints it).

    Attributes:
        layers: a row per (tuned, matrix): sizes, roles, status, whole-matrix measures.
        components: a row per (tuned, matrix, component): the split of the update in the base's singular basis.
        slices: a row per (tuned, matrix, slice [start, stop) of components): block and cross energy.
        unmatched: what was not compared: tuned, name, side (base | tuned), reason.
        provenance: inputs with hashes, versions, options, threads, algorithms, notes on how names were matched.
    """

    layers: pd.DataFrame
    components: pd.DataFrame
    slices: pd.DataFrame
    unmatched: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        tuned = list(dict.fromkeys(self.layers["tuned"]))
        counts = self.layers["status"].value_counts()
        words = ", ".join(f"{count} {status}" for status, count in counts.items())
        return f"Comparison({len(self.layers)} rows of {tuned}: {words or 'nothing compared'})"

    def diagnosis(self) -> list[Finding]:
        """Sentences about the whole comparison, each with the numbers that led to it."""
        from spectra.report.diagnosis import diagnose

        return diagnose(self)

    @property
    def plot(self) -> Plots:
        """The pictures of this comparison: each method returns matplotlib Axes and takes `ax=`."""
        from spectra.report.plots import Plots

        return Plots(self)

    def _repr_html_(self) -> str:
        from spectra.report.page import summary_html

        return summary_html(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tables (Parquet) and the provenance (`comparison.json`) into `folder`, each file atomically.

        Returns the folder. Raises `SpectraError` where the folder cannot be written.

        >>> import tempfile, spectra
        >>> result = spectra.demo.small_comparison()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = spectra.load(result.save(folder))
        >>> again.layers.equals(result.layers)
        True
        """
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for table in TABLES:
                with replacing(target / f"{table}.parquet") as path:
                    getattr(self, table).to_parquet(path, index=False)
            with replacing(target / PROVENANCE) as path:
                text = json.dumps({"format": FORMAT, **self.provenance}, indent=2, default=str)
                path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise SpectraError(
                f"cannot write the comparison into {target}: {error.strerror or error}; "
                "free some space or choose another folder"
            ) from error
        return target


def load(folder: str | os.PathLike[str]) -> Comparison:
    """Read a saved comparison. Needs none of the checkpoints that it was made from.

    Raises `SpectraError` where `folder` holds no comparison or one of a later format.
    """
    import pandas as pd

    source = Path(folder)
    try:
        provenance = json.loads((source / PROVENANCE).read_text(encoding="utf-8"))
        if not isinstance(provenance, dict) or provenance.pop("format", None) != FORMAT:
            raise SpectraError(
                f"{source / PROVENANCE} is not of format {FORMAT}, which this version of spectra reads; "
                "run `spectra compare` again"
            )
        tables = {table: pd.read_parquet(source / f"{table}.parquet") for table in TABLES}
    except FileNotFoundError as error:
        raise SpectraError(
            f"{source} holds no saved comparison ({Path(str(error.filename)).name} is missing); "
            "give the folder that `spectra compare --out` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise SpectraError(
            f"the comparison in {source} cannot be read: {error}; run `spectra compare` again"
        ) from error
    return Comparison(**tables, provenance=provenance)

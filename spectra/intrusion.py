"""What was found of intruder dimensions: the result, its counts, its pictures, and the files that it is kept in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spectra.errors import SpectraError
from spectra.numeric import is_share, is_whole
from spectra.tables_on_disk import Kind, load_tables, save_tables

if TYPE_CHECKING:
    import pandas as pd

    from spectra.report.intruder_plots import IntruderPlots

Side = Literal["left", "right"]

KIND = Kind("intruders", "intruders", "intruders.json", "intruders_")
TABLES = ("triplets", "matrices", "unmatched")
SIDES: dict[str, tuple[Side, ...]] = {"left": ("left",), "right": ("right",), "both": ("left", "right")}


@dataclass(frozen=True)
class Intrusion:
    """The intruder dimensions of tuned models, and every leading direction that was looked at.

    *LoRA vs Full Fine-tuning: An Illusion of Equivalence* (Shuttleworth, Andreas, Torralba, Sharma, arXiv 2410.21228).
    Every column is defined in `spectra/definitions.md`.

    Attributes:
        triplets: a row per (tuned, matrix, side, leading triplet j < k of the tuned weight), intruder or not. What is
            said for any threshold and any smaller k follows from it.
        matrices: a row per (tuned, matrix): its counts at `epsilon`, which solvers ran, and why one failed.
        unmatched: what was not looked at: tuned, name, side (base | tuned), reason.
        provenance: inputs with hashes, options (k, epsilon, side), versions, notes.
    """

    triplets: pd.DataFrame
    matrices: pd.DataFrame
    unmatched: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """How many leading triplets of each matrix were looked at."""
        return int(self.provenance["options"]["k"])

    @property
    def reach(self) -> int:
        """k, or the most leading triplets that any matrix has where that is less: the short side of the largest."""
        from spectra.report.intruder_tables import deepest

        return deepest(self.matrices, self.k)

    @property
    def epsilon(self) -> float:
        """The threshold that was asked for."""
        return float(self.provenance["options"]["epsilon"])

    @property
    def sides(self) -> tuple[Side, ...]:
        """Whose directions were looked at: left, right, or both."""
        return SIDES[self.provenance["options"]["side"]]

    @property
    def intruders(self) -> pd.DataFrame:
        """The rows of `triplets` with best_cosine < epsilon, and `spread`: whether y_j is no new direction after all.

        It is `spread` where its projection on the base components near its partner reaches epsilon.
        """
        rows = self.triplets[self.triplets["best_cosine"] < self.epsilon].reset_index(drop=True)
        return rows.assign(spread=rows["cluster_cosine"] >= self.epsilon)

    def counts(self, epsilons: Sequence[float] | None = None, ks: Sequence[int] | None = None) -> pd.DataFrame:
        """How many intruders there are for every threshold and every k: a row per (tuned, side, k, epsilon).

        Args: by default the epsilon and the k that were asked for; no k may be larger than that one.
        Returns: columns tuned, side, k, epsilon, `intruders` (in all matrices together) and `matrices_with_intruders`.
        Raises: SpectraError for a k beyond what was looked at, and thresholds outside [0, 1].
        """
        from spectra.report.intruder_tables import intruder_counts

        epsilons = [self.epsilon] if epsilons is None else list(epsilons)
        ks = [self.k] if ks is None else list(ks)
        if not all(is_whole(k) and 1 <= k <= self.k for k in ks):
            raise SpectraError(
                f"k is a whole number between 1 and {self.k}, how many were looked at; find them with more"
            )
        if not all(is_share(epsilon) for epsilon in epsilons):
            raise SpectraError("a threshold on cosines is a number between 0 and 1")
        return intruder_counts(self.triplets, list(dict.fromkeys(self.matrices["tuned"])), self.sides, epsilons, ks)

    def __repr__(self) -> str:
        words = [f"{row.intruders} of {row.tuned} ({row.side})" for row in self.counts().itertuples()]
        return f"Intrusion({', '.join(words)}; k = {self.k}, epsilon = {self.epsilon:g})"

    @property
    def plot(self) -> IntruderPlots:
        """The pictures: each method returns matplotlib Axes and takes `ax=`."""
        from spectra.report.intruder_plots import IntruderPlots

        return IntruderPlots(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tables (`intruders_*.parquet`) and `intruders.json` into `folder`, each file atomically.

        It may be the folder of a saved `Comparison`. Raises `SpectraError` where it cannot be written.
        """
        return save_tables(folder, KIND, {name: getattr(self, name) for name in TABLES}, self.provenance)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Intrusion:
        """Read what `save` wrote. Raises `SpectraError` where `folder` holds none."""
        tables, provenance = load_tables(folder, KIND, TABLES)
        return cls(**tables, provenance=provenance)

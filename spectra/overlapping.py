"""Overlaps between updates: do several tuned models change the same directions, and would they merge well?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spectra.engines.studying import Progress, opened, places, study
from spectra.errors import SpectraError
from spectra.jobs import CAN_FAIL, failed
from spectra.labels import labelled
from spectra.linalg.lowrank import LowRank
from spectra.loading import BaseMatrix, Group
from spectra.measures.overlap_measures import Held, hold_against
from spectra.measures.subspaces import leading
from spectra.numeric import is_whole
from spectra.pairing import Pair
from spectra.report.overlap_pairs import BASE, PAIRS, pooled_pairs
from spectra.report.overlap_tables import tables
from spectra.tables_on_disk import Kind, load_tables, save_tables

if TYPE_CHECKING:
    import pandas as pd

    from spectra.report.evidence import Finding
    from spectra.report.overlap_plots import OverlapPlots

Source = Any  # a path, a hub id, a state dict, an nn.Module, or an open Checkpoint

KIND = Kind("overlap", "overlap", "overlap.json", "overlap_")
TABLES = ("matrices", "grids", "unmatched")


@dataclass(frozen=True)
class Overlap:
    """How the updates of several tuned models lie to each other and to their base, matrix by matrix.

    Overlap phi as in Hu et al., *LoRA* (2021), section 7.2. Every column is defined in `spectra/definitions.md`, and
    each stands beside what independent random subspaces or entries would show.

    Attributes:
        matrices: a row per (first, second, matrix); `first` "base" holds the base's own directions against an update.
        grids: a row per (first, second, matrix, side, i, j): phi of the leading i and j directions.
        unmatched: what was not compared: tuned, name, side (base | tuned), reason.
        provenance: inputs with hashes, options, versions, notes.
    """

    matrices: pd.DataFrame
    grids: pd.DataFrame
    unmatched: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """The tuned models, in the order given."""
        return list(self.provenance["tuned"])

    def pairs(self, outliers: bool = True) -> pd.DataFrame:
        """A row per (first, second), all matrices together.

        Overlaps, angles and their nulls are means over the matrices that both moved, weighted by ||D_a||_F ||D_b||_F
        (by ||D||_F against the base), and `sign_agreement` is a share of all their entries that both moved.
        `update_cosine` is that of the whole updates: a matrix that one of the two left alone counts with D = 0, so that
        updates of different matrices have cosine 0, and no overlap (NaN). A model that nowhere moved makes no pairs.

        Args: outliers: False leaves the matrices out that moved much further than the rest of either model, as those
            do that were trained anew. A merge holds them, and they may hold most of an update: see `apart`.
        """
        return pooled_pairs(self.matrices, self.labels, outliers)

    def table(self, column: str = "left_overlap", outliers: bool = True) -> pd.DataFrame:
        """A column of `pairs(outliers)` as a symmetric matrix of the tuned models, on the diagonal a model with itself.

        NaN where two models make no pair, or moved no matrix both.
        """
        import pandas as pd

        known = [name for name in PAIRS if name.endswith(("overlap", "cosine", "agreement", "angle", "null"))]
        if column not in known:
            raise SpectraError(f"{column!r} is no column of the pairs; give one of {', '.join(known)}")
        labels = self.labels
        itself = np.nan if column.endswith("null") else 0.0 if column.endswith("angle") else 1.0
        values = pd.DataFrame(np.full((len(labels), len(labels)), np.nan), index=labels, columns=labels)
        for label in labels:
            values.loc[label, label] = itself
        for row in self.pairs(outliers).to_dict("records"):
            if row["first"] != BASE:
                values.loc[row["first"], row["second"]] = values.loc[row["second"], row["first"]] = row[column]
        return values

    def diagnosis(self) -> list[Finding]:
        """Sentences on every pair, each with the numbers that led to it: do the updates add up, cancel, or miss?

        They are of the whole updates. Where some matrices moved much further than the rest, what the numbers are
        without them is said beside, with its own verdict where that is another one (against the base, without any).
        """
        from spectra.report.overlap_sentences import overlap_findings

        return overlap_findings(self.matrices, self.labels)

    def __repr__(self) -> str:
        words = [f"{row.first} x {row.second}: {row.left_overlap:.2f}" for row in self.pairs().itertuples()]
        return f"Overlap({', '.join(words) or 'nothing compared'})"

    @property
    def plot(self) -> OverlapPlots:
        """The pictures: each method returns matplotlib Axes and takes `ax=`."""
        from spectra.report.overlap_plots import OverlapPlots

        return OverlapPlots(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tables (`overlap_*.parquet`) and `overlap.json` into `folder`, each file atomically.

        It may be the folder of a saved `Comparison`. Raises `SpectraError` where it cannot be written.
        """
        return save_tables(folder, KIND, {name: getattr(self, name) for name in TABLES}, self.provenance)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Overlap:
        """Read what `save` wrote. Raises `SpectraError` where `folder` holds none."""
        tables, provenance = load_tables(folder, KIND, TABLES)
        return cls(**tables, provenance=provenance)


def overlap(
    base: Source,
    tuned: Source | Sequence[Source] | Mapping[str, Source],
    *,
    i: int = 10,
    j: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    transposed: Sequence[str] | None = None,
    device: str | Sequence[str] = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Overlap:
    """Hold the updates of tuned models against each other and against the base: subspaces, cosines, signs.

    Args:
        base, tuned: as for `compare`; of one tuned model, only its update against the base is looked at.
        i, j: how many leading singular directions of the first and of the second matrix span the subspaces; j is i
            where not given. An update of smaller rank has fewer.
        include, exclude, transposed, device, workers, progress: as for `compare`.
    Returns: an `Overlap`.
    Raises: SpectraError for input that cannot be read or matched.

    >>> base = {"fc.weight": torch.eye(8)}
    >>> updates = torch.zeros(2, 8, 8)
    >>> updates[0, 0, 1], updates[1, 0, 2] = 1.0, 1.0  # into the same output, from different inputs
    >>> result = overlap(base, {name: {"fc.weight": torch.eye(8) + D} for name, D in zip("ab", updates)}, i=1)
    >>> row = result.pairs().iloc[-1]
    >>> f"{row['first']} and {row['second']}: {row['left_overlap']:.2f} left, {row['right_overlap']:.2f} right"
    'a and b: 1.00 left, 0.00 right'
    """
    import pandas as pd

    j = i if j is None else j
    for count in (i, j):
        if not is_whole(count) or count < 1:
            raise SpectraError(
                f"subspaces have a whole number of directions: i and j must be at least 1, not {count!r}"
            )
    sources = labelled(tuned, taken=(BASE,))
    if BASE in sources:
        raise SpectraError(f"no tuned model may be called {BASE!r} here; give it another label")
    where = places(device, workers, None, 0)
    pairs = opened(base, sources, include, exclude, transposed)
    rows, grids = [], []
    work = _Work(i, j)
    # One finding a pair of base and tuned: the rows in which that tuned model is the second.
    for found in study(work.run, pairs.pairings, where, progress):
        rows += found.rows
        grids += found.grids
    options = {"i": i, "j": j, "include": list(include), "exclude": list(exclude)}
    unmatched = [
        (label, item.name, item.side, item.reason)
        for label, pairing in pairs.pairings.items()
        for item in pairing.unmatched
    ]
    return Overlap(
        *tables(rows, grids, list(sources)),
        unmatched=pd.DataFrame(unmatched, columns=["tuned", "name", "side", "reason"]).astype("str"),
        provenance=pairs.provenance(options, where),
    )


@dataclass
class _Found:
    rows: list[dict[str, Any]] = field(default_factory=list)
    grids: list[tuple[Any, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Model:
    """The update of a tuned model, or the base itself."""

    label: str
    held: Held


@dataclass(frozen=True)
class _Work:
    i: int
    j: int

    def run(self, group: Group, device: torch.device) -> list[_Found]:
        found = [_Found() for _ in group.pairs]
        try:
            base = BaseMatrix(group.pairs[0][1], device)
            of_base = _Model(BASE, Held(base.weight, leading(base.weight, self.i)))
        except CAN_FAIL as error:
            for one, (label, pair) in zip(found, group.pairs, strict=True):
                one.rows.append(_row(BASE, label, pair, "failed", failed(error, label, pair, BASE).note))
            return found
        moved: list[_Model] = []
        for one, (label, pair) in zip(found, group.pairs, strict=True):
            try:
                X = _update(base, pair)
                update = None if X is None else Held(X, leading(X, max(self.i, self.j)))
                if update is None or update.leading.rank == 0:
                    one.rows.append(_row(BASE, label, pair, "unchanged", pair.note) | _norms(base))
                    continue
                moved.append(_Model(label, update))
            except CAN_FAIL as error:
                one.rows.append(_row(BASE, label, pair, "failed", failed(error, label, pair).note))
                continue
            self._compare(of_base, moved[-1], pair, one)
        places = {label: index for index, (label, _) in enumerate(group.pairs)}
        for first, second in combinations(moved, 2):
            at = places[second.label]
            self._compare(first, second, group.pairs[at][1], found[at])
        return found

    def _compare(self, first: _Model, second: _Model, pair: Pair, into: _Found) -> None:
        found = hold_against(first.held, second.held, self.i, self.j)
        no_directions = "the base weight is all zero" if first.held.leading.rank == 0 else ""
        note = "; ".join(filter(None, (pair.note, no_directions)))
        into.rows.append(_row(first.label, second.label, pair, "compared", note) | found.row)
        into.grids += [(first.label, second.label, pair.matrix.name, *cell) for cell in found.cells]


def _update(base: BaseMatrix, pair: Pair) -> Tensor | LowRank | None:
    """D as factors, or dense in the dtype of the weights; None where nothing changed."""
    tuned = base.tuned(pair)
    if tuned is None or isinstance(tuned, LowRank):
        return tuned
    W = base.weight
    wide = torch.float64 if torch.float64 in (W.dtype, tuned.dtype) else torch.float32
    return (tuned.double() - W.double()).to(wide)


def _norms(base: BaseMatrix) -> dict[str, Any]:
    """What a row says of sizes where nothing moved."""
    W = base.weight
    return {"first_norm": float(torch.linalg.vector_norm(W.double())), "second_norm": 0.0, "entries": W.numel()}


def _row(first: str, second: str, pair: Pair, status: str, note: str) -> dict[str, Any]:
    matrix = pair.matrix
    return {
        "first": first, "second": second, "name": matrix.name, "role": matrix.role, "layer": matrix.layer,
        "rows": matrix.rows, "columns": matrix.columns, "status": status, "note": note,
    }  # fmt: skip

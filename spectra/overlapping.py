"""Overlaps between updates: do several tuned models change the same directions, and would they merge well?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import sqrt
from numbers import Integral
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
from spectra.measures.subspaces import (
    Leading,
    angles_null,
    leading,
    overlap_null,
    overlaps,
    principal_angles,
    products,
)
from spectra.pairing import Pair
from spectra.report.overlap_pairs import BASE, OF_SIDE, PAIRS, pooled_pairs
from spectra.tables_on_disk import Kind, load_tables, save_tables

if TYPE_CHECKING:
    import pandas as pd

    from spectra.report.evidence import Finding
    from spectra.report.overlap_plots import OverlapPlots

Source = Any  # a path, a hub id, a state dict, an nn.Module, or an open Checkpoint

KIND = Kind("overlap", "overlap", "overlap.json", "overlap_")
TABLES = ("matrices", "grids", "unmatched")
MEASURES = (
    "first_rank", "second_rank", *(f"{side}_{name}" for side in ("left", "right") for name in OF_SIDE),
    "update_cosine", "update_cosine_null", "sign_agreement", "sign_agreement_null",
    "first_norm", "second_norm", "entries",
)  # fmt: skip
MATRICES = ("first", "second", "name", "role", "layer", "rows", "columns", "status", "note", *MEASURES)
GRIDS = ("first", "second", "name", "side", "i", "j", "overlap", "overlap_null")


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

    def pairs(self, outliers: bool = False) -> pd.DataFrame:
        """A row per (first, second), all matrices together.

        Overlaps, angles and their nulls are means over the matrices that both moved, weighted by ||D_a||_F ||D_b||_F
        (by ||D||_F against the base), and `sign_agreement` is of all their entries. `update_cosine` is that of the
        whole updates: a matrix that one of the two left alone counts with D = 0, so that updates of different matrices
        have cosine 0, and no overlap (NaN). A model that nowhere moved makes no pairs.

        Args: outliers: whether matrices that moved as a retrained layer does, in either model, count; `compare` leaves
            them out of its sums, too.
        """
        return pooled_pairs(self.matrices, self.labels, outliers)

    def table(self, column: str = "left_overlap") -> pd.DataFrame:
        """A column of `pairs()` as a symmetric matrix of the tuned models, on the diagonal a model with itself.

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
        for row in self.pairs().to_dict("records"):
            if row["first"] != BASE:
                values.loc[row["first"], row["second"]] = values.loc[row["second"], row["first"]] = row[column]
        return values

    def diagnosis(self) -> list[Finding]:
        """Sentences on every pair, each with the numbers that led to it: do the updates add up, cancel, or miss?"""
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
    j = i if j is None else j
    for count in (i, j):
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
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
    return _tabulated(rows, grids, unmatched, list(sources), pairs.provenance(options, where))


@dataclass
class _Found:
    rows: list[dict[str, Any]] = field(default_factory=list)
    grids: list[tuple[Any, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Held:
    """A matrix whose leading directions are known."""

    label: str
    X: Tensor | LowRank
    leading: Leading


@dataclass(frozen=True)
class _Work:
    i: int
    j: int

    def run(self, group: Group, device: torch.device) -> list[_Found]:
        found = [_Found() for _ in group.pairs]
        try:
            base = BaseMatrix(group.pairs[0][1], device)
            of_base = _Held(BASE, base.weight, leading(base.weight, self.i))
        except CAN_FAIL as error:
            for one, (label, pair) in zip(found, group.pairs, strict=True):
                one.rows.append(_row(BASE, label, pair, "failed", failed(error, label, pair, BASE).note))
            return found
        held: list[_Held] = []
        for one, (label, pair) in zip(found, group.pairs, strict=True):
            try:
                X = _update(base, pair)
                of_update = None if X is None else _Held(label, X, leading(X, max(self.i, self.j)))
                if of_update is None or of_update.leading.rank == 0:
                    one.rows.append(_row(BASE, label, pair, "unchanged", pair.note) | _norms(base))
                    continue
                held.append(of_update)
            except CAN_FAIL as error:
                one.rows.append(_row(BASE, label, pair, "failed", failed(error, label, pair).note))
                continue
            self._compare(of_base, held[-1], pair, one)
        places = {label: index for index, (label, _) in enumerate(group.pairs)}
        for first, second in combinations(held, 2):
            at = places[second.label]
            self._compare(first, second, group.pairs[at][1], found[at])
        return found

    def _compare(self, first: _Held, second: _Held, pair: Pair, into: _Found) -> None:
        m, n = pair.matrix.rows, pair.matrix.columns
        i, j = min(self.i, first.leading.rank), min(self.j, second.leading.rank)
        row = _row(first.label, second.label, pair, "compared", pair.note)
        row |= {"first_rank": i, "second_rank": j}
        if i == 0:
            row["note"] = "; ".join(filter(None, (pair.note, "the base weight is all zero")))
        for side, d in (("left", m), ("right", n)) if i else ():
            A, B = (h.leading.Y if side == "left" else h.leading.Z for h in (first, second))
            A, B = A[:, :i], B[:, :j]
            phi = overlaps(A, B)
            angles, nulls = principal_angles(A, B), angles_null(d, i, j)
            values = (phi[-1, -1], overlap_null(d, i, j), angles[0], nulls[0], angles[-1], nulls[1])
            row |= {f"{side}_{name}": float(value) for name, value in zip(OF_SIDE, values, strict=True)}
            into.grids += [
                (first.label, second.label, pair.matrix.name, side, a + 1, b + 1, phi[a, b],
                 overlap_null(d, a + 1, b + 1))
                for a in range(i) for b in range(j)
            ]  # fmt: skip
        both = products(first.X, second.X)
        scale = both.norms[0] * both.norms[1]
        row |= {
            "update_cosine": both.inner / scale if scale else float("nan"),
            "update_cosine_null": 1 / sqrt(m * n),
            "sign_agreement": both.agreeing / both.moved if both.moved else float("nan"),
            "sign_agreement_null": 0.5,
            "first_norm": both.norms[0],
            "second_norm": both.norms[1],
            "entries": m * n,
        }
        into.rows.append(row)


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


def _tabulated(
    rows: Sequence[Mapping[str, Any]],
    grids: Sequence[tuple[Any, ...]],
    unmatched: Sequence[tuple[str, ...]],
    labels: Sequence[str],
    provenance: Mapping[str, Any],
) -> Overlap:
    import pandas as pd

    place = {label: at for at, label in enumerate([BASE, *labels])}
    # By pair; the order of the matrices within a pair stays that of reading.
    rows = sorted(rows, key=lambda row: (place[row["first"]], place[row["second"]]))
    counts = dict.fromkeys(("layer", "first_rank", "second_rank", "entries"), "Int64")
    texts = dict.fromkeys(("first", "second", "name", "role", "status", "note"), "str")
    numbers = {name: "float64" for name in MEASURES if name not in counts}
    of_grid = {"i": "int64", "j": "int64", "overlap": "float64", "overlap_null": "float64"}
    return Overlap(
        matrices=pd.DataFrame(rows, columns=list(MATRICES)).astype({**texts, **counts, **numbers}),
        grids=pd.DataFrame(list(grids), columns=list(GRIDS)).astype(
            {**dict.fromkeys(("first", "second", "name", "side"), "str"), **of_grid}
        ),
        unmatched=pd.DataFrame(list(unmatched), columns=["tuned", "name", "side", "reason"]).astype("str"),
        provenance=provenance,
    )

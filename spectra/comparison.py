"""The result of a comparison: tables, and where they came from. Everything shown or drawn is made from this alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectra.errors import SpectraError
from spectra.tables_on_disk import Kind, load_tables, save_tables

if TYPE_CHECKING:
    import pandas as pd

    from spectra.report.diagnosis import Finding
    from spectra.report.plots import Plots
    from spectra.shift import CovarianceShift

KIND = Kind("comparison", "compare", "comparison.json", "")
TABLES = ("layers", "components", "slices", "unmatched")
SAME_BASE = 3e-3  # relative: more than storing the base as bfloat16 moves
SAME_UPDATE = 0.1
NULLABLE = {"samples": "Int64", "directions": "Int64", "centred": "boolean"}  # of a shift, missing on rows without one


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

    def in_sequence(self, scores: Mapping[str, Mapping[str, float]] | None = None) -> Comparison:
        """The same comparison with its tuned models declared to be in order: steps of a run, or tasks learnt in turn.

        What is shown, said and drawn is then how each measure went from model to model; `save` keeps that.

        Args:
            scores: label -> {"score": of the new task, "forgetting": what was lost of the old one}, either or both, for
                as many models as are known; None takes those of the training runs beside the checkpoints, if any.
        Raises: SpectraError for fewer than two models, and for scores of models or of kinds that there are not.
        """
        from spectra.report.sequence_table import in_sequence

        return in_sequence(self, scores)

    def sequence(self) -> pd.DataFrame:
        """A row per tuned model, in order, all over the same matrices: sizes, shares, ranks, intruders, scores.

        Sizes and shares are pooled over the matrices, other measures are medians, intruders are counted. Matrices that
        stand apart in the last model count for intruders only. Raises SpectraError for fewer than two models.

        >>> import torch, spectra
        >>> base, D = {"fc.weight": torch.eye(3)}, 0.1 * torch.ones(3, 3)
        >>> steps = {f"step-{10 * t}": {"fc.weight": torch.eye(3) + t * D} for t in (1, 2)}
        >>> spectra.compare(base, steps).sequence()[["step", "relative_update"]].round(3).values.tolist()
        [[10, 0.173], [20, 0.346]]
        """
        from spectra.report.sequence_table import sequence_table

        return sequence_table(self)

    def join(self, shift: CovarianceShift, tuned: str | None = None) -> Comparison:
        """The same comparison with the columns of a covariance shift of the same two models.

        `layers` and `components` gain them on the rows of the matrices that both have, other rows are missing there;
        the shift's `diagonal` becomes `shift_diagonal`. Columns of an earlier join are written over for this tuned
        model. A matrix whose weight did not change has no components in a comparison and gets none; its inherited shift
        stands in `layers`.

        Args:
            shift: with `basis="weight"`, whose directions are the components of a comparison.
            tuned: the label of the tuned model that the shift is of; may be left out where there is one.
        Raises: SpectraError for another basis, an unknown label, where no matrix is in both, and where the two cannot
            be of the same models: by the sizes and norms of a matrix and of its update where that stands clear of
            rounding, by a weight that one says moved and the other not, and without data by the base's singular values
            and by the variance that directions gain.

        >>> import torch, spectra
        >>> base, tuned = {"fc.weight": torch.eye(2)}, {"fc.weight": torch.diag(torch.tensor([2.0, 1.0]))}
        >>> joined = spectra.compare(base, tuned).join(spectra.covariance_shift(base, tuned))
        >>> float(joined.components["shift_diagonal"].max().round(6))
        3.0
        """
        if not hasattr(shift, "functional"):  # a room beside this one, which is not imported
            raise SpectraError(f"join takes the result of covariance_shift, not {type(shift).__name__}")
        label = self._label_of(tuned)
        basis = shift.provenance.get("basis")
        if basis != "weight":
            raise SpectraError(
                f"the shift is written in the basis {basis!r}, whose directions are not the components of a "
                "comparison; compute it with basis='weight' to join it"
            )
        if not set(shift.layers["name"]) & set(self.layers.loc[self.layers["tuned"] == label, "name"]):
            raise SpectraError(
                f"the shift and the comparison of {label!r} have no matrix in common; "
                "join the shift of the same two models"
            )
        _check_same_models(self, shift, label)
        # by the comparison itself
        said = ["tensor", "part", "role", "layer", "rows", "columns", "note", "base_norm", "update_norm"]
        layers = shift.layers.drop(columns=said).astype(NULLABLE)
        components = shift.components.rename(columns={"diagonal": "shift_diagonal"})
        return replace(
            self,
            layers=_joined(self.layers, layers, label, ["name"]),
            components=_joined(self.components, components, label, ["name", "component"]),
            provenance={
                **self.provenance,
                "shifts": {**self.provenance.get("shifts", {}), label: dict(shift.provenance)},
            },
        )

    def _label_of(self, tuned: str | None) -> str:
        labels = list(dict.fromkeys(self.layers["tuned"]))
        if tuned is None and len(labels) == 1:
            return str(labels[0])
        if tuned is None or tuned not in labels:
            said = "none was named" if tuned is None else f"{tuned!r} is none of them"
            raise SpectraError(
                f"the comparison is of {', '.join(map(repr, labels))} and {said}; "
                "say with `tuned` (--join-label) which of them the shift is of"
            )
        return tuned

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
        return save_tables(folder, KIND, {name: getattr(self, name) for name in TABLES}, self.provenance)


def _check_same_models(comparison: Comparison, shift: CovarianceShift, label: str) -> None:
    """Raise `SpectraError` where the tables of the two contradict each other."""
    ours = comparison.layers[comparison.layers["tuned"] == label]
    theirs = shift.layers[["name", "rows", "columns", "base_norm", "update_norm", "relative_own"]]
    both = ours.drop(columns="relative_own", errors="ignore").merge(theirs, on="name", suffixes=("", "_shift"))
    other_size = both[(both["rows"] != both["rows_shift"]) | (both["columns"] != both["columns_shift"])]
    if len(other_size):
        row = other_size.iloc[0]
        sizes = [f"{row[f'rows{side}']} x {row[f'columns{side}']}" for side in ("", "_shift")]
        raise _of_other_models(label, row["name"], f"is {sizes[0]} in the comparison and {sizes[1]} in the shift")
    if shift.provenance.get("centred", True):  # otherwise a bias is a part of the weight
        moved = both[(both["status"] == "unchanged") & (both["relative_own"] > 0)]
        if len(moved):
            name = moved["name"].iloc[0]
            raise _of_other_models(label, name, "is unchanged in the comparison and moved in the shift")
    clear = (both["update_form"] == "dense") & (both["relative_update"] > 30 * both["rounding_floor"])
    for norm, rows, tolerance in (("base_norm", both, SAME_BASE), ("update_norm", both[clear], SAME_UPDATE)):
        apart = (rows[norm] - rows[f"{norm}_shift"]).abs() > tolerance * rows[norm]
        if apart.any():
            row = rows[apart].iloc[0]
            norms = f"has the {norm} {row[norm]:.6g} in the comparison and {row[f'{norm}_shift']:.6g} in the shift"
            raise _of_other_models(label, row["name"], norms)
    if shift.provenance.get("mode") == "data_free":
        _check_white(comparison, shift, label, set(both["name"][clear]))


def _check_white(comparison: Comparison, shift: CovarianceShift, label: str, clear: set[str]) -> None:
    """For white inputs both tables hold s_i^2 and what it gains, as `variance` and `white_shift`.

    Only updates of `clear` matrices are compared: an adapter and its merged form are one model, and differ by rounding.
    """
    ours = comparison.components[comparison.components["tuned"] == label]
    theirs = shift.components[["name", "component", "variance", "normalised_diagonal"]]
    ours = ours[["name", "component", "singular_value", "gap", "white_shift"]]  # without those of an earlier join
    both = ours.merge(theirs, on=["name", "component"])
    for name, rows in both.groupby("name", sort=False):
        squares = rows["singular_value"] ** 2
        if _apart(rows["variance"], squares) > SAME_BASE:
            raise _of_other_models(label, name, "has other singular values in the base of the shift")
        alone = (rows["gap"] > 1e-6) & (rows["gap"].shift(fill_value=1.0) > 1e-6)  # within a cluster U is free
        rows = rows[alone & rows["white_shift"].notna()]
        if name in clear and _apart(rows["normalised_diagonal"], rows["white_shift"]) > SAME_UPDATE:
            raise _of_other_models(label, name, "moved otherwise in the tuned model of the shift")


def _apart(one: pd.Series[float], other: pd.Series[float]) -> float:
    """||one - other|| over the larger norm; 0 where both are zero."""
    norm = max(float((each**2).sum()) for each in (one, other))
    return (float(((one - other) ** 2).sum()) / norm) ** 0.5 if norm > 0 else 0.0


def _of_other_models(label: str, name: Any, how: str) -> SpectraError:
    return SpectraError(
        f"the shift is not of the models that the comparison of {label!r} is of: {str(name)!r} {how}; "
        "join the shift of the same two models"
    )


def _joined(table: pd.DataFrame, more: pd.DataFrame, label: str, keys: list[str]) -> pd.DataFrame:
    """`table` with the columns of `more` on the rows of one tuned model; those of other models keep what they have."""
    added = [column for column in more.columns if column not in keys]
    here = table["tuned"] == label
    found = table.loc[here, keys].merge(more, on=keys, how="left", validate="one_to_one")[added]
    found.index = table.index[here]
    filled = table.drop(columns=added, errors="ignore").join(found)
    for column in set(added) & set(table.columns):
        filled[column] = filled[column].where(here, table[column])
    return filled


def load(folder: str | os.PathLike[str]) -> Comparison:
    """Read a saved comparison. Needs none of the checkpoints that it was made from.

    Raises `SpectraError` where `folder` holds no comparison or one of a later format.
    """
    tables, provenance = load_tables(folder, KIND, TABLES)
    return Comparison(**tables, provenance=provenance)

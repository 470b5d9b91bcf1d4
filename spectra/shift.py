"""The result of a feature-covariance shift: tables, the matrices Delta, and where they came from."""

from __future__ import annotations

import hashlib
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Literal

from spectra.atomic import replacing
from spectra.errors import SpectraError
from spectra.tables_on_disk import Kind, load_tables, save_tables
from spectra.tensor_files import write_tensors

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from spectra.report.shift_plots import ShiftPlots

KIND = Kind("covariance shift", "covariance", "covariance_shift.json", "shift_")
TABLES = ("layers", "components", "slices", "unmatched", "functional")
MATRICES = "shift_matrices"

Part = Literal["total", "own", "inherited"]


class KeptMatrices:
    """The k x k matrices of the shift on disk, a file per weight matrix: own and inherited part, float64.

    Attributes:
        folder: where the files are.
        files: name of the weight matrix -> name of its file.
    """

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self.folder, self.files = folder, dict(files)

    @classmethod
    def temporary(cls) -> KeptMatrices:
        """An empty store in a temporary folder, which is removed with the result."""
        folder = Path(mkdtemp(prefix="spectra-shift-"))
        found = cls(folder, {})
        weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
        return found

    def keep(self, name: str, own: Tensor, inherited: Tensor | None) -> None:
        """Write the parts of one weight matrix's shift, (k, k) each; `inherited` None where there is none."""
        parts = {"own": own} if inherited is None else {"own": own, "inherited": inherited}
        file = f"{len(self.files):05d}.safetensors"
        self.files[name] = file  # named first: several threads keep matrices at once
        with KIND.writing(self.folder), replacing(self.folder / file) as path:
            write_tensors({part: X.cpu() for part, X in parts.items()}, path)

    def read(self, name: str) -> dict[str, Tensor]:
        """The parts that were kept of one weight matrix."""
        from safetensors.torch import load_file

        path = self.folder / self.files[name]
        try:
            return load_file(path)
        except (OSError, ValueError) as error:
            raise SpectraError(
                f"the shift of {name!r} cannot be read from {path}: {error}; compute it again"
            ) from error

    def copy(self, folder: Path, names: Iterable[str]) -> dict[str, str]:
        """Copy the files of `names` into `folder`; returns name -> file there.

        Files are named by their content, so that a result that was loaded from `folder` never reads those of another.
        """
        if self.is_in(folder):
            return {name: self.files[name] for name in names}
        folder.mkdir(parents=True, exist_ok=True)
        copied = {}
        for name in names:
            source = self.folder / self.files[name]
            with source.open("rb") as stream:
                copied[name] = f"{hashlib.file_digest(stream, 'sha256').hexdigest()[:32]}.safetensors"
            with replacing(folder / copied[name]) as path:
                shutil.copyfile(source, path)
        return copied

    def is_in(self, folder: Path) -> bool:
        """Whether `folder` is where the files are."""
        return self.folder.resolve() == folder.resolve()


@dataclass(frozen=True)
class CovarianceShift:
    """How fine-tuning shifted the covariance of every layer's features: Delta = Q^T (Sigma'_Y - Sigma_Y) Q.

    *Least but not Last* (Quercia, Bangun, Assent, Scharr, arXiv 2602.03493), Eq. 11, in our reading. Every column is
    defined in `spectra/definitions.md`.

    Attributes:
        layers: a row per weight matrix: samples, variances, size of the shift, its own and inherited shares, CKA and
            Bures-Wasserstein distance of the features.
        components: a row per (matrix, direction of Q): variance, diagonal, off_diagonal_energy, own_diagonal,
            inherited_diagonal, and each over trace(Sigma_Y) as `normalised_...`.
        slices: a row per (matrix, slice of directions): its share of the variance and of the shift.
        unmatched: what was not measured: name, side, reason.
        functional: a row per sample, as `FunctionalCheck.result` gives it; empty where no model was asked.
        provenance: what was measured and how: mode, basis, centred, samples, versions, notes.
    """

    layers: pd.DataFrame
    components: pd.DataFrame
    slices: pd.DataFrame
    unmatched: pd.DataFrame
    functional: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)
    matrices: KeptMatrices | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        how = ", ".join(str(self.provenance.get(key, "?")) for key in ("mode", "basis"))
        return f"CovarianceShift({len(self.layers)} matrices, {how}, {self.provenance.get('samples', 0)} samples)"

    @property
    def names(self) -> list[str]:
        """The names of the weight matrices, in reading order."""
        return list(self.layers["name"])

    def matrix(self, name: str, part: Part = "total") -> Tensor:
        """Delta (k x k, float64) of a weight matrix: row and column i belong to direction i of Q.

        Args:
            name: of the weight matrix, as in `layers`.
            part: "own": what this layer's own weights moved; "inherited": what came in through its inputs; "total".
        Raises: SpectraError for an unknown name or part, and for a matrix that was not kept.

        >>> import torch, spectra
        >>> base = {"fc.weight": torch.diag(torch.tensor([2.0, 1.0]))}
        >>> tuned = {"fc.weight": torch.diag(torch.tensor([3.0, 1.0]))}
        >>> spectra.covariance_shift(base, tuned).matrix("fc.weight").abs().round(decimals=6).tolist()
        [[5.0, 0.0], [0.0, 0.0]]
        """
        if part not in ("total", "own", "inherited"):
            raise SpectraError(f"{part!r} is no part of a shift; give 'total', 'own' or 'inherited'")
        if name not in self.names:
            raise SpectraError(f"the shift holds no matrix {name!r}; {_first_names(self.names)}")
        if self.matrices is None or name not in self.matrices.files:
            raise SpectraError(
                f"the matrix of the shift of {name!r} was not kept; "
                "compute the shift again with a pattern in `matrices` that names it, and save it with `matrices` too"
            )
        parts = self.matrices.read(name)
        own = parts["own"]
        inherited = parts.get("inherited")
        if part == "own":
            return own
        if inherited is None:
            return own if part == "total" else own.new_zeros(own.shape)
        return own + inherited if part == "total" else inherited

    @property
    def plot(self) -> ShiftPlots:
        """The pictures of this shift: each method returns matplotlib Axes and takes `ax=`."""
        from spectra.report.shift_plots import ShiftPlots

        return ShiftPlots(self)

    def save(self, folder: str | os.PathLike[str], matrices: str | Iterable[str] | None = None) -> Path:
        """Write the tables (`shift_*.parquet`) and `covariance_shift.json` into `folder`, each file atomically.

        The folder may be that of a saved `Comparison`: no file has the name of one of its own.

        Args:
            matrices: globs on the names of the weight matrices whose Delta is written too, k^2 x 16 bytes each; "*" for
                all. By default none is; where the shift was loaded from `folder`, those that are there. Others that
                an earlier save left there are removed.
        Returns: the folder.   Raises: SpectraError where it cannot be written.

        >>> import tempfile, torch, spectra
        >>> shift = spectra.covariance_shift({"fc.weight": torch.eye(2)}, {"fc.weight": 2 * torch.eye(2)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = spectra.CovarianceShift.load(shift.save(folder))
        >>> again.layers.equals(shift.layers)
        True
        """
        target = Path(folder)
        if matrices is None:
            matrices = "*" if self.matrices and self.matrices.is_in(target / MATRICES) else ()
        patterns = [matrices] if isinstance(matrices, str) else list(matrices)
        kept = self.matrices.files if self.matrices else {}
        chosen = [name for name in kept if any(_matches(name, pattern) for pattern in patterns)]
        with KIND.writing(target):
            files = self.matrices.copy(target / MATRICES, chosen) if self.matrices and chosen else {}
        tables = {name: getattr(self, name) for name in TABLES}
        save_tables(target, KIND, tables, {**self.provenance, "matrices": files})
        with KIND.writing(target):
            for earlier in (target / MATRICES).glob("*.safetensors"):
                if earlier.name not in files.values():
                    earlier.unlink()
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> CovarianceShift:
        """Read a saved shift. Needs neither the models nor the data that it was made from.

        Raises `SpectraError` where `folder` holds none, or one of a later format.
        """
        tables, provenance = load_tables(folder, KIND, TABLES)
        files = provenance.pop("matrices", {})
        return cls(**tables, provenance=provenance, matrices=KeptMatrices(Path(folder) / MATRICES, files))


def _matches(name: str, pattern: str) -> bool:
    """Whether a glob names a matrix; the brackets of a part (`[q]`) stand for themselves as well."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern.replace("[", "[[]"))


def _first_names(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"it holds {shown}{', ...' if len(names) > 3 else ''}" if names else "it is empty"

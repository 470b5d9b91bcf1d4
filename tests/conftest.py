"""What all tests share: one BLAS thread, no network, no display, and the real weights that packages carry."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch and numpy are imported, which read these once; processes that a test starts inherit them.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shared machine stalls at times, which says nothing about the code. The same examples are tried each time.
settings.register_profile("spectra", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("spectra")


@pytest.fixture(scope="session")
def weights_folder() -> Callable[[str], Path]:
    """The folder of an installed package of weights, found without running the package; skips where it is absent."""

    def folder(package: str) -> Path:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"the package {package}, which carries real weights, is not installed")
        return Path(spec.submodule_search_locations[0])

    return folder


@pytest.fixture(scope="session")
def rxnfp(weights_folder: Callable[[str], Path]) -> Path:
    """A real base and two real fine-tunings of it: folders `bert_pretrained`, `bert_ft_10k_25s`, `bert_ft`."""
    return weights_folder("rxnfp") / "models" / "transformers"


@pytest.fixture(autouse=True)
def _no_figures_left() -> Iterator[None]:
    """Figures that a test drew with pyplot are not the next one's."""
    yield
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")

"""The figures of the repository: each script draws from the numbers beside it, and its claims hold in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from spectra.comparison import Comparison

FIGURES = Path(__file__).resolve().parents[2] / "figures"


@pytest.mark.parametrize("script", sorted(path.name for path in FIGURES.glob("[a-z]*.py")))
def test_scripts_draw_from_their_table(script: str, tmp_path: Path) -> None:
    if not list(FIGURES.glob(f"{script.removesuffix('.py')}*.csv")) and script != "stability_profile.py":
        pytest.skip(f"the numbers of {script} take most of an hour to make (--run) and are not beside it yet")
    folder = tmp_path / "figures"
    folder.mkdir()
    for path in FIGURES.iterdir():
        if path.suffix in (".py", ".csv"):
            shutil.copy(path, folder)
    subprocess.run([sys.executable, str(folder / script)], cwd=FIGURES.parent, check=True, timeout=120)
    assert {path.suffix for path in folder.iterdir()} >= {".pdf", ".png"}
    assert f"`{script}`" in (FIGURES / "README.md").read_text(encoding="utf-8")


def test_no_script_hides_a_module_of_python() -> None:
    """A script's folder comes first on its path: figures/profile.py would break cProfile."""
    assert not {path.stem for path in FIGURES.glob("*.py")} & set(sys.stdlib_module_names)


def test_the_profile_is_that_of_the_real_pair(real: Comparison) -> None:
    table = pd.read_csv(FIGURES / "profile.csv").set_index(["tuned", "component"])
    blocks = real.layers[real.layers["layer"].notna()][["tuned", "name"]]
    rows = real.components.merge(blocks, on=["tuned", "name"])
    for tuned, component in (("10k", 0), ("10k", 200), ("ft", 128)):
        values = rows[(rows["tuned"] == tuned) & (rows["component"] == component)]
        assert len(values) == 72
        assert table.loc[(tuned, component), "stability_median"] == pytest.approx(
            values["stability"].median(), abs=1e-4
        )
        even = 256 * values["plasticity"].median()
        assert table.loc[(tuned, component), "plasticity_median"] == pytest.approx(even, rel=1e-3)

"""What `import spectra` costs, what it offers, and that the package which is installed is the one that is here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

import pytest

import spectra

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "spectra").rglob("*.py")
)
# The way from files to tables, without the pictures, the pages and the optional libraries.
CORE = [
    module
    for module in MODULES
    if module.split(".")[1:2]
    in (["checkpoints"], ["comparing"], ["comparison"], ["linalg"], ["matrices"], ["measures"], ["pairing"])
]


def in_fresh_interpreter(code: str, *arguments: str) -> str:
    """The standard output of `code`, run by an interpreter that has imported nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(code: str) -> set[str]:
    """The modules that an interpreter holds after `code`."""
    return set(in_fresh_interpreter(f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')").split())


def test_import_is_light() -> None:
    heavy = {"torch", "numpy", "scipy", "pandas", "matplotlib", "pyarrow", "peft", "transformers", "rich"}
    assert not heavy & imported("import spectra")


def test_core_rooms_import_neither_tables_nor_pictures() -> None:
    heavy = {"pandas", "matplotlib", "pyarrow", "peft", "transformers", "rich", "scipy.stats", "spectra.report"}
    names = imported("import " + ", ".join(CORE))
    assert set(CORE) <= names
    assert not heavy & names


@pytest.mark.parametrize("name", spectra.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(spectra, name) is not None
    assert name in dir(spectra)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="compair"):
        spectra.compair  # noqa: B018


def test_public_names_survive_the_import_of_every_module() -> None:
    """A module `spectra.compare`, say, would on its import take the place of the function `spectra.compare`."""
    before = {name: getattr(spectra, name) for name in spectra.__all__}
    for module in MODULES:
        import_module(module)
    assert {name: getattr(spectra, name) for name in spectra.__all__} == before


def test_compare_runs_without_the_optional_libraries(tmp_path: Path) -> None:
    code = """
import sys

class Absent:
    names = {"accelerate", "datasets", "huggingface_hub", "peft", "ray", "tokenizers", "transformers"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import safetensors.torch, torch
import spectra

torch.manual_seed(0)
base = {"layer.0.weight": torch.randn(12, 8), "layer.1.weight": torch.randn(8, 8)}
tuned = {name: weight + 0.01 * torch.randn_like(weight) for name, weight in base.items()}
torch.save(base, f"{sys.argv[1]}/base.pt")
safetensors.torch.save_file(tuned, f"{sys.argv[1]}/tuned.safetensors")
result = spectra.compare(f"{sys.argv[1]}/base.pt", f"{sys.argv[1]}/tuned.safetensors")
again = spectra.load(result.save(f"{sys.argv[1]}/out"))
print(*sorted(again.layers["name"]), *Absent.names & set(sys.modules))
"""
    assert in_fresh_interpreter(code, str(tmp_path)).split() == ["layer.0.weight", "layer.1.weight"]


def installed_version() -> str:
    try:
        return version("spectra-weights")
    except PackageNotFoundError:
        pytest.skip("spectra-weights is not installed here: `make test` installs it")


def test_version_is_that_of_the_installed_package() -> None:
    assert spectra.__version__ == installed_version()


def test_console_script_is_the_command_line() -> None:
    installed_version()
    (script,) = entry_points(group="console_scripts", name="spectra")
    assert script.value == "spectra_cli.app:main"
    assert callable(script.load())
    spec = find_spec("spectra_cli")
    assert spec is not None
    assert spec.origin == str(ROOT / "cli" / "__init__.py")


def test_wheel_holds_every_module_and_nothing_called_cli(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves folders beside the sources
    for folder in ("spectra", "cli"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("spectra_weights-*.whl")
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    cli = {Path("spectra_cli", path.relative_to(ROOT / "cli")).as_posix() for path in (ROOT / "cli").rglob("*.py")}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "spectra").rglob("*.py")}
    assert packaged == cli | library | {"spectra/definitions.md", "spectra/py.typed"}

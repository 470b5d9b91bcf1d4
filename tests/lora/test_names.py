"""What `spectra.lora` offers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import spectra.lora as lora

HEAVY = "{'torch', 'pandas', 'peft', 'transformers', 'datasets', 'matplotlib'}"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_loads_nothing() -> None:
    assert run(f"import sys, spectra.lora; print({HEAVY} & set(sys.modules))") == "set()"


def test_initialisations_need_neither_peft_nor_transformers() -> None:
    code = "import sys; from spectra.lora import *; slice_init, attach, load_adapter, merge, mean_gradients, METHODS"
    assert run(f"{code}; print({HEAVY} & set(sys.modules))") == "{'torch'}"


@pytest.mark.parametrize("name", lora.__all__)
def test_names_are_what_they_say(name: str) -> None:
    """Functions, also after the modules that hold them were imported."""
    import_module(f"spectra.lora.{lora._HOMES[name]}")
    assert name in dir(lora)
    assert callable(getattr(lora, name)) or name == "METHODS"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="atach"):
        lora.atach  # noqa: B018


def test_without_peft_the_extra_is_named() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peft":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch
from spectra import SpectraError
from spectra.lora import SliceConfig, attach, load_adapter, mean_gradients
config = SliceConfig(rank=1, start=0)
model = torch.nn.Linear(2, 2)
for call in (
    lambda: attach(model, config),
    lambda: load_adapter(model, "nowhere"),
    lambda: mean_gradients(model, [], lambda *_: None, config),
):
    try:
        call()
    except SpectraError as error:
        print(error)
"""
    lines = run(code).splitlines()
    assert len(lines) == 3
    assert all("pip install 'spectra-weights[train]'" in line for line in lines)

"""Functions of the user's own: found in the current folder, called, and refused in a sentence when they fail."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectra.errors import SpectraError
from spectra.sources.factories import build_batches, build_model, find_factory
from spectra.sources.libraries import library
from spectra.sources.weights import load_weights

Write = Callable[[str], str]
NUMBERS = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module into the current folder and gives its name, another one each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def module(code: str) -> str:
        name = f"own_module_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(code)
        return name

    yield module
    for name in [name for name in sys.modules if name.startswith("own_module_")]:
        del sys.modules[name]


def test_models_and_batches_are_built(write: Write) -> None:
    name = write("import torch\ndef build(): return torch.nn.Linear(3, 2)\nmodel = build()\n")
    assert isinstance(build_model(f"{name}:build"), nn.Linear)
    assert build_model(f"{name}:model") is build_model(f"{name}:model")


@pytest.mark.parametrize(
    "code",
    [
        "def batches(): return [1, 2]",
        "def batches():\n    yield 1\n    yield 2",  # spent after one pass, unless made anew
        "def batches(): return lambda: iter([1, 2])",
        "batches = [1, 2]",
    ],
)
def test_batches_can_be_gone_through_twice(code: str, write: Write) -> None:
    found: Any = build_batches(f"{write(code)}:batches")
    passes = [list(found() if callable(found) else found) for _ in range(2)]
    assert passes == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("code", "spec", "words"),
    [
        ("", "{name}", "write package.module:function"),
        ("", "{name}:build.it", "write package.module:function"),
        ("", "no_such_module:build", "no module 'no_such_module'.*put no_such_module.py into"),
        ("import no_such_dependency", "{name}:build", "imports 'no_such_dependency', which is not installed"),
        ("1 / 0", "{name}:build", "importing .* failed: ZeroDivisionError: division by zero"),
        ("def make(): pass", "{name}:build", r"has no 'build' \(it has make\)"),
        ("def build(): raise ValueError('no such file')", "{name}:build", "ValueError: no such file"),
        ("def build(): return 3", "{name}:build", "returned a int"),
        ("build = 3", "{name}:build", "is a int and no function"),
    ],
)
def test_what_is_wrong_with_a_factory_is_said(code: str, spec: str, words: str, write: Write) -> None:
    with pytest.raises(SpectraError, match=words) as raised:
        build_model(spec.format(name=write(code)))
    assert "\n" not in str(raised.value)


def test_a_factory_of_batches_that_returns_none_of_them_is_refused(write: Write) -> None:
    with pytest.raises(SpectraError, match="returned a dict; a factory of batches"):
        build_batches(f"{write('def batches(): return {}')}:batches")
    assert callable(find_factory(f"{write('def batches(): return {}')}:batches"))


@pytest.mark.parametrize(("module", "name"), [("transformers", "transformers"), ("PIL", "Pillow")])
def test_a_library_that_is_missing_is_named_with_its_extra(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        SpectraError, match=rf"to read things takes the package {name}.*pip install 'spectra-weights\[train\]'"
    ):
        library(module, "to read things")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "net.encoder."])
def test_weights_go_by_their_names_but_for_wrappers_and_a_prefix(prefix: str, tmp_path: Path) -> None:
    source = {name: torch.rand(value.shape) for name, value in network().state_dict().items() if value.dim()}
    save_file({f"{prefix}{name}": value for name, value in source.items()}, tmp_path / "w.safetensors")
    model = network()
    assert load_weights(model, tmp_path / "w.safetensors") == ()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in source.items())


def test_a_prefix_may_be_the_modules_own() -> None:
    wrapped = nn.ModuleDict({"net": network()})
    source = {name: torch.rand(value.shape) for name, value in network().state_dict().items() if value.dim()}
    load_weights(wrapped, source)
    assert all(torch.equal(wrapped.state_dict()[f"net.{name}"], value) for name, value in source.items())


def test_weights_that_do_not_fit_are_named_and_change_nothing() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = {name: torch.rand(value.shape) for name, value in before.items() if value.dim()}
    with pytest.raises(SpectraError, match=r"lacks 1 of the \d+ tensors of Sequential: '2\.weight'"):
        load_weights(model, {name: value for name, value in source.items() if name != "2.weight"})
    with pytest.raises(SpectraError, match=r"'0\.weight' of shape \[5, 3\], and '0\.weight' of Sequential is \[4, 3\]"):
        load_weights(model, {**source, "0.weight": torch.rand(5, 3)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert load_weights(model, {**source, "head.weight": torch.rand(5, 3)}) == (
        "state dict in memory holds 1 tensor that Sequential does not have: 'head.weight'",
    )

"""Files of tensors on a disk that is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectra.editing import Scaling, edit
from spectra.errors import SpectraError
from spectra.tensor_files import write_tensors, write_torch
from spectra.training.state import save_state


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Let the operating system refuse what goes beyond `size` bytes of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [write_tensors, write_torch])
def test_a_full_disk_is_an_error_of_the_operating_system(write: Any, tmp_path: Path) -> None:
    with no_file_above(10_000), pytest.raises(OSError):
        write({"a": torch.ones(100, 100)}, tmp_path / "file")


def test_a_full_disk_is_told_in_no_library_s_words(tmp_path: Path) -> None:
    for write, words in ((write_tensors, "File too large"), (write_torch, "the file could not be written in full")):
        with no_file_above(10_000), pytest.raises(OSError) as raised:
            write({"a": torch.ones(100, 100)}, tmp_path / "file")
        assert (raised.value.strerror or str(raised.value)) == words


def test_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    tensors = {"turned": torch.arange(6.0).reshape(2, 3).T, "half": torch.ones(3).half()}
    write_tensors(tensors, tmp_path / "file.safetensors", {"format": "pt"})
    found = load_file(tmp_path / "file.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_state_of_a_run_and_an_adapter_say_so_in_a_sentence(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with (
        no_file_above(10_000),
        pytest.raises(SpectraError, match=r"cannot save the state of the run .* free some space"),
    ):
        save_state(tmp_path, {"tensors": torch.ones(100, 100)})
    model = torch.nn.Sequential(torch.nn.Linear(400, 40))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with no_file_above(10_000), pytest.raises(SpectraError, match=r"cannot write the edited checkpoint .* free some"):
        edit(base, tmp_path / "adapter", Scaling(0.5), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]

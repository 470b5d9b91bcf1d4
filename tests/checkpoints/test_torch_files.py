"""Torch files, zip and legacy: the tensors torch reads, without reading more than is asked for."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spectra.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from spectra.checkpoints.safe_pickle import require_safe_torch

BOTH = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])


def saved(path: Path, content: Any, is_zip: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


def assert_same(checkpoint: Checkpoint, expected: dict[str, Tensor]) -> None:
    assert list(checkpoint) == list(expected)
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].dtype == checkpoint[name].dtype == tensor.dtype
        assert torch.equal(checkpoint[name], tensor), name


@BOTH
@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ""])
def test_a_state_dict_comes_back_whatever_its_ending(
    tmp_path: Path, state: dict[str, Tensor], is_zip: bool, ending: str
) -> None:
    assert_same(open_checkpoint(saved(tmp_path / f"model{ending}", state, is_zip)), state)


@BOTH
def test_the_state_dict_of_a_module_comes_back(tmp_path: Path, is_zip: bool) -> None:
    # An OrderedDict with _metadata, and parameters where keep_vars is set.
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    path = saved(tmp_path / "model.pt", module.state_dict(keep_vars=True), is_zip)
    assert_same(open_checkpoint(path), module.state_dict())


def test_dtypes_without_a_storage_class_of_their_own_come_back(tmp_path: Path) -> None:
    dtypes = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.complex64]
    state = {str(dtype): torch.arange(6).to(dtype) for dtype in dtypes}
    checkpoint = open_checkpoint(saved(tmp_path / "model.pt", state, True))
    for name, tensor in state.items():
        assert checkpoint[name].dtype == tensor.dtype
        assert torch.equal(checkpoint[name].view(torch.uint8), tensor.view(torch.uint8))


@BOTH
def test_views_read_their_own_part(tmp_path: Path, is_zip: bool) -> None:
    whole = torch.arange(10_000.0).reshape(100, 100)
    state = {"slice": whole[7, 3:7], "column": whole[:, 5], "block": whole[10:20, 30:40], "transposed": whole.T}
    checkpoint = open_checkpoint(saved(tmp_path / "views.pt", state, is_zip))
    assert_same(checkpoint, state)
    assert checkpoint["slice"].untyped_storage().nbytes() == 16
    assert checkpoint["column"].untyped_storage().nbytes() == 400


@BOTH
def test_tied_tensors_are_listed_once(tmp_path: Path, is_zip: bool) -> None:
    embedding = torch.randn(5, 3)
    state = {"wte.weight": embedding, "lm_head.weight": embedding, "rows": embedding[:3], "copy": embedding.clone()}
    checkpoint = open_checkpoint(saved(tmp_path / "tied.pt", state, is_zip))
    assert list(checkpoint) == ["wte.weight", "rows", "copy"]
    assert checkpoint.tied == {"lm_head.weight": "wte.weight"}


def test_empty_tensors_are_not_tied(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "e.pt", {"a": torch.empty(0, 3), "b": torch.empty(0, 3)}, True))
    assert list(checkpoint) == ["a", "b"] and checkpoint["b"].shape == (0, 3)


@BOTH
@pytest.mark.parametrize(
    ("nest", "note"),
    [
        (lambda sd: {"state_dict": sd, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "'state_"),
        (lambda sd: {"model": sd, "ema": {"weight": torch.zeros(1)}}, "took 'model' of 'model', 'ema'"),
        (lambda sd: {"teacher": {"weight": torch.zeros(1)}, "student": sd}, "took 'student' of 'teacher', 'student'"),
        (lambda sd: {"model_ema": sd, "optim": {"a": torch.ones(1)}}, "took 'model_ema'"),
        (lambda sd: {"state_dict": {"model": sd}}, "took 'model' of 'model'"),
        (lambda sd: {"weights_of_mine": sd, "lr_schedulers": [{"a": 1}]}, "took 'weights_of_mine'"),
        (
            lambda sd: {"pytorch-lightning_version": "2.0", "state_dict": sd, "loops": {}, "callbacks": {}},
            "took 'state_",
        ),
        (lambda sd: {"module": sd, "step": torch.tensor(5)}, "took 'module' of 'module', 'step'"),
        (lambda sd: {**sd, "comment": "mine"}, "'comment' left out"),
    ],
)
def test_the_weights_are_found_and_the_choice_is_said(
    tmp_path: Path, state: dict[str, Tensor], is_zip: bool, nest: Any, note: str
) -> None:
    checkpoint = open_checkpoint(saved(tmp_path / "nested.ckpt", nest(state), is_zip))
    assert_same(checkpoint, state)
    assert any(note in said for said in checkpoint.notes), checkpoint.notes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"generator": {"w": torch.ones(1)}, "critic": {"w": torch.ones(1)}}, "several dicts .*'generator', 'critic'"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "holds 'epoch', 'args' and no weights"),
        ({}, "is empty"),
        (torch.ones(3), "holds a Tensor and no dict"),
        ([torch.ones(3)], "holds a list and no dict"),
        ({"a": {"b": {"c": {"d": {"e": {"w": torch.ones(1)}}}}}}, "no weights"),
    ],
)
def test_an_object_without_weights_is_named(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(saved(tmp_path / "odd.pt", content, True))


@BOTH
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"model": torch.ones(1), "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        ({"model": torch.ones(1), "path": Path("x")}, "pathlib."),
        ({"model": torch.ones(1), "error": ValueError("x")}, "ValueError"),
    ],
)
def test_objects_beside_the_weights_are_refused_by_type(tmp_path: Path, content: Any, named: str, is_zip: bool) -> None:
    path = saved(tmp_path / "object.pt", content, is_zip)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert named in str(caught.value) and str(path) in str(caught.value) and "state_dict()" in str(caught.value)


@BOTH
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.eye(3).to_sparse(), "holds sparse tensors, .* save tensor.to_dense()"),
        (lambda: torch.eye(3).to_sparse_csr(), "holds sparse tensors, "),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "holds nested tensors, .* tensor.unbind()",
        ),
    ],
    ids=["coo", "csr", "nested"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_tensors_that_are_not_dense_are_called_what_they_are(
    tmp_path: Path, make: Callable[[], Tensor], said: str, is_zip: bool
) -> None:
    path = saved(tmp_path / "sparse.pt", {"fine": torch.ones(2), "odd": make()}, is_zip)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and "code" not in str(caught.value)


def test_code_beside_a_sparse_tensor_is_named_first(tmp_path: Path) -> None:
    path = saved(tmp_path / "both.pt", {"odd": torch.eye(3).to_sparse(), "args": argparse.Namespace(lr=1)}, True)
    with pytest.raises(CheckpointError, match=r"holds 'argparse\.Namespace', which is code"):
        open_checkpoint(path)


def test_a_recursive_dict_ends(tmp_path: Path, state: dict[str, Tensor]) -> None:
    content: dict[str, Any] = {"state_dict": state}
    content["self"] = content
    assert_same(open_checkpoint(saved(tmp_path / "ring.pt", content, True)), state)


@BOTH
def test_an_expanded_tensor_is_refused_and_the_rest_is_usable(tmp_path: Path, is_zip: bool) -> None:
    state = {"huge": torch.zeros(1).expand(10**6, 10**6), "fine": torch.ones(2, 2)}
    checkpoint = open_checkpoint(saved(tmp_path / "expanded.pt", state, is_zip))
    assert list(checkpoint) == ["fine"] and "repeats 4 bytes into 1000000000000 elements" in checkpoint.refused["huge"]


def test_a_tensor_without_data_is_refused(tmp_path: Path) -> None:
    state = {"meta": torch.empty(3, 3, device="meta"), "fine": torch.ones(2)}
    checkpoint = open_checkpoint(saved(tmp_path / "meta.pt", state, True))
    assert list(checkpoint) == ["fine"] and "meta" in checkpoint.refused


@pytest.mark.parametrize(
    ("version", "is_safe"),
    [("2.9.1", False), ("1.13.1+cu117", False), ("2.10.0", True), ("2.13.0+cpu", True), ("3.0.0a0", True)],
)
def test_only_a_torch_that_loads_safely_is_used(version: str, is_safe: bool) -> None:
    if is_safe:
        require_safe_torch("model.pt", version)
    else:
        with pytest.raises(CheckpointError, match=r"model\.pt .*torch 2\.10 or later"):
            require_safe_torch("model.pt", version)


@BOTH
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, is_zip: bool) -> None:
    path = saved(tmp_path / "cut.pt", {"weight": torch.ones(8, 8), "bias": torch.ones(8)}, is_zip)
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def flip(path: Path, record: str, position: int) -> None:
    """Change one bit of one byte of a record's data."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(record)
    content = bytearray(path.read_bytes())
    names = int.from_bytes(content[info.header_offset + 26 :][:2], "little")
    extra = int.from_bytes(content[info.header_offset + 28 :][:2], "little")
    content[info.header_offset + 30 + names + extra + position] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("position", [0, 12_345, 39_999])
def test_a_flipped_byte_of_a_tensor_is_found_when_it_is_read(tmp_path: Path, position: int) -> None:
    # A transposed matrix reads its whole record too.
    path = saved(tmp_path / "flipped.pt", {"fine": torch.ones(9), "bad": torch.ones(100, 100).T}, True)
    flip(path, "flipped/data/1", position)
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint["fine"], torch.ones(9))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"tensor 'bad' of .*flipped\.pt is damaged: .*; download or save it"):
            checkpoint["bad"]


def test_a_large_part_of_a_damaged_record_is_refused_and_a_small_one_is_not_checked(tmp_path: Path) -> None:
    # 6 MB, more than is read at once, and the damage in the last third lies outside the parts.
    whole = torch.zeros(1_500_000)
    state = {"third": whole[:500_000], "fifth": whole[:300_000], "other third": whole[500_000:1_000_000]}
    path = saved(tmp_path / "parts.pt", state, True)
    assert_same(open_checkpoint(path), state)
    flip(path, "parts/data/0", 5_900_000)
    checkpoint = open_checkpoint(path)
    for name in ("third", "other third", "third"):
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint[name]
    assert torch.equal(checkpoint["fifth"], state["fifth"])


def test_a_flipped_byte_of_the_pickle_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path / "names.pt", {"weight": torch.ones(3)}, True)
    with zipfile.ZipFile(path) as archive:
        position = archive.read("names/data.pkl").index(b"weight")
    flip(path, "names/data.pkl", position)  # "weight" has become "veight"
    with pytest.raises(CheckpointError, match="its pickle does not fit the checksum"):
        open_checkpoint(path)


def test_a_file_without_checksums_is_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "unchecked.pt", {**state, "part": state["encoder.0.weight"][1:]}, True)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(open_checkpoint(path), {**state, "part": state["encoder.0.weight"][1:]})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    folder = tmp_path_factory.mktemp("originals")
    state = {"weight": torch.ones(4, 4), "part": torch.arange(9.0)[2:5]}
    return {is_zip: saved(folder / "o.pt", state, is_zip).read_bytes() for is_zip in (True, False)}


@BOTH
@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_open_or_are_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory,
    originals: dict[bool, bytes],
    is_zip: bool,
    changes: list[tuple[int, int]],
) -> None:
    content = bytearray(originals[is_zip])
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "mutated.pt"
    path.write_bytes(bytes(content))
    try:
        checkpoint = open_checkpoint(path)
        loaded = [checkpoint[name] for name in checkpoint]
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        assert sum(tensor.numel() for tensor in loaded) <= len(content)

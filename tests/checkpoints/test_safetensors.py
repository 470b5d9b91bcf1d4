"""Safetensors files: what we read is what the format's own library reads, and what it refuses we refuse."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.checkpoints import CheckpointError, open_checkpoint
from spectra.checkpoints.safetensors_file import open_safetensors_file

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def write(path: Path, header: Any, data: bytes) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    tensors = {str(dtype): (torch.arange(12).reshape(3, 4) % 2).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "cube": torch.randn(2, 3, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "every.safetensors")
    checkpoint = open_checkpoint(tmp_path / "every.safetensors")
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert same_bits(checkpoint[name], tensor), name


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, "'b' .*overlaps"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, 20, "'b' .*leaves a hole"),
        ({"a": entry("F32", [2], 4, 12)}, 12, "'a' .*leaves a hole"),
        ({"a": entry("F32", [2], 0, 8)}, 4, "'a' .*holds 4"),
        ({"a": entry("F32", [3], 0, 8)}, 8, "'a' .*do not fill its 8 bytes"),
        ({"a": entry("F32", [2], 8, 0)}, 8, "'a' .*do not fill"),
        ({"a": entry("F32", [-2], 0, 8)}, 8, "'a' .*impossible shape"),
        ({"a": entry("F32", [1 << 62, 1 << 62, 0], 0, 0)}, 0, "'a' .*impossible shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "'a' .*impossible shape"),
        ({"a": entry("F33", [2], 0, 8)}, 8, "'a' .*unknown dtype 'F33'"),
        ({"a": entry("F32", [2], 0, 8)}, 9, "1 bytes after its last tensor"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' .*not described"),
        ({"a": 3}, 8, "'a' .*not described"),
        ({"__metadata__": {"a": 1}}, 0, "`__metadata__`"),
        (b'{"a": NaN}', 0, "NaN is no JSON"),
        (b'{"a": 1, "a": 1}', 0, "'a' appears twice"),
        (b'{"\\ud800": 1}', 0, "damaged header"),
        (b'{"a": ', 0, "damaged header"),
        (b"{" + b'"a":[' * 50_000, 0, "damaged header"),
        (b"[]", 0, "no JSON object"),
        (b"\xff\xfe{}", 0, "damaged header"),
    ],
)
def test_a_damaged_header_is_refused_in_words(tmp_path: Path, header: Any, data: int, reason: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path)
    assert "bad.safetensors" in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    whole = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_a_name_cannot_reach_the_terminal(tmp_path: Path) -> None:
    path = write(tmp_path / "rude.safetensors", {"a\x1b[31m\0": entry("F32", [3], 0, 8)}, bytes(8))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable() and r"a\x1b[31m\x00" in str(caught.value)


def test_a_rude_name_is_kept_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "rude.safetensors", {"../a\x1b[31m": entry("F32", [2], 0, 8)}, bytes(8))
    assert list(open_checkpoint(path)) == ["../a\x1b[31m"]


def test_elements_below_a_byte_are_refused_one_by_one(tmp_path: Path) -> None:
    header = {"packed": entry("F4", [4], 0, 2), "plain": entry("F32", [2], 2, 10)}
    checkpoint = open_checkpoint(write(tmp_path / "four.safetensors", header, bytes(10)))
    assert list(checkpoint) == ["plain"] and "F4" in checkpoint.refused["packed"]


def test_a_file_that_changes_after_opening_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "moving.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    checkpoint = open_checkpoint(path)
    safetensors.torch.save_file({"a": torch.zeros(8)}, path)
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        checkpoint["a"]


ORIGINAL = safetensors.torch.save(
    {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16), "c": torch.empty(0)}
)
HEADER_BYTES = 8 + int.from_bytes(ORIGINAL[:8], "little")


def same_as_the_library_or_refused(content: bytes) -> bool:
    """Whether the file opens; asserts that what opens is what the library reads, and that nothing else is raised."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.safetensors"
        path.write_bytes(content)
        try:
            checkpoint = open_safetensors_file(path)
        except CheckpointError as error:
            assert str(error).isprintable()
            return False
        expected = safetensors.torch.load(content)
        assert set(checkpoint) == set(expected)
        for name, tensor in expected.items():
            assert same_bits(checkpoint[name], tensor)
        return True


def test_the_unmutated_file_opens() -> None:
    assert same_as_the_library_or_refused(ORIGINAL)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes_read_as_the_library_reads_them_or_are_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(ORIGINAL)
    for position, value in changes:
        content[position] = value
    same_as_the_library_or_refused(bytes(content))


numbers = st.integers(-1, 12) | st.sampled_from([1.0, 2**31, 2**63, 2**64, True, None, "4"])
described = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "I8", "U16", "F64", "BF16", "BOOL", "F8_E4M3", "f32", "F128", ""]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3) | st.sampled_from([[0, 4], [0, 8], [4, 12], [8, 16]]),
    },
    optional={"more": numbers},
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=3), described, max_size=3), st.integers(0, 16), st.text(" \n\0", max_size=2))
def test_invented_headers_read_as_the_library_reads_them_or_are_refused(
    header: dict[str, Any], data: int, padding: str
) -> None:
    encoded = (json.dumps(header) + padding).encode()
    same_as_the_library_or_refused(len(encoded).to_bytes(8, "little") + encoded + bytes(range(data)))

"""A part of a stored tensor is that slice of the whole, and costs the reading of its own bytes only."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectra.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from spectra.checkpoints.checkpoint import Entry, Index, TensorInfo

IO = Path("/proc/self/io")
KINDS = ("safetensors", "zip", "legacy", "memory")
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
)


def bytes_read() -> int:
    return int(next(line for line in IO.read_text().splitlines() if line.startswith("rchar")).split()[1])


counts_bytes = pytest.mark.skipif(not IO.exists(), reason="bytes read are counted in /proc/self/io")


def stored(path: Path, kind: str, state: dict[str, Tensor]) -> Checkpoint:
    """The tensors opened again from a file of that kind; views stay views in torch files and in memory."""
    if kind == "memory":
        return open_checkpoint(state)
    if kind == "safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return open_checkpoint(path)


def numbered(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor whose elements differ, as far as the dtype can tell them apart."""
    count = prod(shape)
    if dtype.itemsize == 1 and dtype is not torch.bool:
        return (torch.arange(count) % 251).to(torch.uint8).view(dtype).reshape(shape)
    return (torch.arange(count) % (2 if dtype is torch.bool else 2**15)).to(dtype).reshape(shape)


def bits(tensor: Tensor) -> list[int]:
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return dense.view(torch.uint8).tolist()  # type: ignore[no-any-return]


@st.composite
def parts(draw: st.DrawFn) -> tuple[Tensor, Index]:
    """A tensor, which may be a view with an offset, gaps and turned dimensions, and an index into it."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tensor = numbered(draw(st.sampled_from(DTYPES)), *shape)
    for dimension, size in enumerate(shape):
        if draw(st.booleans()):
            tensor = tensor.narrow(dimension, first := draw(st.integers(0, size - 1)), size - first)
    tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
    index: list[int | slice] = []
    for size in tensor.shape[: draw(st.integers(0, tensor.ndim))]:
        if draw(st.booleans()):
            index.append(draw(st.integers(-size, size - 1)))
        else:
            bound = st.none() | st.integers(-size - 1, size + 1)
            index.append(slice(draw(bound), draw(bound), draw(st.sampled_from([None, 1, 2]))))
    return tensor, tuple(index)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80)
@given(part=parts())
def test_a_part_is_that_slice_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, kind: str, part: tuple[Tensor, Index]
) -> None:
    tensor, index = part
    checkpoint = stored(tmp_path_factory.getbasetemp() / f"part-{kind}", kind, {"before": torch.ones(3), "w": tensor})
    found, expected = checkpoint.part("w", index), tensor[index]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bits(found) == bits(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [(3,), (-4,), (0, 0, 0, 0), (slice(None), 9)], ids=str)
def test_an_index_outside_the_tensor_is_an_error(tmp_path: Path, kind: str, index: Index) -> None:
    with pytest.raises(IndexError):
        stored(tmp_path / "small", kind, {"w": torch.ones(3, 4, 5)}).part("w", index)


def test_a_part_in_memory_is_a_view() -> None:
    tensor = torch.randn(4, 6, 5)
    part = open_checkpoint({"w": tensor}).part("w", (2, slice(1, 4)))
    assert part.data_ptr() == tensor[2, 1:4].data_ptr()


def test_an_entry_that_can_only_load_the_whole_gives_parts_of_it() -> None:
    tensor = torch.randn(4, 6)
    checkpoint = Checkpoint("made", {"w": Entry(TensorInfo("w", (4, 6), tensor.dtype), tensor.clone)})
    assert torch.equal(checkpoint.part("w", (slice(1, 3),)), tensor[1:3])


@counts_bytes
@pytest.mark.parametrize("kind", ["safetensors", "legacy"])
def test_a_part_of_a_stack_reads_its_own_bytes(tmp_path: Path, kind: str) -> None:
    checkpoint = stored(tmp_path / "stack", kind, {"w": numbered(torch.bfloat16, 64, 128, 256)})
    one = 128 * 256 * 2
    for index, cost in (((17,), one), ((17, slice(32, 64)), one // 4), ((slice(3, 5),), 2 * one)):
        checkpoint.part("w", index)  # imports are done
        before = bytes_read()
        checkpoint.part("w", index)
        assert cost <= bytes_read() - before < cost + 2000


@counts_bytes
def test_the_parts_of_a_record_with_a_checksum_check_it_once_between_them(tmp_path: Path) -> None:
    stack = numbered(torch.bfloat16, 64, 128, 256)
    whole = stack.numel() * 2
    checkpoint = stored(tmp_path / "stack.pt", "zip", {"w": stack})
    before = bytes_read()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda expert: checkpoint.part("w", (expert,)), range(64)))
    assert bytes_read() - before < 2 * whole + 200_000  # once for the check, and once for the parts
    assert torch.equal(torch.stack(found), stack)


def test_every_part_of_a_damaged_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt"
    stack = torch.full((16, 64, 64), 1.5)
    checkpoint = stored(path, "zip", {"w": stack})
    content = path.read_bytes()
    at = content.index(stack[:1].numpy().tobytes()) + 9 * 64 * 64 * 4  # in the tenth of sixteen
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    checkpoint = open_checkpoint(path)
    for expert in (0, 9, 0):
        with pytest.raises(CheckpointError, match=r"tensor 'w' of .* is damaged"):
            checkpoint.part("w", (expert,))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_part_with_gaps_does_not_keep_them_in_memory(tmp_path: Path, kind: str) -> None:
    part = stored(tmp_path / "wide", kind, {"w": torch.randn(50, 300)}).part("w", (slice(None), slice(100, 200)))
    assert part.untyped_storage().nbytes() == 50 * 100 * 4

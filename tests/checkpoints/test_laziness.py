"""Opening reads headers, loading reads one tensor, and the fingerprint reads everything once."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from spectra.checkpoints import fingerprint, open_checkpoint

IO = Path("/proc/self/io")


def bytes_read() -> int:
    return int(next(line for line in IO.read_text().splitlines() if line.startswith("rchar")).split()[1])


def write_large(path: Path, kind: str) -> None:
    state = {f"block.{i}.weight": torch.full((5000, 1000), float(i)) for i in range(10)}
    state |= {"small": torch.arange(6.0), "view": state["block.3.weight"][100, 10:20]}
    if kind == "safetensors":
        safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.skipif(not IO.exists(), reason="bytes read are counted in /proc/self/io")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_one_tensor_of_200_megabytes_reads_itself_only(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "large"
    write_large(path, kind)
    assert path.stat().st_size > 200_000_000
    open_checkpoint(path)  # imports are done
    before = bytes_read()
    checkpoint = open_checkpoint(path)
    small, view = checkpoint["small"], checkpoint["view"]
    assert bytes_read() - before < 300_000
    assert small.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and view.tolist() == [3.0] * 10
    before = bytes_read()
    assert float(checkpoint["block.9.weight"][4999, 999]) == 9.0
    assert bytes_read() - before < 20_100_000


@pytest.mark.parametrize("is_zip", [True, False])
def test_threads_may_read_at_once(tmp_path: Path, is_zip: bool) -> None:
    state = {f"w{i}": torch.full((100, 100), float(i)) for i in range(32)}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=is_zip)
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(checkpoint.__getitem__, list(checkpoint) * 4))
    assert all(torch.equal(tensor, state[name]) for tensor, name in zip(loaded, list(checkpoint) * 4, strict=True))


def test_the_fingerprint_of_a_file_is_its_sha256(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "m.pt"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print_ = fingerprint(open_checkpoint(path))
    assert print_ == {
        "source": str(path),
        "bytes": path.stat().st_size,
        "sha256": digest,
        "files": {str(path): digest},
    }


def test_the_fingerprint_in_memory_changes_with_content_name_and_dtype_only(state: dict[str, Tensor]) -> None:
    def digest(tensors: dict[str, Tensor]) -> str:
        result = fingerprint(open_checkpoint(tensors))
        assert result["bytes"] == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        return str(result["sha256"])

    original = digest(state)
    assert digest(dict(reversed(list(state.items())))) == original
    assert digest({name: tensor.clone() for name, tensor in state.items()}) == original
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["head.weight"][0, 0] += 1e-9
    assert digest(changed) != original
    assert digest({**state, "scale": state["scale"].to(torch.float32)}) != original
    assert digest({f"x.{name}": tensor for name, tensor in state.items()}) != original


def test_the_fingerprint_of_a_single_element_with_a_stride(state: dict[str, Tensor]) -> None:
    strided = torch.arange(4.0)[::2][:1]
    digests = {fingerprint(open_checkpoint({**state, "one": one}))["sha256"] for one in (strided, torch.zeros(1))}
    assert strided.stride() == (2,) and len(digests) == 1

"""Files that want to run code or to fill the memory. Each would succeed with a loader that trusts it."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pkl", "")


class Call:
    """Pickles as a call of `function`, made when the pickle is loaded."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


class Storage:
    """Pickles as a reference to a storage of `elements` float32 numbers."""

    def __init__(self, elements: int, key: str = "0") -> None:
        self.claim = ("storage", torch.FloatStorage, key, "cpu", elements)


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, protocol: int, is_legacy: bool) -> None:
        super().__init__(stream, protocol)
        self.is_legacy = is_legacy

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            return (*obj.claim, None) if self.is_legacy else obj.claim
        return None


def pickled(content: Any, protocol: int = 2, is_legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol, is_legacy).dump(content)
    return stream.getvalue()


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], storage: Storage, first: int = 0) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, first, shape, stride, False, OrderedDict())


def write_zip(path: Path, pickle_bytes: bytes, data: bytes = bytes(16), compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("m/data.pkl", pickle_bytes)
        archive.writestr("m/byteorder", "little")
        archive.writestr("m/data/0", data)
        archive.writestr("m/version", "3\n")
    return path


def write_legacy(path: Path, content: Any, keys: Any = ("0",), data: bytes = bytes(16)) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    parts = [pickled(part) for part in head] + [pickled(content, is_legacy=True), pickled(list(keys))]
    path.write_bytes(b"".join(parts) + (len(data) // 4).to_bytes(8, "little") + data)
    return path


def write_safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def write_all(folder: Path, canary: Path) -> dict[str, Path]:
    """Every hostile file by what it does; the code in them writes `canary`."""
    code = Call(os.system, f"echo ran > '{canary}'")
    more_code = Call(exec, f"open({str(canary)!r}, 'w').write('ran')")
    files: dict[str, Path] = {}
    for ending in ENDINGS:
        files[f"code, zip{ending}"] = write_zip(folder / f"zip{ending}", pickled({"w": code}))
        files[f"code, legacy{ending}"] = write_legacy(folder / f"legacy{ending}", {"w": code})
        plain = folder / f"plain{ending}"
        plain.write_bytes(pickle.dumps({"w": more_code}, protocol=4))
        files[f"code, plain{ending}"] = plain
    files["code, exec in zip"] = write_zip(folder / "exec.pt", pickled({"w": more_code}))
    files["code, newer pickle in zip"] = write_zip(folder / "four.pt", pickled({"w": code}, protocol=4))
    # The first pickles of a legacy file are loaded before the one with the weights.
    head = folder / "head.pt"
    head.write_bytes(pickled(0x1950A86A20F9469CFC6C) + pickled(code))
    files["code, head of legacy"] = head
    files["code, keys of legacy"] = write_legacy(folder / "keys.pt", {"w": tensor((4,), (1,), Storage(4))}, [code])

    large = 10**12
    files["4 TB storage, zip"] = write_zip(
        folder / "tb.pt", pickled({"w": tensor((10**6, 10**6), (10**6, 1), Storage(large))})
    )
    files["4 TB storage, legacy"] = write_legacy(
        folder / "tbl.pt", {"w": tensor((10**6, 10**6), (10**6, 1), Storage(large))}
    )
    files["4 TB tensor, zip"] = write_zip(
        folder / "tt.pt", pickled({"w": tensor((10**6, 10**6), (10**6, 1), Storage(4))})
    )
    files["4 TB tensor, legacy"] = write_legacy(
        folder / "ttl.pt", {"w": tensor((10**6, 10**6), (10**6, 1), Storage(4))}
    )
    files["past its storage"] = write_zip(folder / "past.pt", pickled({"w": tensor((4,), (1,), Storage(4), first=2)}))
    files["4 TB view, zip"] = write_zip(folder / "view.pt", pickled({"w": tensor((10**6, 10**6), (0, 0), Storage(4))}))
    files["storage of another record"] = write_zip(
        folder / "key.pt", pickled({"w": tensor((4,), (1,), Storage(4, "../byteorder"))})
    )
    files["negative elements"] = write_zip(folder / "neg.pt", pickled({"w": tensor((4,), (1,), Storage(-4))}))
    files["bytearray of 8 GB"] = write_zip(folder / "array.pt", pickled({"w": Call(bytearray, 1 << 33)}))
    files["tensor class called"] = write_zip(folder / "class.pt", pickled({"w": Call(torch.Tensor, 10**6, 10**6)}))
    files["fifteen million sets"] = write_zip(folder / "sets.pt", b"\x80\x02" + b"\x8f" * (15 << 20) + b".")
    files["fifteen million sets, legacy"] = folder / "sets_legacy.pt"
    files["fifteen million sets, legacy"].write_bytes(
        pickled(0x1950A86A20F9469CFC6C) + b"\x80\x02" + b"\x8f" * (15 << 20) + b"."
    )
    files["pickle without end"] = write_zip(folder / "endless.pt", b"\x80\x02" + b"]" * 1000)
    files["inflating zip"] = write_zip(
        folder / "bomb.pt",
        pickled({"w": tensor((50 << 18,), (1,), Storage(50 << 18))}),
        bytes(50 << 20),
        zipfile.ZIP_DEFLATED,
    )
    files["inflating pickle"] = write_zip(
        folder / "bomb2.pt", pickled({"w": "a" * (200 << 20)}), compression=zipfile.ZIP_DEFLATED
    )

    files["header of 4 EB"] = folder / "eb.safetensors"
    files["header of 4 EB"].write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    many = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    files["a million tensors"] = write_safetensors(folder / "many.safetensors", f"{{{many}}}".encode())
    files["deep header"] = write_safetensors(folder / "deep.safetensors", b'{"a":' + b"[" * 1_000_000)
    claim = {"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    files["4 TB tensor, safetensors"] = write_safetensors(
        folder / "t.safetensors", json.dumps(claim).encode(), bytes(16)
    )

    distributed = folder / "distributed"
    distributed.mkdir()
    (distributed / ".metadata").write_bytes(pickle.dumps(code))
    (distributed / "__0_0.distcp").write_bytes(b"")
    files["code, distributed"] = distributed
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    write_zip(adapter / "adapter_model.bin", pickled({"w": code}))
    files["code, adapter"] = adapter
    for number, name in enumerate(["../zip.pt", str(folder / "zip.pt"), "a/../../zip.pt", "..\\zip.pt", "C:\\zip.pt"]):
        index = folder / f"index{number}"
        index.mkdir()
        (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        files[f"index to {name}"] = index
    return files

"""Formats that are not read are refused by their names, with what to do instead."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from spectra.checkpoints import CheckpointError, open_checkpoint


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def _zip_of(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return write


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("m.gguf", _bytes(b"GGUF\3\0\0\0" + bytes(64)), "GGUF"),
    ("m.bin", _bytes(b"GGUF\3\0\0\0" + bytes(64)), "GGUF"),
    ("m.bin", _bytes(b"lmgg" + bytes(64)), "GGML"),
    ("m.h5", _bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), "HDF5"),
    ("m.keras", _zip_of("config.json", "metadata.json", "model.weights.h5"), "Keras"),
    ("m.zip", _zip_of("config.json", "metadata.json", "model.weights.h5"), "Keras"),
    ("flax_model.msgpack", _bytes(b"\x81\xa6params\x80"), "Flax"),
    ("m.ckpt.index", _bytes(b"\0\0\6index" + bytes(64)), "TensorFlow"),
    ("saved_model.pb", _bytes(b"\x08\x01\x12\x00"), "TensorFlow"),
    ("m.onnx", _bytes(b"\x08\x07\x12\x07pytorch"), "ONNX"),
    ("m.tflite", _bytes(b"\x1c\0\0\0TFL3" + bytes(64)), "TensorFlow Lite"),
    ("model.bin", _bytes(b"\6\0\0\0\x0c\0WhisperSpec\0" + bytes(64)), "CTranslate2"),
    ("m.npy", lambda path: np.save(path, np.ones(3)), "NumPy array"),
    ("weights.npz", lambda path: np.savez(path, a=np.ones(3)), "npz"),
    ("weights.pt", _zip_of("a.npy", "b.npy"), "npz"),
    ("__0_0.distcp", _bytes(b"PK"), "distributed"),
    ("zero_pp_rank_0_mp_rank_00_optim_states.pt", lambda path: torch.save({}, path), "DeepSpeed ZeRO"),
    ("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", lambda path: torch.save({}, path), "DeepSpeed ZeRO"),
    ("m.pkl", lambda path: path.write_bytes(pickle.dumps({"w": 1})), "plain pickle"),
    ("m.pt", lambda path: path.write_bytes(pickle.dumps({"w": 1}, protocol=2)), "plain pickle"),
    ("m.pt", lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), "TorchScript"),
    ("m.pt2", _zip_of("m/archive_format", "m/models/model.json"), "exported program"),
    ("legacy.pt", _tar, "tar archive"),
    ("m.pt.gz", _bytes(b"\x1f\x8b\x08" + bytes(64)), "compressed"),
    ("m.bin", _bytes(b"  <html><body>404"), "web page"),
    ("m.bin", _bytes(b'{"error":"Repository not found"}'), "web page"),
    ("m.bin", _bytes(b"version https://git-lfs/spec\noid sha256:0\nsize 9\n"), "git lfs pull"),
    ("m.bin", _bytes(bytes(4096)), "unfinished download"),
    ("m.zip", _zip_of("readme.txt"), "without a torch pickle"),
    (
        "m.wparam",
        _bytes(np.random.default_rng(0).standard_normal(64).astype("<f4").tobytes()),
        "no format that is known",
    ),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("name", "write", "said"), FILES, ids=[f"{said}: {name}" for name, _, said in FILES])
def test_a_foreign_file_is_named(tmp_path: Path, name: str, write: Callable[[Path], object], said: str) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and ";" in str(caught.value)


# A relative clause behind a relative clause, or one about what the file is not, cannot be read.
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "m.pkl",
            pickle.dumps({"w": 1}),
            "a plain pickle, which can run any code when it is loaded and therefore is not read; where it was made,",
        ),
        (
            "m.bin",
            b"version https://git-lfs/spec\noid sha256:0\nsize 9\n",
            "a Git LFS pointer, which stands in the place of the weights; fetch them with `git lfs pull`",
        ),
        (
            "m.bin",
            b"<html><body>404",
            "a web page or error message, which was saved in the place of the weights; download the file again",
        ),
        ("m.gguf", b"GGUF" + bytes(64), "a GGUF file, which is not supported; convert it to safetensors"),
    ],
    ids=["pickle", "lfs", "web page", "gguf"],
)
def test_the_sentence_says_why_a_file_is_not_read(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name} is {said}")
    assert str(caught.value).count("which") == 1


FOLDERS = [
    ((".metadata", "__0_0.distcp"), "distributed checkpoint"),
    (("zero_pp_rank_0_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"), "ZeRO"),
    (("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"), "Megatron"),
    (("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"), "tensor-parallel"),
    (("consolidated.00.pth", "consolidated.01.pth", "params.json"), "2 tensor-parallel slices"),
    (("_METADATA", "d/0"), "Orbax"),
    (("saved_model.pb", "variables/variables.index"), "SavedModel"),
    (("config.json", "tf_model.h5"), "'tf_model.h5' is an HDF5 file"),
]


@pytest.mark.parametrize(("names", "said"), FOLDERS, ids=[said for _, said in FOLDERS])
def test_a_foreign_folder_is_named(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path)


def test_one_slice_of_several_is_refused_and_one_alone_is_read(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.ones(2, 2)}, tmp_path / f"consolidated.{rank:02}.pth")
    with pytest.raises(CheckpointError, match="one of a set of 2 tensor-parallel slices"):
        open_checkpoint(tmp_path / "consolidated.00.pth")
    (tmp_path / "consolidated.01.pth").unlink()
    assert list(open_checkpoint(tmp_path / "consolidated.00.pth")) == ["w"]
    assert list(open_checkpoint(tmp_path)) == ["w"]


def test_a_deepspeed_file_of_one_rank_is_read(tmp_path: Path) -> None:
    torch.save({"module": {"w": torch.ones(2, 2)}, "optimizer": None}, tmp_path / "mp_rank_00_model_states.pt")
    assert list(open_checkpoint(tmp_path)) == ["w"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_down_blocks_0_attn.lora_down.weight", "kohya"),
        ("lora_te1_text_model_0.alpha", "kohya"),
        ("unet.up.0.processor.to_q_lora.down.weight", "kohya or diffusers"),
        ("lora_unet_a.hada_w1_a", "kohya"),
        ("layers.0.q_proj.lora_A.weight", "without the adapter_config.json"),
        ("layers.0.q_proj.lora_A.default.weight", "without the adapter_config.json"),
        ("_fsdp_wrapped_module._flat_param", "FSDP"),
    ],
)
def test_foreign_keys_are_named(tmp_path: Path, name: str, said: str) -> None:
    safetensors.torch.save_file({name: torch.ones(2, 2), "w": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path / "m.safetensors")


def test_placeholders_of_a_sharded_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match="ZeRO-3"):
        open_checkpoint({"a.weight": torch.empty(0), "b.weight": torch.empty(0), "step": torch.tensor(1.0)})

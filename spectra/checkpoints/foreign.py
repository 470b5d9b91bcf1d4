"""Formats that are known and not read: how each is recognised, what it is called, and what to do instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 512
AS_SAFETENSORS = "load it with its own library and save the weights as safetensors"


@dataclass(frozen=True)
class Foreign:
    """A format by name; `matches` looks at a file's name and first bytes, `why` says what keeps it from being read."""

    name: str
    remedy: str
    matches: Callable[[str, bytes], bool]
    why: str = "is not supported"


def _begins(*magics: bytes) -> Callable[[str, bytes], bool]:
    return lambda _, head: head.startswith(magics)


def _ends(*endings: str) -> Callable[[str, bytes], bool]:
    return lambda name, _: name.lower().endswith(endings)


def _called(pattern: str) -> Callable[[str, bytes], bool]:
    return lambda name, _: re.fullmatch(pattern, name) is not None


def _is_web_page(_: str, head: bytes) -> bool:
    return head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b'{"error', b'{"message'))


def _is_ctranslate2(_: str, head: bytes) -> bool:
    # u32 version, u16 length, then the specification's name with its terminating zero, such as "WhisperSpec\0".
    length = int.from_bytes(head[4:6], "little")
    return int.from_bytes(head[:4], "little") < 100 and head[6 : 6 + length].endswith(b"Spec\0")


def _is_plain_pickle(name: str, head: bytes) -> bool:
    return name.lower().endswith((".pkl", ".pickle", ".joblib")) or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5")


# The order matters: a name or first bytes that say much come before those that say little.
FILES = (
    Foreign(
        "a Git LFS pointer",
        "fetch them with `git lfs pull`",
        _begins(b"version https://git-lfs"),
        "stands in the place of the weights",
    ),
    Foreign(
        "a web page or error message",
        "download the file again",
        _is_web_page,
        "was saved in the place of the weights",
    ),
    Foreign("a GGUF file", "convert it to safetensors, or give the original weights", _begins(b"GGUF")),
    Foreign(
        "a GGML file",
        "convert it to safetensors, or give the original weights",
        _begins(b"lmgg", b"fmgg", b"tjgg", b"algg"),
    ),
    Foreign("an HDF5 file (Keras .h5)", AS_SAFETENSORS, _begins(b"\x89HDF\r\n\x1a\n")),
    Foreign("a Keras archive", AS_SAFETENSORS, _ends(".keras")),
    Foreign("a NumPy array", "give a dict of tensors, or save them as safetensors", _begins(b"\x93NUMPY")),
    Foreign("a NumPy or MLX .npz archive", "save its arrays as safetensors", _ends(".npz")),
    Foreign("a Flax msgpack file", AS_SAFETENSORS, _ends(".msgpack")),
    Foreign("an ONNX model", "give the weights it was exported from", _ends(".onnx", ".onnx_data")),
    Foreign("a TensorFlow Lite model", "give the weights it was exported from", lambda _, head: head[4:8] == b"TFL3"),
    Foreign(
        "a TensorFlow checkpoint or graph",
        AS_SAFETENSORS,
        _called(r".*(\.pb|\.ckpt.*\.index|\.ckpt.*\.meta|\.data-\d+-of-\d+)|checkpoint"),
    ),
    Foreign("a CTranslate2 model", "give the weights it was converted from", _is_ctranslate2),
    Foreign(
        "a part of a distributed checkpoint",
        "convert it with torch.distributed.checkpoint.format_utils",
        _ends(".distcp"),
    ),
    Foreign(
        "a DeepSpeed ZeRO shard",
        "join the shards with the zero_to_fp32.py beside them",
        _called(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+.*"),
    ),
    Foreign(
        "a tar archive (the torch format before 0.1.10, or NeMo)",
        "unpack it, or load it with its own library and save the weights as safetensors",
        lambda _, head: head[257:262] == b"ustar",
    ),
    Foreign(
        "a compressed file",
        "unpack it first",
        _begins(b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c"),
    ),
    # After every format above, because a torch file from before 1.6 is told from a plain pickle by the caller.
    Foreign(
        "a plain pickle",
        "where it was made, save the weights with torch.save(model.state_dict(), ...) or as safetensors",
        _is_plain_pickle,
        "can run any code when it is loaded and therefore is not read",
    ),
)


def foreign_file(path: Path, head: bytes) -> str | None:
    """Name and remedy of the foreign format of a file with the first bytes `head`; None where it is none of them.

    >>> foreign_file(Path("model.gguf"), b"GGUF\\x03")
    'a GGUF file, which is not supported; convert it to safetensors, or give the original weights'
    """
    return next((_sentence(kind.name, kind.remedy, kind.why) for kind in FILES if kind.matches(path.name, head)), None)


def foreign_archive(names: Iterable[str]) -> str | None:
    """Name and remedy of a zip archive that holds records of these names and is no torch checkpoint."""
    every = list(names)
    leaves = {name.rpartition("/")[2] for name in every}
    if "constants.pkl" in leaves:
        return _sentence(
            "a TorchScript archive (code and weights)",
            "load it with torch.jit.load where you trust it, and save its state_dict()",
        )
    if "archive_format" in leaves:
        return _sentence(
            "an exported program (torch.export)", "save the state_dict() of the model it was exported from"
        )
    if "model.weights.h5" in leaves:
        return _sentence("a Keras archive", AS_SAFETENSORS)
    if every and all(name.endswith(".npy") for name in every):
        return _sentence("a NumPy or MLX .npz archive", "save its arrays as safetensors")
    return None


def foreign_folder(names: Iterable[str]) -> str | None:
    """Name and remedy of a folder of foreign format that holds files and folders of these names."""
    every = set(names)
    consolidated = sorted(name for name in every if re.fullmatch(r"consolidated\.\d+\.pth", name))
    if any(name.endswith(".distcp") for name in every):
        return _sentence(
            "a distributed checkpoint (.metadata and .distcp)",
            "convert it with torch.distributed.checkpoint.format_utils.dcp_to_torch_save",
        )
    if any(re.match(r"(bf16_|fp16_)?zero_pp_rank_\d+", name) for name in every):
        return _sentence("a folder of DeepSpeed ZeRO shards", "join them with zero_to_fp32.py")
    if any(re.fullmatch(r"mp_rank_\d+(_\d+)*", name) for name in every):
        return _sentence("a Megatron checkpoint (mp_rank_* slices)", "convert it to the Hugging Face format first")
    if len([name for name in every if re.fullmatch(r"mp_rank_\d+_model_states\.pt", name)]) > 1:
        return _sentence("a set of DeepSpeed tensor-parallel slices", "join them with DeepSpeed's own converter")
    if len(consolidated) > 1:
        return _sentence(
            f"a set of {len(consolidated)} tensor-parallel slices (consolidated.NN.pth)",
            "convert them to the Hugging Face format first",
        )
    if every & {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"}:
        return _sentence("an Orbax checkpoint", AS_SAFETENSORS)
    if "saved_model.pb" in every:
        return _sentence("a TensorFlow SavedModel", AS_SAFETENSORS)
    return None


# Keys of LoRA files written by other programs than PEFT, whose scaling and module names follow rules of their own.
OTHER_LORA_KEYS = re.compile(
    r"^lora_(unet|te\d?)_|\.lora_(down|up)\.weight$|_lora\.(down|up)\.weight$|\.lora\.(down|up)\.weight$|\.(hada|lokr)_w\d"
)

# What each of those names, and of the others below, holds: nearly all names are passed over by it.
IN_FOREIGN_KEYS = ("lora", "hada_w", "lokr_w", "flat_param")


def foreign_keys(names: Iterable[str]) -> str | None:
    """Name and remedy of a foreign format that shows in the tensors' names alone."""
    every = [name for name in names if any(word in name for word in IN_FOREIGN_KEYS)]
    if any(OTHER_LORA_KEYS.search(name) for name in every):
        return _sentence(
            "a LoRA file of kohya or diffusers",
            "merge it into its base, or convert it to a PEFT folder with adapter_config.json",
        )
    if any(re.search(r"\.lora_(embedding_)?[AB](\.|$)", name) for name in every):
        return _sentence(
            "a set of LoRA factors without the adapter_config.json",
            "save them with save_pretrained, or merge them with merge_and_unload()",
            "holds their scaling",
        )
    if any(re.search(r"(^|\.)_?flat_param(_\d+)?$", name) for name in every):
        return _sentence("a set of flat FSDP parameters", "save with a full state dict (StateDictType.FULL_STATE_DICT)")
    return None


def _sentence(name: str, remedy: str, why: str = "is not supported") -> str:
    return f"{name}, which {why}; {remedy}"

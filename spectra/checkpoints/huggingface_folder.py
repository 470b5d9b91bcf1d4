"""A Hugging Face model folder: `config.json`, and weights in one file or in shards with an index."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from spectra.checkpoints.checkpoint import Checkpoint, CheckpointError, Entry
from spectra.checkpoints.foreign import HEAD_BYTES, foreign_file, foreign_folder
from spectra.checkpoints.stored_file import StoredFile, cannot_read
from spectra.checkpoints.weights_file import SHARD, open_weights_file
from spectra.checkpoints.wording import listed, quoted, shown

CONFIG = "config.json"
# In the order in which transformers and diffusers look for them.
USUAL_NAMES = tuple(
    name
    for stem in ("model", "diffusion_pytorch_model", "pytorch_model")
    for ending in (".safetensors", ".bin")
    for name in (f"{stem}{ending}", f"{stem}{ending}.index.json")
    if (stem, ending) not in {("model", ".bin"), ("pytorch_model", ".safetensors")}
)
INDEX = re.compile(r".+\.(safetensors|bin|pt|pth)\.index(\.\w+)?\.json")
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer.*|scheduler.*|scaler|sampler|rng_state.*|random_states.*|tokenizer.*|trainer_state)\.(bin|pt|pth)"
)
TEXTS = (".json", ".txt", ".md", ".py", ".html")
MOST_JSON_BYTES = 64 << 20


def open_model_folder(folder: Path) -> Checkpoint:
    """Describe the weights of a model folder, in one file or in shards; safetensors before torch files.

    Raises `CheckpointError` where the folder holds no weights, several sets without a usual name, or a foreign format.
    """
    names = folder_names(folder)
    foreign = foreign_folder(names)
    if foreign:
        raise CheckpointError(f"{shown(folder)} is {foreign}")
    candidates = [name for name in names if _is_weights(name)]
    usual = [name for name in USUAL_NAMES if name in candidates]
    if not usual and len(candidates) != 1:
        raise _no_choice(folder, names, candidates)
    chosen = usual[0] if usual else candidates[0]
    checkpoint = open_index(folder / chosen) if INDEX.fullmatch(chosen) else open_weights_file(folder / chosen)
    left = [name for name in candidates if name != chosen]
    notes = (f"read {quoted(chosen)}, and not {listed(left)}",) if left else ()
    return checkpoint.described(
        shown(folder), notes=(*notes, *checkpoint.notes), **described_by_config(folder, checkpoint)
    )


def open_index(index: Path) -> Checkpoint:
    """Describe the weights of all shards that an index (`*.index.json`) names.

    Raises `CheckpointError` where the index leads outside its folder, a shard is missing, or a shard lacks a tensor
    that the index places there.
    """
    placed = _weight_map(index)
    shards = {name: open_weights_file(index.parent / name) for name in sorted(set(placed.values()))}
    entries: dict[str, Entry] = {}
    tied: dict[str, str] = {}
    refused: dict[str, str] = {}
    for tensor, name in placed.items():
        shard = shards[name]
        if tensor in shard:
            entries[tensor] = shard.entry(tensor)
        elif tensor in shard.tied:
            tied[tensor] = shard.tied[tensor]
        elif tensor in shard.refused:
            refused[tensor] = shard.refused[tensor]
        else:
            raise CheckpointError(
                f"{shown(index)} places tensor {quoted(tensor)} in {quoted(name)}, which does not hold it; "
                "download both again"
            )
    notes = [f"in {quoted(name)}: {note}" for name, shard in shards.items() for note in shard.notes]
    elsewhere: list[str] = []
    for shard in shards.values():
        for tensor in shard:
            if tensor not in placed:
                elsewhere.append(tensor)
                entries.setdefault(tensor, shard.entry(tensor))
    times = Counter(tensor for shard in shards.values() for tensor in shard)
    repeated = [tensor for tensor in entries if times[tensor] > 1]
    if elsewhere:
        notes.append(f"{listed(elsewhere)} taken from the shards, though not in the index")
    if repeated:
        notes.append(f"{listed(repeated)} found in several shards; the index decides")
    tied = {alias: name for alias, name in tied.items() if name in entries}
    files = (index, *(index.parent / name for name in shards))
    return Checkpoint(shown(index), entries, files=files, tied=tied, refused=refused, notes=tuple(notes))


def described_by_config(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """The `config` and `files` of a checkpoint whose weights lie in `folder`, beside a config.json or none."""
    config = folder / CONFIG
    if not config.is_file():
        return {}
    return {"config": read_json(config), "files": (config, *checkpoint.files)}


def holds_weights(folder: Path) -> bool:
    """Whether a file or an index of weights lies directly in a folder."""
    return any(map(_is_weights, folder_names(folder)))


def folder_names(folder: Path) -> list[str]:
    """Names of everything in a folder, sorted. Raises `CheckpointError` where it cannot be listed."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise cannot_read(folder, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of reasonable size. Raises `CheckpointError` where it is damaged or no object."""
    file = StoredFile.at(path)
    if file.size > MOST_JSON_BYTES:
        raise CheckpointError(f"{shown(path)} has {file.size} bytes, more than any such file needs; download it again")
    try:
        content = json.loads(file.read(0, file.size).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown(path)} is no valid JSON ({str(error)[:200]}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{shown(path)} holds no JSON object; download it again")
    return content


def _is_weights(name: str) -> bool:
    if INDEX.fullmatch(name):
        return True
    return name.endswith(WEIGHT_ENDINGS) and not NOT_WEIGHTS.fullmatch(name) and not SHARD.fullmatch(name)


def _weight_map(index: Path) -> dict[str, str]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{shown(index)} has no weight_map; download it again")
    for name in set(map(str, placed.values())):
        if not _is_inside(name):
            raise CheckpointError(
                f"{shown(index)} names the shard {quoted(name)}, which leads outside its folder; "
                "do not use this checkpoint"
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{shown(index)} names the shard {quoted(name)}, which is missing; download it")
    return {tensor: str(name) for tensor, name in placed.items()}


def _is_inside(name: str) -> bool:
    """Whether a shard's name stays in its folder, by its text alone: hub caches link their files to elsewhere."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not (
        {"..", "/"} & set(parts) or PureWindowsPath(name).anchor or "\\" in name or "\0" in name
    )


def _no_choice(folder: Path, names: list[str], candidates: list[str]) -> CheckpointError:
    where = shown(folder)
    if candidates:
        return CheckpointError(
            f"{where} holds several checkpoints ({listed(candidates, most=12)}); give the path of one of them"
        )
    if any(SHARD.fullmatch(name) for name in names):
        return CheckpointError(
            f"{where} holds shards without their index; download the *.index.json that belongs to them"
        )
    for name in names:
        if (folder / name).is_file() and not name.endswith(TEXTS):
            foreign = foreign_file(folder / name, _head(folder / name))
            if foreign:
                return CheckpointError(f"{where} holds no weights that can be read: {quoted(name)} is {foreign}")
    subfolders = [name for name in names if (folder / name).is_dir()]
    inside = [name for name in subfolders if holds_weights(folder / name)]
    if inside:
        return CheckpointError(
            f"{where} holds no weights itself, but its folders {listed(inside, most=12)} do; give one of them"
        )
    return CheckpointError(
        f"{where} holds no weights (it holds {listed(names) or 'nothing'}); "
        "give a folder with model.safetensors or pytorch_model.bin"
    )


def _head(path: Path) -> bytes:
    return StoredFile.at(path).read(0, HEAD_BYTES)


def is_usual_name(name: str) -> bool:
    """Whether a file of this name belongs to the config.json beside it."""
    return name in USUAL_NAMES or bool(INDEX.fullmatch(name))


def shard_note(path: Path) -> str | None:
    """What to say of a single shard that was given alone; None for a whole checkpoint."""
    match = SHARD.fullmatch(path.name)
    if match is None or int(match[3]) == 1:
        return None
    return f"{quoted(path.name)} is one of {int(match[3])} shards; give its folder for the whole model"

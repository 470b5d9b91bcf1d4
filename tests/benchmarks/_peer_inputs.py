"""The ViT pair in the forms that other tools read: model folders, and its update as a PEFT adapter folder.

Run in a process of its own, so that the benchmark itself stays small (a child's peak memory counts what its parent
held).

    python tests/benchmarks/_peer_inputs.py BASE.safetensors TUNED.safetensors FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

RANK = 16


def factors(D: Tensor) -> tuple[Tensor, Tensor]:
    """A (RANK, n) and B (m, RANK) with B A = D, for a D of that rank; B is an orthonormal basis of its columns."""
    sketch = D @ torch.randn(D.shape[1], RANK, generator=torch.Generator().manual_seed(0))
    B = torch.linalg.qr(sketch).Q
    return B.T @ D, B


def write(base: Path, tuned: Path, folder: Path) -> None:
    """Write `base/`, `tuned/` (config.json, model.safetensors) and `adapter/` (as PEFT saves it) into `folder`."""
    for side, path in (("base", base), ("tuned", tuned)):
        (folder / side).mkdir(parents=True, exist_ok=True)
        (folder / side / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
        os.link(path, folder / side / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    modules = []
    with safe_open(base, "pt") as before, safe_open(tuned, "pt") as after:
        for name in before.keys():  # noqa: SIM118  (not a dict)
            A, B = factors(after.get_tensor(name) - before.get_tensor(name))
            modules.append(name.removesuffix(".weight"))
            tensors[f"base_model.model.{modules[-1]}.lora_A.weight"] = A.contiguous()
            tensors[f"base_model.model.{modules[-1]}.lora_B.weight"] = B.contiguous()
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "inference_mode": True}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "tuned", "folder"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    write(arguments.base, arguments.tuned, arguments.folder)

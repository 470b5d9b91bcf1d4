"""One run of another tool on the folders of `_peer_inputs`, in an interpreter that has it. Knows nothing of spectra.

python tests/benchmarks/_peer_runs.py TOOL FOLDER
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def module(path: Path) -> Any:
    """A tree of `nn.Linear` with the names and weights of a checkpoint: for tools that take nothing but a model."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    root = nn.Module()
    for name, weight in load_file(path).items():
        *parents, leaf = name.removesuffix(".weight").split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        place.add_module(leaf, linear)
    return root.eval()


def peft(folder: Path) -> str:
    """Intruders of the adapter, and a mitigated adapter in the model (left there, not written)."""
    from peft import PeftModel
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    model = PeftModel.from_pretrained(module(folder / "base" / "model.safetensors"), str(folder / "adapter"))
    said: list[str] = []
    reduce_intruder_dimension(model, logging_sink=said.append)  # type: ignore[no-untyped-call, unused-ignore]
    return f"{len(said)} lines said"


def weightwatcher_one(folder: Path) -> str:
    """Power-law fits and norms of one checkpoint, from singular values only."""
    import weightwatcher  # type: ignore[import-not-found, unused-ignore]

    found = weightwatcher.WeightWatcher(model=module(folder / "tuned" / "model.safetensors")).analyze()
    return f"{len(found)} layers"


def weightwatcher_delta(folder: Path) -> str:
    """The same of the update, tuned minus base."""
    import weightwatcher  # type: ignore[import-not-found, unused-ignore]

    base, tuned = (module(folder / side / "model.safetensors") for side in ("base", "tuned"))
    found = weightwatcher.WeightWatcher(model=tuned, base_model=base).analyze()
    return f"{len(found)} layers"


def modeldelta(folder: Path) -> str:
    """Norms, cosine and effective rank of the update, as JSON."""
    from click.testing import CliRunner
    from modeldelta.cli import compare  # type: ignore[import-not-found, unused-ignore]

    out = folder / "modeldelta.json"
    done = CliRunner().invoke(compare, [str(folder / "base"), str(folder / "tuned"), "-o", str(out), "--quiet"])
    if done.exit_code:
        raise SystemExit(done.output or str(done.exception))
    return f"{out.stat().st_size} bytes"


def diffract(folder: Path) -> str:
    """Norms, ranks and the overlaps of both checkpoints' singular vectors; no power laws."""
    from diffract import Session  # type: ignore[import-not-found, unused-ignore]
    from safetensors.numpy import load_file

    with Session(profile="ram") as session:
        for side in ("base", "tuned"):
            session.models.add(load_file(folder / side / "model.safetensors"), model_id=side)
        session.compute.apply("frob_norm", "l2_norm", "stable_rank", "effective_rank")
        session.compute.apply("max_l_agreement", "max_r_agreement", "l_agreement", "r_agreement")
        found = session.results.export_metrics("frob_norm", "stable_rank", export_format="list")
    return f"{len(found)} rows"


RUNS: dict[str, Callable[[Path], str]] = {
    "peft": peft,
    "weightwatcher-one": weightwatcher_one,
    "weightwatcher-delta": weightwatcher_delta,
    "modeldelta": modeldelta,
    "diffract": diffract,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(RUNS[sys.argv[1]](Path(sys.argv[2])))

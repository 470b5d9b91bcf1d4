"""Adapters out of merged and of fully tuned models, loaded by peft itself."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from spectra_cli import extract as command
from torch import Tensor, nn
from typer.testing import CliRunner

from spectra.checkpoints import Adapter, open_checkpoint
from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank
from spectra.lora import extract
from spectra.lora.peft_folder import write_adapter
from tests.reference import singular

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(10)[None]


def bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=61
        )
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=16, bos_token_id=0, eos_token_id=0
        )
    )


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=61,
        )
    )  # fmt: skip


# model, the modules that are adapted (each of rank 3 but for those named), and how many that makes
MODELS = [
    (bert, ["query", "output.dense", "classifier"], {"layer.1.attention.self.query": 6, "classifier": 1}, 7),
    (gpt2, ["c_attn", "c_proj"], {"h.0.attn.c_attn": 5, "mlp.c_proj": 2}, 6),
    (llama, ["q_proj", "v_proj", "down_proj"], {"layers.1.self_attn.q_proj": 5, "v_proj": 1}, 6),
]


def merged_pair(
    folder: Path, make: Callable[[], Any], dtype: torch.dtype, targets: list[str], ranks: dict[str, int]
) -> tuple[Any, dict[str, int]]:
    """Write `base` and `merged`. Returns the merged model and the rank of every module that was adapted."""
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, rank_pattern=ranks, alpha_pattern=ranks)
    adapted = peft.get_peft_model(model, config)
    merged_ranks = {}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
            if "lora_A" in name:
                merged_ranks[name.removeprefix("base_model.model.").partition(".lora_A")[0]] = parameter.shape[0]
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return merged, merged_ranks


def stored_matrix(folder: Path, name: str, is_transposed: bool) -> Tensor:
    W = open_checkpoint(folder)[name].double()
    return W.T if is_transposed else W


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("make", "targets", "ranks", "count"), MODELS, ids=["bert", "gpt2", "llama"])
def test_a_merged_adapter_comes_out_again_and_peft_loads_it(
    tmp_path: Path,
    make: Callable[[], Any],
    targets: list[str],
    ranks: dict[str, int],
    count: int,
    dtype: torch.dtype,
    recwarn: pytest.WarningsRecorder,
) -> None:
    merged, merged_ranks = merged_pair(tmp_path, make, dtype, targets, ranks)
    report = extract(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter").set_index("name")
    written = report[report.written]
    assert len(written) == count
    assert dict(written["rank"]) == {f"{module}.weight": rank for module, rank in merged_ranks.items()}
    assert set(report[~report.written].reason) == {"unchanged"}
    assert written.recognised.all()
    assert (written.residual < 1.3 * written.noise).all()
    adapter = open_checkpoint(tmp_path / "adapter")
    assert isinstance(adapter, Adapter)
    for name, row in written.iterrows():
        W, tuned = (stored_matrix(tmp_path / side, str(name), make is gpt2) for side in ("base", "merged"))
        update = adapter.update(str(name))
        assert update.c == 1.0
        rest = tuned - W - update.B.double() @ update.A.double()
        assert row.residual == pytest.approx(float(rest.norm()), rel=1e-6)
        assert row.relative_residual == pytest.approx(float(rest.norm() / (tuned - W).norm()), rel=1e-6)
        best = np.linalg.norm(singular.svd((tuned - W).numpy()).s[row["rank"] :])
        assert row.residual <= best + 1e-6 * row.update_norm
    base = type(merged).from_pretrained(tmp_path / "base", dtype=dtype).eval()
    recwarn.clear()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not [str(warning.message) for warning in recwarn if "keys" in str(warning.message)]
    with torch.no_grad():
        got, expected = model(IDS).logits.double(), merged(IDS).logits.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())


def test_models_of_other_names_take_the_names_that_they_have(tmp_path: Path) -> None:
    merged, _ = merged_pair(tmp_path, gpt2, torch.float32, ["c_attn"], {})
    gpt2().transformer.save_pretrained(tmp_path / "other")  # makes a config.json for a model without a head
    headless = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base").transformer
    headless.save_pretrained(tmp_path / "headless")
    report = extract(tmp_path / "headless", tmp_path / "merged", tmp_path / "adapter", names="tuned")
    assert list(report[report.written].name) == ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"]
    assert "named as in" in report.attrs["notes"][-1]
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "headless").eval()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-5)


def gaussian(*shape: int, seed: int = 0, scale: float = 0.05) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(m: int, n: int, rank: int, seed: int = 1) -> Tensor:
    return gaussian(m, rank, seed=seed, scale=0.2) @ gaussian(rank, n, seed=seed + 1, scale=0.2)


def by_name(report: pd.DataFrame) -> dict[str, Any]:
    return {str(row.name): row for row in report.itertuples(index=False)}


def test_dense_updates_are_written_only_when_truncation_is_asked_for(tmp_path: Path) -> None:
    base = {"blocks.0.fc.weight": gaussian(40, 30), "blocks.1.fc.weight": gaussian(30, 40, seed=5)}
    D = gaussian(40, 30, seed=2, scale=0.01)
    tuned = {
        "blocks.0.fc.weight": base["blocks.0.fc.weight"] + D,
        "blocks.1.fc.weight": base["blocks.1.fc.weight"] + product(30, 40, 2),
    }
    values = singular.svd((tuned["blocks.0.fc.weight"].double() - base["blocks.0.fc.weight"].double()).numpy()).s
    dense = by_name(extract(base, tuned, tmp_path / "own"))["blocks.0.fc.weight"]
    assert not dense.written and not dense.recognised and "not of low rank" in dense.reason and dense.rank is pd.NA

    rows = by_name(extract(base, tuned, tmp_path / "ranked", rank=4))
    assert (rows["blocks.0.fc.weight"].rank, rows["blocks.1.fc.weight"].rank) == (4, 2)
    assert rows["blocks.0.fc.weight"].residual == pytest.approx(np.linalg.norm(values[4:]), rel=1e-6)
    assert not rows["blocks.0.fc.weight"].recognised and rows["blocks.1.fc.weight"].recognised

    share = np.cumsum(values**2) / np.sum(values**2)
    rows = by_name(extract(base, tuned, tmp_path / "energetic", energy=0.6))
    assert rows["blocks.0.fc.weight"].rank == int(np.searchsorted(share, 0.6)) + 1
    assert rows["blocks.0.fc.weight"].relative_residual ** 2 <= 0.4
    assert by_name(extract(base, tuned, tmp_path / "all", energy=1.0))["blocks.0.fc.weight"].rank == 30


def test_where_nothing_is_written_there_is_no_folder(tmp_path: Path) -> None:
    base = {"fc.weight": gaussian(40, 30)}
    report = extract(base, {"fc.weight": base["fc.weight"] + gaussian(40, 30, seed=1)}, tmp_path / "adapter")
    assert not report.written.any()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_an_update_below_the_rounding_is_not_called_low_rank(tmp_path: Path, stored: torch.dtype) -> None:
    W = gaussian(64, 48)
    D = product(64, 48, 2)
    D *= 1e-3 * W.norm() / D.norm()
    base, tuned = ({"fc.weight": X.bfloat16().to(stored)} for X in (W, W.bfloat16().float() + D))
    row = extract(base, tuned, tmp_path / "adapter").iloc[0]
    # Also where what was rounded to bfloat16 is stored in float32.
    assert "rounding of its storage" in row.reason and not row.recognised and not row.written


def test_rounding_of_the_base_is_allowed_for_where_training_started_from_a_finer_one(tmp_path: Path) -> None:
    W, D = gaussian(64, 48), product(64, 48, 2)
    base, tuned = {"fc.weight": W.bfloat16()}, {"fc.weight": (W + D).bfloat16()}
    row = extract(base, tuned, tmp_path / "adapter").iloc[0]
    assert row.recognised and row["rank"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_factors_are_charged_for_their_own_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {"fc.weight": gaussian(40, 30)}
    tuned = {"fc.weight": base["fc.weight"] + product(40, 30, 3)}
    row = extract(base, tuned, tmp_path / "adapter", dtype=dtype).iloc[0]
    adapter = open_checkpoint(tmp_path / "adapter")
    assert isinstance(adapter, Adapter)
    update = adapter.update("fc.weight")
    assert update.B.dtype == dtype
    rest = tuned["fc.weight"].double() - base["fc.weight"].double() - update.B.double() @ update.A.double()
    assert row.residual == pytest.approx(float(rest.norm()), rel=1e-6)
    assert 0.05 < row.relative_residual / torch.finfo(dtype).eps < 1


class Carriers(nn.Module):
    """One tensor of each kind that a LoRA of a Linear cannot carry, and two modules of which one ends as the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 12)
        self.conv = nn.Conv2d(8, 8, 3)
        self.attn = nn.MultiheadAttention(12, 2)
        self.norm = nn.LayerNorm(12)
        self.fc = nn.Linear(12, 12)
        self.deep = nn.ModuleDict({"fc": nn.Linear(12, 12), "other": nn.ModuleDict({"fc": nn.Linear(12, 12)})})
        self.experts = nn.Parameter(torch.randn(3, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.deep["fc"](self.fc(x))
        return first + self.deep["other"]["fc"](x)  # type: ignore[index, operator, no-any-return]


def test_what_no_lora_carries_is_named_with_the_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Carriers()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    after = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in before.items()}
    after["new_head.weight"] = torch.ones(3, 12)
    for name in ("fc.weight", "deep.fc.weight"):
        after[name] = before[name] + product(12, 12, 2 if name == "fc.weight" else 1)
    after["deep.other.fc.weight"], after["conv.bias"] = before["deep.other.fc.weight"], before["conv.bias"]
    rows = by_name(extract(before, after, tmp_path / "adapter"))
    for name, word in {
        "embed_tokens.weight": "embedding",
        "conv.weight": "convolution",
        "attn.in_proj_weight": "no module's weight",
        "attn.out_proj.weight": "MultiheadAttention",
        "experts": "",
        "norm.weight": "changed, and carried by no LoRA",
        "fc.bias": "changed, and carried by no LoRA",
        "new_head.weight": "not in the base",
        "deep.other.fc.weight": "unchanged",
    }.items():
        assert not rows[name].written and word in rows[name].reason, name
    assert "conv.bias" not in rows
    assert rows["embed_tokens.weight"].update_norm > 0

    # `fc` must not mean `deep.fc` or `deep.other.fc`, also after peft has written the configuration anew.
    for round_trip in (False, True):
        model = peft.PeftModel.from_pretrained(Carriers(), tmp_path / ("again" if round_trip else "adapter"))
        model.base_model.model.load_state_dict(
            {name.replace("fc.", "fc.base_layer.") if name[:7] != "deep.ot" else name: X for name, X in before.items()},
            strict=False,
        )
        modules = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        assert modules == {"base_model.model.fc", "base_model.model.deep.fc"}
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged.fc.weight, after["fc.weight"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged.deep["fc"].weight, after["deep.fc.weight"], rtol=1e-4, atol=1e-5)
        if not round_trip:
            peft.PeftModel.from_pretrained(Carriers(), tmp_path / "adapter").save_pretrained(tmp_path / "again")


def test_a_fused_tensor_gets_one_lora_or_none(tmp_path: Path) -> None:
    base = {"h.0.attn.qkv.weight": gaussian(48, 16), "h.1.attn.qkv.weight": gaussian(48, 16, seed=3)}
    tuned = {name: W + product(48, 16, 3) for name, W in base.items()}
    report = extract(base, tuned, tmp_path / "whole")
    assert list(report["rank"]) == [3, 3] and list(report.name) == list(base)
    rows = by_name(extract(base, tuned, tmp_path / "part", include=["h.0.*", "*[[]q]"]))
    assert rows["h.0.attn.qkv.weight"].written
    assert "in parts only" in rows["h.1.attn.qkv.weight"].reason and not rows["h.1.attn.qkv.weight"].written


def test_a_head_that_is_tied_to_the_embedding_is_left(tmp_path: Path) -> None:
    E = gaussian(40, 16)
    base = {"model.embed_tokens.weight": E, "lm_head.weight": E, "model.layers.0.mlp.up_proj.weight": gaussian(32, 16)}
    tuned = {name: W + product(*W.shape, 2) for name, W in base.items()}
    rows = by_name(extract(base, tuned, tmp_path / "adapter"))
    assert rows["model.layers.0.mlp.up_proj.weight"].written
    assert not rows["lm_head.weight"].written and "tied" in rows["lm_head.weight"].reason


def small_pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    base = {"a.weight": gaussian(24, 20), "b.weight": gaussian(20, 24, seed=4)}
    return base, {name: W + product(*W.shape, 2) for name, W in base.items()}


def test_a_folder_that_is_taken_is_left_alone_unless_forced(tmp_path: Path) -> None:
    base, tuned = small_pair()
    folder = tmp_path / "adapter"
    extract(base, tuned, folder, include=["a.*"])
    with pytest.raises(SpectraError, match="holds an adapter already"):
        extract(base, tuned, folder)
    assert isinstance(kept := open_checkpoint(folder), Adapter) and list(kept.updates) == ["a.weight"]
    extract(base, tuned, folder, force=True)
    assert isinstance(new := open_checkpoint(folder), Adapter) and list(new.updates) == ["a.weight", "b.weight"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    extract(base, tuned, plain)  # empty: nothing is lost

    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(SpectraError, match=r"holds 'thesis\.tex'"):
        extract(base, tuned, folder, force=True)
    assert (folder / "thesis.tex").exists()


def test_what_fails_on_the_way_leaves_the_old_adapter_and_nothing_else(tmp_path: Path) -> None:
    base, tuned = small_pair()
    folder = tmp_path / "adapter"
    extract(base, tuned, folder, include=["a.*"])

    def interrupt(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(base, tuned, folder, force=True, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert isinstance(kept := open_checkpoint(folder), Adapter) and list(kept.updates) == ["a.weight"]

    broken = LowRank(torch.full((24, 1), float("nan")), torch.ones(1, 20))
    with pytest.raises(SpectraError, match="read back otherwise"):
        write_adapter(folder, {"a": broken})  # NaN equals nothing, itself included
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert isinstance(kept := open_checkpoint(folder), Adapter) and bool(kept.update("a.weight").B.isfinite().all())


def test_entries_that_are_not_finite_and_factors_that_overflow_are_said(tmp_path: Path) -> None:
    base, tuned = small_pair()
    tuned["a.weight"][0, 0] = float("nan")
    tuned["b.weight"] = base["b.weight"] + 1e12 * product(20, 24, 2)
    rows = by_name(extract(base, tuned, tmp_path / "adapter", dtype=torch.float16))
    assert "NaN or infinite" in rows["a.weight"].reason
    assert "overflow float16" in rows["b.weight"].reason
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 2, "energy": 0.5}, "give one of them"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, "no share of energy"),
        ({"dtype": torch.int8}, "float32, bfloat16 or float16"),
        ({"names": "mine"}, "the base or tuned"),
        ({"include": ["nothing*"]}, "matches no weight matrix"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpectraError, match=said):
        extract(*small_pair(), tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_is_not_extracted_from(tmp_path: Path) -> None:
    base, tuned = small_pair()
    extract(base, tuned, tmp_path / "adapter")
    with pytest.raises(SpectraError, match="is an adapter already"):
        extract(base, tmp_path / "adapter", tmp_path / "second")


@pytest.mark.parametrize("workers", [1, 3])
def test_the_report_is_in_reading_order_and_typed(tmp_path: Path, workers: int) -> None:
    base = {f"layers.{i}.fc.weight": gaussian(20 + i, 24 - i, seed=i) for i in range(12)}
    tuned = {name: W + product(*W.shape, 1 + i % 3) for i, (name, W) in enumerate(base.items())}
    report = extract(base, tuned, tmp_path / "adapter", workers=workers)
    assert list(report.name) == list(base)
    assert list(report["rank"]) == [1 + i % 3 for i in range(12)]
    assert str(report["rank"].dtype) == "Int64" and report.residual.dtype == "float64"


def test_on_the_command_line(tmp_path: Path) -> None:
    base, tuned = small_pair()
    base["[red]x\x1b[31m.weight"] = gaussian(24, 24)
    tuned["[red]x\x1b[31m.weight"] = base["[red]x\x1b[31m.weight"] + gaussian(24, 24, seed=9)
    torch.save(base, tmp_path / "base.pt")
    torch.save(tuned, tmp_path / "tuned.pt")
    app, runner = typer.Typer(), CliRunner()
    command.register(app)
    files = [str(tmp_path / "base.pt"), str(tmp_path / "tuned.pt")]
    done = runner.invoke(app, [*files, "--out", str(tmp_path / "one")])
    assert done.exit_code == 0, done.output
    assert "2 LoRAs written" in done.stdout and "[red]x\\x1b[31m.weight" in done.stdout
    done = runner.invoke(app, [*files, "--out", str(tmp_path / "two"), "--rank", "1", "--dtype", "bfloat16", "--json"])
    shown = json.loads(done.stdout)
    assert [row["rank"] for row in shown["tensors"]] == [1, 1, 1]
    assert isinstance(adapter := open_checkpoint(tmp_path / "two"), Adapter) and len(adapter.updates) == 3
    done = runner.invoke(app, [*files, "--out", str(tmp_path / "three"), "--include", "*red*"])
    assert done.exit_code == 1 and "nothing was written" in done.stderr

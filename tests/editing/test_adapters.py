"""Edited adapters load in plain PEFT and give the logits of the edited checkpoint; every kind of module is edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from spectra.checkpoints import Adapter, open_checkpoint
from spectra.editing import Mitigation, Rewinding, Scaling, Truncation, edit, mitigate
from spectra.editing.adapter_files import check_adapter
from spectra.editing.placing import joined
from spectra.errors import SpectraError
from spectra.linalg.lowrank import LowRank

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from tests.lora import zoo  # noqa: E402


def zoo_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**zoo.inputs(seed=2))
    return output


def gpt2_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(torch.arange(24).reshape(2, 12) % 61).logits
    return output


def gpt2() -> nn.Module:
    model: nn.Module = zoo.woken(zoo.gpt2)
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], dict[str, Any]]] = {
    "linear": (zoo.zoo, zoo_logits, {"target_modules": ["biased", "bare"], "lora_alpha": 7}),
    "conv1d": (zoo.zoo, zoo_logits, {"target_modules": ["turned"], "fan_in_fan_out": True}),
    "embedding": (zoo.zoo, zoo_logits, {"target_modules": ["table"], "lora_alpha": 3}),
    "conv2d": (zoo.zoo, zoo_logits, {"target_modules": ["kernel"], "lora_alpha": 3}),
    "patterns": (
        zoo.zoo,
        zoo_logits,
        {"target_modules": ["biased", "bare", "table"], "use_rslora": True, "rank_pattern": {"bi.*": 3},
         "alpha_pattern": {"bare": 5}, "modules_to_save": ["head"], "bias": "all"},
    ),
    "fused conv1d": (gpt2, gpt2_logits, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "trained biases": (
        gpt2, gpt2_logits, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}
    ),
}  # fmt: skip


class Trained:
    """A base on disk, an adapter of it with large random factors, and the merge of both, saved by their libraries."""

    def __init__(self, case: str, folder: Path, safe: bool = True) -> None:
        make, self.logits, options = CASES[case]
        self.make = make
        base = make()
        self.base = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        torch.manual_seed(1)
        model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, **options}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 1.0 if "lora" in name else 0.3)
        self.folder = folder / "adapter"
        model.save_pretrained(self.folder, safe_serialization=safe)
        self.merged = model.merge_and_unload().state_dict()

    def with_adapter(self, folder: Path) -> Tensor:
        return self.logits(peft.PeftModel.from_pretrained(self.make(), folder).eval())

    def with_tensors(self, tensors: dict[str, Tensor]) -> Tensor:
        model = self.make()
        model.load_state_dict({**self.merged, **tensors})
        return self.logits(model.eval())


@pytest.mark.parametrize("case", CASES)
def test_a_mitigated_adapter_gives_the_logits_of_the_mitigated_checkpoint(case: str, tmp_path: Path) -> None:
    trained = Trained(case, tmp_path)
    options: dict[str, Any] = {"factor": 0.3, "which": "all", "k": 3, "epsilon": 0.8}
    if case == "conv1d":  # nothing in a bare state dict tells it from a Linear
        options["transposed"] = ["turned.weight"]
    result = mitigate(trained.base, trained.folder, tmp_path / "out", **options)
    dense = mitigate(trained.base, trained.merged, **options)
    changed = result.matrices[result.matrices["status"] == "edited"]
    assert len(changed) >= 1 and (changed["rank_after"] == changed["rank_before"] + changed["intruders_scaled"]).all()
    both = changed.merge(dense.matrices, on="name", suffixes=("", "_dense"))
    assert len(both) == len(changed)
    for column in ("intruders_before", "intruders_after", "intruders_appeared"):
        assert both[column].tolist() == both[f"{column}_dense"].tolist()
    found, expected = trained.with_adapter(tmp_path / "out"), trained.with_tensors(dict(dense.tensors))
    plain = trained.with_adapter(trained.folder)
    scale = float((expected - plain).abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * max(scale, float(expected.abs().max())))


def test_the_rank_is_exactly_r_plus_q_and_the_old_factors_keep_their_bits(tmp_path: Path) -> None:
    trained = Trained("patterns", tmp_path)
    result = mitigate(
        trained.base, trained.folder, tmp_path / "out", factor=0.0, which="all", k=4, epsilon=0.8, exclude="head.*"
    )
    before, after = open_checkpoint(trained.folder), open_checkpoint(tmp_path / "out")
    assert isinstance(before, Adapter) and isinstance(after, Adapter)
    scaled = dict(zip(result.matrices["name"], result.matrices["intruders_scaled"], strict=True))
    for name, info in before.updates.items():
        old, new = before.update(name), after.update(name)
        assert new.rank == info.rank + scaled[name] and new.c == pytest.approx(old.c, rel=1e-12)
        assert torch.equal(new.B[:, : old.rank], old.B) and torch.equal(new.A[: old.rank], old.A)
    assert {name: after[name].tolist() for name in after} == {name: before[name].tolist() for name in before}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert list(config["rank_pattern"])[-1] == "bi.*"  # what was there stays, behind


AGAIN = [
    (Mitigation(0.3, "all", 3, 0.8), Mitigation(0.5, "all", 3, 0.8)),
    (Mitigation(0.3, "all", 3, 0.8), Truncation(rank=1)),
    (Scaling(0.5), Scaling(0.3)),
    (Truncation(rank=1), Mitigation(0.0, "all", 3, 0.8)),
    (Rewinding(), Scaling(2.0)),
]


@pytest.mark.parametrize("case", ["patterns", "embedding", "fused conv1d"])
@pytest.mark.parametrize("edits", AGAIN, ids=lambda edits: " ".join(type(each).__name__ for each in edits))
def test_an_edited_adapter_can_be_edited_again(case: str, edits: tuple[Any, Any], tmp_path: Path) -> None:
    trained = Trained(case, tmp_path)
    tuned: Any = trained.merged
    folder = trained.folder
    for number, what in enumerate(edits):
        edit(trained.base, folder, what, tmp_path / f"out{number}")
        tuned = {**tuned, **edit(trained.base, tuned, what).tensors}
        folder = tmp_path / f"out{number}"
    found, expected = trained.with_adapter(folder), trained.with_tensors(tuned)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max()))


def test_patterns_that_name_a_module_as_an_edit_does_are_replaced(tmp_path: Path) -> None:
    trained = Trained("linear", tmp_path)
    path = trained.folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"rank_pattern": {"^bare": 2, "other": 5}, "alpha_pattern": {"^bare": 7, "^biased": 7}}
    path.write_text(json.dumps(config))
    result = edit(trained.base, trained.folder, Truncation(rank=1), tmp_path / "out")
    assert result.changed == 2 and set(result.matrices["rank_after"].dropna()) == {1}
    after = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert after["rank_pattern"] == {"^bare": 1, "^biased": 1, "other": 5}
    assert list(after["rank_pattern"])[-1] == "other" and after["alpha_pattern"] == {"^bare": 3.5, "^biased": 3.5}


def test_an_adapter_that_is_read_otherwise_than_meant_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    trained = Trained("linear", tmp_path)
    adapter = open_checkpoint(trained.folder)
    assert isinstance(adapter, Adapter)
    path = trained.folder / "adapter_config.json"
    for change in ({"lora_alpha": 8}, {"r": 3}):
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(SpectraError, match=r"nothing was written .* merge it") as raised:
            check_adapter(adapter, {}, trained.folder)
        assert "disk" not in str(raised.value) and str(tmp_path) not in str(raised.value)
        path.write_text(before)


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_without_intruders_comes_back_to_the_bit(safe: bool, tmp_path: Path) -> None:
    trained = Trained("linear", tmp_path, safe=safe)
    result = mitigate(trained.base, trained.folder, tmp_path / "out", factor=0.0, epsilon=0.01)
    assert result.changed == 0 and "no intruder dimensions were found" in result.notes[-1]
    for path in trained.folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_adapters_in_torch_files_stay_torch_files(tmp_path: Path) -> None:
    trained = Trained("linear", tmp_path, safe=False)
    mitigate(trained.base, trained.folder, tmp_path / "out", factor=0.0, epsilon=0.9, which="all")
    assert (tmp_path / "out" / "adapter_model.bin").exists()
    assert not torch.equal(trained.with_adapter(tmp_path / "out"), trained.with_adapter(trained.folder))


@pytest.mark.parametrize("case", ["linear", "embedding", "conv2d", "fused conv1d"])
@pytest.mark.parametrize(
    "what", [Scaling(0.4), Scaling(-1.0), Truncation(rank=1), Rewinding(components=(0, 3))], ids=lambda what: repr(what)
)
def test_other_edits_of_an_adapter_are_those_of_the_merged_model(case: str, what: Any, tmp_path: Path) -> None:
    trained = Trained(case, tmp_path)
    edit(trained.base, trained.folder, what, tmp_path / "out")
    dense = edit(trained.base, trained.merged, what)
    found, expected = trained.with_adapter(tmp_path / "out"), trained.with_tensors(dict(dense.tensors))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("what", [Scaling(0.0), Rewinding()])
@pytest.mark.parametrize("case", ["linear", "embedding", "conv2d"])
def test_an_adapter_taken_back_is_the_base(case: str, what: Any, tmp_path: Path) -> None:
    trained = Trained(case, tmp_path)
    result = edit(trained.base, trained.folder, what, tmp_path / "out")
    assert result.matrices["rank_after"].dropna().eq(0).all()
    assert torch.equal(trained.with_adapter(tmp_path / "out"), trained.logits(trained.make()))


HALF = [torch.bfloat16, torch.float16]


def halved(trained: Trained, dtype: torch.dtype) -> None:
    """The adapter as it is saved when it was trained in half precision."""
    path = trained.folder / "adapter_model.safetensors"
    factors = {name: factor.to(dtype) for name, factor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(factors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", ["linear", "embedding", "conv2d", "fused conv1d"])
def test_adapters_in_half_precision_are_edited_exactly(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trained = Trained(case, tmp_path)
    halved(trained, dtype)
    result = mitigate(trained.base, trained.folder, tmp_path / "out", factor=0.0, which="all", k=3, epsilon=0.8)
    before, after = open_checkpoint(trained.folder), open_checkpoint(tmp_path / "out")
    assert isinstance(before, Adapter) and isinstance(after, Adapter)
    in_words = str(dtype).removeprefix("torch.")
    changed = [name for name, info in after.updates.items() if info.rank > before.updates[name].rank]
    note = f"modules whose factors are stored in float32, for {in_words} would round the edit: {len(changed)}"
    assert changed and note in result.notes
    assert {after.updates[name].dtype for name in changed} == {torch.float32}
    assert all(after.updates[name].dtype == dtype for name in set(after.updates) - set(changed))
    base = {name: tensor.double() for name, tensor in trained.base.items()}
    tuned, edited = dict(base), dict(base)
    for name in before.updates:
        for adapter, state in ((before, tuned), (after, edited)):
            D = adapter.update(name)
            dense = LowRank(D.B.double(), D.A.double(), D.c).dense()
            state[name] = base[name] + (dense.T if case == "fused conv1d" else dense).reshape(base[name].shape)
    expected = mitigate(base, tuned, factor=0.0, which="all", k=3, epsilon=0.8, include=[f"{n}*" for n in changed])
    for name in changed:
        change = float((expected.tensors[name] - tuned[name]).norm())
        assert change > 0 and float((edited[name] - expected.tensors[name]).norm()) <= 1e-6 * change
    model = trained.make()
    model.load_state_dict({**tuned, **expected.tensors})
    logits = trained.logits(model.eval())
    found = trained.with_adapter(tmp_path / "out")
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize("dtype", HALF)
def test_peft_takes_wider_factors_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also on a base in half precision, where PEFT computes with the factors in float32."""
    trained = Trained("fused conv1d", tmp_path)
    halved(trained, dtype)
    edit(trained.base, trained.folder, Truncation(rank=1), tmp_path / "out", include="*.0.attn.c_attn.*")
    raw = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {factor.dtype for factor in raw.values()} == {dtype, torch.float32}
    model = peft.PeftModel.from_pretrained(trained.make().to(dtype), tmp_path / "out")
    state = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(state[name], factor.float()) for name, factor in raw.items())
    assert bool(trained.logits(model.eval()).isfinite().all())


def test_edits_that_half_precision_holds_leave_the_factors_in_it(tmp_path: Path) -> None:
    trained = Trained("fused conv1d", tmp_path)
    halved(trained, torch.bfloat16)
    result = edit(trained.base, trained.folder, Scaling(0.3), tmp_path / "out")
    assert result.changed > 0 and not any("float32" in note for note in result.notes)
    raw, new = (
        safetensors.torch.load_file(f / "adapter_model.safetensors") for f in (trained.folder, tmp_path / "out")
    )
    assert all(torch.equal(raw[name], new[name]) for name in raw)


def test_a_rewound_head_takes_its_trained_biases_back(tmp_path: Path) -> None:
    trained = Trained("trained biases", tmp_path)
    heads, width = gpt2().config.n_head, gpt2().config.n_embd  # type: ignore[union-attr]
    result = edit(trained.base, trained.folder, Rewinding(heads=[1], head_size=width // heads), tmp_path / "out")
    before, after = open_checkpoint(trained.folder), open_checkpoint(tmp_path / "out")
    name = "transformer.h.0.attn.c_attn.bias"
    base, old, new = (X[name].reshape(3, heads, -1) for X in (trained.base, before, after))
    assert torch.equal(new[:, 1], base[:, 1]) and not torch.equal(old[:, 1], base[:, 1])
    assert torch.equal(new[:, 0], old[:, 0]) and any("taken along" in note for note in result.notes)


def test_one_part_of_a_fused_module_can_be_rewound(tmp_path: Path) -> None:
    """Of c_attn the rows of q go back: B's rows are zero there, and the rank stays."""
    trained = Trained("fused conv1d", tmp_path)
    edit(trained.base, trained.folder, Rewinding(), tmp_path / "out", include="*.0.attn.c_attn.weight[q]")
    before, after = open_checkpoint(trained.folder), open_checkpoint(tmp_path / "out")
    assert isinstance(before, Adapter) and isinstance(after, Adapter)
    name = "transformer.h.0.attn.c_attn.weight"
    old, new = before.update(name), after.update(name)
    width = old.shape[0] // 3
    assert new.rank == old.rank and not new.B[:width].any() and torch.equal(new.B[width:], old.B[width:])


def test_whole_tensors_beside_the_factors_are_edited_too(tmp_path: Path) -> None:
    trained = Trained("patterns", tmp_path)
    edit(trained.base, trained.folder, Scaling(0.5), tmp_path / "out", include="head.weight")
    raw, new = (
        safetensors.torch.load_file(f / "adapter_model.safetensors") for f in (trained.folder, tmp_path / "out")
    )
    name = next(name for name in raw if "head" in name and name.endswith("weight"))
    torch.testing.assert_close(new[name], (raw[name] + trained.base["head.weight"]) / 2)
    assert all(torch.equal(new[other], raw[other]) for other in raw if other != name)


def test_a_peft_model_in_memory_gives_its_new_updates() -> None:
    base = zoo.zoo()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["bare"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter)
    result = edit(state, model, Mitigation(0.0, "all", 3, 0.9))
    (name,) = result.updates
    assert name == "bare.weight" and result.updates[name].rank > 2


def test_parts_with_their_own_factors_are_stacked() -> None:
    generator = np.random.default_rng(0)
    whole = LowRank(*(torch.from_numpy(generator.normal(size=size)) for size in ((6, 2), (2, 4))), 0.5)
    other = LowRank(*(torch.from_numpy(generator.normal(size=size)) for size in ((2, 1), (1, 4))), 2.0)
    grown = LowRank(torch.cat([whole.B[2:4], torch.ones(2, 1)], 1), torch.cat([whole.A, torch.ones(1, 4)]), 0.5)
    found = joined(whole, [(torch.arange(2), other), (torch.arange(2, 4), grown)])
    expected = whole.dense()
    expected[:2], expected[2:4] = other.dense(), grown.dense()
    torch.testing.assert_close(found.dense(), expected)
    assert found.rank == 2 + 1 + 1 and found.c == 0.5

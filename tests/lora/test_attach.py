"""Adapted models: nothing changes at step 0, only the factors learn, and what cannot be adapted is named."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spectra.cache import SpectrumCache
from spectra.errors import SpectraError
from spectra.linalg.svd import Spectrum
from spectra.lora import SliceConfig, attach, attachment, mean_gradients, merge, slice_init
from spectra.lora.layers import plain_factors
from spectra.lora.record import adapted_layers

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.lora.zoo import KINDS, Zoo, bert, gpt2, inputs, train, vit, zoo, zoo_loss  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OWN: dict[str, dict[str, Any]] = {
    "slice": {"position": 0.5},
    "orthonormal": {"method": "slice", "start": 2, "scale": "orthonormal", "alpha": 6.0},
    "pissa": {},
    "milora": {"use_rslora": True, "alpha": 2.0},
    "random": {},
    "random slice": {"method": "random", "position": 1.0},
    "lora": {},
    "lora_ga": {"alpha": 16.0},
}
PEFTS = ["true", "false", "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica", "lora_ga"]


def gradients(model: Zoo, config: SliceConfig) -> dict[str, Tensor]:
    dtype = model.head.weight.dtype
    return mean_gradients(model, [inputs(dtype)], lambda m, batch: m(**batch).float().square().mean(), config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OWN)
def test_no_method_changes_any_kind_of_module_at_step_0(name: str, dtype: torch.dtype) -> None:
    config = SliceConfig(**{"rank": 3, "method": name, "target_modules": KINDS, **OWN[name]})
    model = zoo(dtype)
    with torch.no_grad():
        expected = {kind: [] for kind in KINDS} | {"": [model(**inputs(dtype))]}
        hooks = [model.get_submodule(kind).register_forward_hook(recorder(expected[kind])) for kind in KINDS]
        model(**inputs(dtype))
        for hook in hooks:
            hook.remove()
        found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        adapted = attach(model, config, gradients=gradients(model, config) if name == "lora_ga" else None)
        for kind in KINDS:
            adapted.get_base_model().get_submodule(kind).register_forward_hook(recorder(found[kind]))
        output = adapted(**inputs(dtype))
    for kind in KINDS:
        assert torch.equal(found[kind][0], expected[kind][0]), kind
    assert torch.equal(output, expected[""][0])
    for layer in adapted_layers(adapted).values():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {factor.dtype for factor in layer.trained()} == {wide}
        assert layer.trained()[0].any() or layer.trained()[1].any()


def recorder(kept: list[Tensor]) -> Any:
    return lambda module, arguments, output: kept.append(output)


@pytest.mark.parametrize("init", PEFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_initialisation_of_peft_changes_the_model_or_its_weights(init: str, dtype: torch.dtype) -> None:
    model = zoo(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(**inputs(dtype))
    targets = ["biased", "bare", *(["turned"] if init != "olora" else [])]
    config = SliceConfig(rank=4, method=f"peft:{init}", target_modules=targets)
    kept = torch.random.get_rng_state()
    adapted = attach(model, config, gradients=gradients(model, config) if init == "lora_ga" else None)
    assert torch.equal(torch.random.get_rng_state(), kept)
    assert torch.equal(adapted(**inputs(dtype)), expected)
    plain = adapted.unload().state_dict()
    assert all(torch.equal(plain[name], before[name]) for name in before)


def test_start_0_is_pefts_own_pissa() -> None:
    ours = adapted_layers(attach(zoo(), SliceConfig(rank=3, start=0, target_modules=["biased", "turned"], alpha=6.0)))
    for name in ("biased", "turned"):
        options = {"r": 3, "lora_alpha": 6, "target_modules": [name], "fan_in_fan_out": name == "turned"}
        layer = peft.get_peft_model(zoo(), peft.LoraConfig(**options, init_lora_weights="pissa")).get_submodule(
            f"base_model.model.{name}"
        )
        A, B = ours[name].trained()
        for j in range(3):
            sign = torch.sign(A[j] @ layer.lora_A["default"].weight[j])
            torch.testing.assert_close(sign * A[j], layer.lora_A["default"].weight[j], atol=1e-4, rtol=0)
            torch.testing.assert_close(sign * B[:, j], layer.lora_B["default"].weight[:, j], atol=1e-4, rtol=0)


def test_only_the_factors_and_whole_modules_learn() -> None:
    adapted = attach(zoo(), SliceConfig(rank=3, position=0.5, target_modules=KINDS, modules_to_save=["head"]))
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or ".modules_to_save." in name for name in learning)
    assert len(learning) == 2 * len(KINDS) + 2
    for change in (lambda: None, lambda: disable_and_enable(adapted), adapted.train):
        change()
        assert {name for name, p in adapted.named_parameters() if p.requires_grad} == learning
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    train(adapted, zoo_loss)
    moved = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == learning


def disable_and_enable(model: Any) -> None:
    with model.disable_adapter():
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_those_of_a_frozen_residual(dtype: torch.dtype) -> None:
    """dL/dA = c B^T G and dL/dB = c G A^T with G the gradient by the weight, also where the base is rounded."""
    config = SliceConfig(rank=3, position=0.5, alpha=6.0, target_modules=KINDS)
    model = zoo(dtype)
    G = mean_gradients(model, [None], lambda m, _: zoo_loss(m), config)
    adapted = attach(model, config)
    zoo_loss(adapted).backward()
    for name, layer in adapted_layers(adapted).items():
        B, A = plain_factors(layer.kind, *(factor.detach() for factor in layer.trained()))
        grads = plain_factors(layer.kind, *(factor.grad for factor in layer.trained()))  # type: ignore[arg-type]
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        wholes = layer.scaling * G[name] @ A.T, layer.scaling * B.T @ G[name]
        if name == "table":  # peft's padding row learns nothing, as torch's does not
            assert not grads[0][0].any()
        for got, exact in zip(grads, wholes, strict=True):
            assert float((got - exact).norm()) <= tolerance * float(exact.norm()), name


def test_a_seed_and_a_name_fix_the_factors() -> None:
    def factors(seed: int, targets: list[str]) -> Tensor:
        torch.manual_seed(seed + 100)
        config = SliceConfig(rank=3, method="random", seed=seed, target_modules=targets)
        return adapted_layers(attach(zoo(), config))["bare"].trained()[0].detach()

    assert torch.equal(factors(1, ["bare"]), factors(1, ["biased", "bare"]))
    assert not torch.allclose(factors(1, ["bare"]), factors(2, ["bare"]))


def test_patterns_choose_rank_scaling_and_slice_and_the_first_match_counts() -> None:
    config = SliceConfig(
        rank=2, position=1.0, alpha=4.0, target_modules=["b*", "turned", "table"], exclude=["tab*"],
        rank_pattern={"bare": 5, "b*": 3}, alpha_pattern={"b*": 6.0}, start_pattern={"turned": 4},
    )  # fmt: skip
    adapted = attach(zoo(), config)
    slots = attachment(adapted).slots
    found = {name: (slot.rank, slot.scaling, slot.start) for name, slot in slots.items()}
    assert found == {"biased": (3, 2.0, 9), "bare": (5, 6 / 5, 4), "turned": (2, 2.0, 4)}
    model = zoo()
    init = slice_init(model.turned.weight.T, start=4, rank=2, scaling=2.0)
    torch.testing.assert_close(adapted_layers(adapted)["turned"].trained()[0].detach(), init.A0)
    assert slots["turned"].singular_values == pytest.approx(init.singular_values.tolist())  # type: ignore[union-attr]


def test_the_second_slice_of_a_sweep_decomposes_nothing(tmp_path: Path) -> None:
    spectra: dict[str, Spectrum] = {}
    cache = SpectrumCache(tmp_path)
    options: dict[str, Any] = {"rank": 2, "target_modules": KINDS}
    first = attach(zoo(), SliceConfig(position=0.0, **options), spectra=spectra, cache=cache)
    assert (cache.hits, cache.misses) == (0, len(KINDS))
    kept = dict(spectra)
    second = attach(first.unload(), SliceConfig(position=0.7, **options), spectra=spectra, cache=cache)
    assert (cache.hits, cache.misses) == (0, len(KINDS))
    assert all(spectra[name] is kept[name] for name in kept)
    attach(second.unload(), SliceConfig(position=1.0, **options), cache=tmp_path)
    again = SpectrumCache(tmp_path)
    attach(zoo(), SliceConfig(position=1.0, **options), cache=again)
    assert (again.hits, again.misses) == (len(KINDS), 0)


def test_a_spectrum_kept_from_before_training_is_not_taken_for_the_tuned_weights() -> None:
    spectra: dict[str, Spectrum] = {}
    config = SliceConfig(rank=2, position=0.0, target_modules=["biased"])
    adapted = attach(zoo(), config, spectra=spectra)
    train(adapted, zoo_loss, rate=1.0)
    with pytest.raises(SpectraError, match=r"'biased': the spectrum .* is not of this weight"):
        attach(merge(adapted), config, spectra=spectra)


def test_the_modules_are_chosen_as_peft_would_and_it_is_said() -> None:
    note = attachment(attach(bert(), SliceConfig(rank=2, position=0.5))).notes[0]
    assert note == "adapting query, value, which peft adapts in models of type bert: 4 modules"
    record = attachment(attach(vit(), SliceConfig(rank=2, position=0.5)))
    assert len(record.slots) == 12
    assert "classifier" not in record.slots
    assert record.notes[0] == "adapting all linear layers, without classifier: 12 modules"
    everything = attachment(attach(gpt2(), SliceConfig(rank=2, position=0.5, target_modules="all-linear")))
    assert len(everything.slots) == 8
    assert "lm_head" not in everything.slots
    assert {*attachment(attach(zoo(), SliceConfig(rank=2, position=0.5))).slots} == {"biased", "bare", "turned"}


def refused(words: str, model: nn.Module | None = None, **settings: Any) -> None:
    """Attaching is refused in these words, and the model is as it was."""
    model = model or zoo()
    modules, flags = [*model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(SpectraError, match=words) as caught:
        attach(model, SliceConfig(**{"rank": 2, "position": 0.5, **settings}))
    assert "\n" not in str(caught.value)
    assert [*model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags


def test_what_carries_no_lora_is_refused_by_name() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    refused("'attention.out_proj' carries no LoRA: MultiheadAttention reads", attention, target_modules=["out_proj"])
    refused("'attention' carries no LoRA: a MultiheadAttention, and only", attention, target_modules=["attention"])
    encoder = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 16)})
    refused("'layer.linear1' carries no LoRA: the fast path", encoder, target_modules=["linear1"])
    tied = gpt2()
    refused("'transformer.wte' .* shares its weight with 'lm_head'", tied, target_modules=["wte"])
    refused(
        "'0' carries no LoRA: a Conv2d with groups", nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), target_modules="0"
    )
    refused("'0' .* max_norm", nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), target_modules="0")
    parametrised = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    refused("'0' .* computed from others", parametrised, target_modules="0")
    refused("'0' .* meta device", nn.Sequential(nn.Linear(4, 4, device="meta")), target_modules="0")
    refused(
        "'0' .* stored as float8_e4m3fn", nn.Sequential(nn.Linear(4, 4).to(torch.float8_e4m3fn)), target_modules="0"
    )
    refused("'bare' holds 1 NaN", not_finite(), target_modules=["bare"])


def not_finite() -> Zoo:
    model = zoo()
    with torch.no_grad():
        model.bare.weight[0, 0] = torch.nan
    return model


def test_slips_in_the_configuration_are_refused() -> None:
    refused("'quary' of target_modules matches no module", target_modules=["quary"])
    refused("'x\\*' of exclude matches no module", exclude=["x*"])
    refused("'head' of rank_pattern matches no module", rank_pattern={"head": 2})
    refused("'biased' is 20 x 12 and has no slice of rank 13; give it a rank of at most 12", rank=13)
    refused("'bare': the slice \\[8, 10\\)", position=None, start=8)
    refused("no module of Zoo is left", exclude=["*"])
    refused("'bare' is to be adapted and to be trained whole", modules_to_save=["bare"])
    refused("matched by start_pattern and by position_pattern", start_pattern={"b*": 0}, position_pattern={"bare": 1.0})
    refused("gradient", method="lora_ga", position=None)
    refused("exclude 'turned'", method="peft:olora", position=None)
    refused("quantises", method="peft:loftq", position=None)
    refused("pass the batches", method="peft:corda", position=None)
    refused("Unknown initialization", method="peft:nonsense", position=None)
    refused("linear layers, and 'table' is of kind", method="peft:pissa", position=None, target_modules=KINDS)
    adapted = attach(zoo(), SliceConfig(rank=2, position=0.5))
    refused("carries an adapter already", adapted)
    for words, settings in {
        "needs a start or a position": {},
        "give one of them": {"start": 0, "position": 0.0},
        "takes no position": {"method": "pissa", "position": 0.0},
        "is no method": {"method": "pisssa"},
        "whole number": {"rank": 0, "start": 0},
        "above 0": {"alpha": -1.0, "start": 0},
        "takes a list": {"exclude": "bare", "start": 0},
        "target_modules is 5; give a list": {"target_modules": 5, "start": 0},
        "stands alone": {"target_modules": ["all-linear", "bare"], "start": 0},
        "no scale": {"scale": "sigma", "start": 0},
        "dropout": {"dropout": 1.0, "start": 0},
    }.items():
        with pytest.raises(SpectraError, match=words):
            SliceConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(SpectraError, match="'ranks' is no setting"):
        SliceConfig.from_dict({"ranks": 3})
    with pytest.raises(SpectraError, match="Zoo carries no slices"):
        attachment(zoo())


def test_a_peft_that_fails_half_way_leaves_the_model_as_it_was() -> None:
    """peft's pissa refuses float64 after it has replaced modules."""
    refused("peft cannot adapt this Zoo: .*float", zoo(torch.float64), method="peft:pissa", position=None)


def test_a_failure_after_peft_froze_the_base_unfreezes_it() -> None:
    """peft runs the model for EVA once its layers are in place."""
    model = bert()
    modules, flags = [*model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(SpectraError, match="peft cannot adapt this BertForSequenceClassification: "):
        attach(model, SliceConfig(rank=2, method="peft:eva"), batches=[{"input_ids": torch.full((1, 3), 10_000)}])
    assert [*model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert any(flags)


def test_devices_that_are_not_there_are_refused() -> None:
    for device in ("abacus", "cuda:99"):
        with pytest.raises(SpectraError, match=f"device '{device}' cannot be used"):
            attach(zoo(), SliceConfig(rank=2, position=0.5), device=device)


def test_dead_components_are_told() -> None:
    model = zoo()
    with torch.no_grad():
        model.bare.weight[5:] = 0
    adapted = attach(model, SliceConfig(rank=3, start=4, target_modules=["bare", "biased"]))
    (note,) = attachment(adapted).notes
    assert note.startswith("2 of the 3 components of 'bare' have singular value zero")


def test_dropout_does_not_change_step_0_in_training_mode() -> None:
    model = zoo().train()
    expected = model(**inputs())
    adapted = attach(model, SliceConfig(rank=3, position=0.0, target_modules=["biased", "kernel"], dropout=0.5)).train()
    assert torch.equal(adapted(**inputs()), expected)
    train(adapted, zoo_loss)
    assert not torch.allclose(adapted(**inputs()), adapted(**inputs()))


def test_corda_and_eva_look_at_the_batches() -> None:
    ids = [{"input_ids": torch.arange(12).reshape(2, 6) + k} for k in range(8)]
    for init in ("corda", "eva") if find_spec("attr") else ("eva",):
        torch.manual_seed(0)
        model = bert().eval()
        with torch.no_grad():
            expected = model(**ids[0]).logits
        adapted = attach(model, SliceConfig(rank=2, method=f"peft:{init}"), batches=ids).eval()
        with torch.no_grad():
            assert torch.equal(adapted(**ids[0]).logits, expected)


def test_eva_takes_every_row_of_what_has_no_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [{"pixel_values": torch.randn(8, 3, 16, 16, generator=generator)} for _ in range(3)]
    model = vit()
    with torch.no_grad():
        expected = model(**images[0]).logits
    adapted = attach(model, SliceConfig(rank=2, method="peft:eva"), batches=images)
    with torch.no_grad():
        assert torch.equal(adapted(**images[0]).logits, expected)
    for layer in adapted_layers(adapted).values():
        A, _ = layer.trained()
        torch.testing.assert_close(A @ A.T, torch.eye(2), atol=1e-5, rtol=0)  # directions, and no random numbers
    with pytest.raises(SpectraError, match="peft:eva runs the model on its named arguments, and a batch is a tuple"):
        attach(vit(), SliceConfig(rank=2, method="peft:eva"), batches=[(images[0]["pixel_values"],)])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"start": 1.5}, r"start is 1\.5; give a whole number from 0 up"),
        ({"start": True}, "start is True"),
        ({"start": -1}, "start is -1"),
        ({"position": 2.0}, r"position is 2\.0; give a number from 0"),
        ({"position": "0.5"}, r"position is '0\.5'; give a number from 0"),
        ({"position": float("nan")}, "position is nan"),
        ({"start_pattern": {"query": 1.5}}, r"start_pattern\['query'\] is 1\.5"),
        ({"position_pattern": {"query": 1.5}}, r"position_pattern\['query'\] is 1\.5"),
        ({"position": 0.5, "alpha": "8"}, "alpha is '8'"),
        ({"position": 0.5, "seed": 0.5}, r"seed is 0\.5"),
        ({"position": 0.5, "dropout": "a"}, "dropout is 'a'"),
        ({"position": 0.5, "gamma": None}, "gamma is None"),
    ],
)
def test_values_that_are_no_numbers_are_refused_when_they_are_given(values: dict[str, Any], words: str) -> None:
    with pytest.raises(SpectraError, match=words):
        SliceConfig(**values)


def test_numbers_of_numpy_become_plain_ones() -> None:
    config = SliceConfig(rank=np.int64(4), position=np.float32(0.5), rank_pattern={"query": np.int64(2)})
    assert json.dumps(config.to_dict()) == json.dumps(
        SliceConfig(rank=4, position=0.5, rank_pattern={"query": 2}).to_dict()
    )

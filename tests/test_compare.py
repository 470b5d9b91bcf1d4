"""compare(): the main job as a whole, on state dicts, files and real weights."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import spectra
from spectra.comparing import ComparisonInterrupted
from spectra.definitions import definitions
from spectra.frames import COMPONENTS, IDENTITY, MEASURES, RESIDUALS, SLICES, SOLVERS, STORED, UNMATCHED
from spectra.labels import labelled

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pair() -> tuple[Weights, Weights]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.query": (24, 24), "0.value": (24, 24), "1.up": (40, 24), "1.down": (24, 40)}
    base = {f"layer.{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    base["layer.0.query.bias"] = torch.randn(24, generator=generator)
    tuned = {name: W + 0.05 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    return base, tuned


def test_every_column_is_there_and_has_its_definition(pair: tuple[Weights, Weights]) -> None:
    result = spectra.compare(*pair)
    assert list(result.layers) == [*IDENTITY, *STORED, *MEASURES, *SOLVERS, *RESIDUALS]
    assert list(result.components) == ["tuned", "name", *COMPONENTS]
    assert list(result.slices) == ["tuned", "name", *SLICES]
    assert list(result.unmatched) == list(UNMATCHED)
    for table in (result.layers, result.components, result.slices, result.unmatched):
        assert set(table) <= set(definitions())
    assert (result.layers.status == "compared").all()
    assert result.unmatched.name.tolist() == ["layer.0.query.bias"]
    always = [column for column in MEASURES if not column.startswith("low_rank")]
    assert result.layers[always].notna().all(axis=None)


def test_the_rows_do_not_depend_on_the_order_of_the_tuned_models_or_the_number_of_workers(
    pair: tuple[Weights, Weights],
) -> None:
    base, tuned = pair
    other = {name: 1.1 * W for name, W in base.items()}
    one = spectra.compare(base, {"a": tuned, "b": other}, workers=1)
    two = spectra.compare(base, {"b": other, "a": tuned}, workers=3)
    keys = ["tuned", "name"]
    pd.testing.assert_frame_equal(
        one.layers.sort_values(keys, ignore_index=True), two.layers.sort_values(keys, ignore_index=True)
    )
    keys = ["tuned", "name", "component"]
    pd.testing.assert_frame_equal(
        one.components.sort_values(keys, ignore_index=True), two.components.sort_values(keys, ignore_index=True)
    )


def test_a_tuned_model_gets_the_same_rows_alone_and_in_company(pair: tuple[Weights, Weights]) -> None:
    base, tuned = pair
    alone = spectra.compare(base, {"a": tuned})
    company = spectra.compare(base, {"z": {name: 2 * W for name, W in base.items()}, "a": tuned})
    pd.testing.assert_frame_equal(
        company.layers[company.layers.tuned == "a"].reset_index(drop=True), alone.layers.reset_index(drop=True)
    )


def test_scaled_weights_move_singular_values_and_nothing_else(pair: tuple[Weights, Weights]) -> None:
    base, _ = pair
    layers = spectra.compare(base, {name: 1.25 * W for name, W in base.items()}).layers
    np.testing.assert_allclose(layers.diagonal_share, 1, atol=1e-6)
    np.testing.assert_allclose(layers.relative_update, 0.25, rtol=1e-6)
    np.testing.assert_allclose(layers.spectral_shift, 0.25, rtol=1e-6)
    np.testing.assert_allclose(layers.cosine, 1, atol=1e-12)
    assert (layers.intruders == 0).all()


def test_identical_weights_are_unchanged_and_cost_no_decomposition(pair: tuple[Weights, Weights]) -> None:
    base, _ = pair
    result = spectra.compare(base, {name: W.clone() for name, W in base.items()})
    assert (result.layers.status == "unchanged").all()
    assert (result.layers.relative_update == 0).all()
    assert (result.layers.base_algorithm == "").all()
    assert len(result.components) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_matrix_that_is_not_finite_fails_alone_and_by_name(
    pair: tuple[Weights, Weights], bad: float, side: str
) -> None:
    base, tuned = ({name: W.clone() for name, W in weights.items()} for weights in pair)
    (base if side == "base" else tuned)["layer.1.up.weight"][3, 5] = bad
    layers = spectra.compare(base, {"tuned": tuned}).layers.set_index("name")
    failed = layers.loc["layer.1.up.weight"]
    assert failed.status == "failed"
    assert "'layer.1.up.weight'" in failed.note
    assert ("1 NaN" if bad != bad else "1 infinite") in failed.note
    assert ("in memory" in failed.note) and "sound run" in failed.note
    assert (layers.drop("layer.1.up.weight").status == "compared").all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_that_is_mostly_storage_rounding_is_flagged(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(64, 48, generator=generator)
    noise = torch.randn(64, 48, generator=generator)
    base = {"fc.weight": W.to(dtype)}
    small = spectra.compare(base, {"fc.weight": (W + 1e-4 * noise).to(dtype)}).layers.iloc[0]
    large = spectra.compare(base, {"fc.weight": (W + 1e-1 * noise).to(dtype)}).layers.iloc[0]
    assert small.below_rounding_floor
    assert not large.below_rounding_floor
    assert small.rounding_floor == pytest.approx(large.rounding_floor)


def test_a_float64_pair_is_compared_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    D = 1e-9 * torch.randn(30, 20, generator=generator, dtype=torch.float64)
    row = spectra.compare({"fc.weight": W}, {"fc.weight": W + D}).layers.iloc[0]
    assert row.base_algorithm == "gesdd64"
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    C = U.T @ ((W + D) - W) @ Vh.T
    expected = float((torch.diagonal(C) ** 2).sum() / torch.linalg.norm((W + D) - W) ** 2)
    assert row.diagonal_share == pytest.approx(expected, rel=1e-6)


def test_a_saved_comparison_comes_back_whole(pair: tuple[Weights, Weights], tmp_path: Path) -> None:
    result = spectra.compare(*pair)
    again = spectra.load(result.save(tmp_path / "deep" / "out"))
    for table in ("layers", "components", "slices", "unmatched"):
        pd.testing.assert_frame_equal(getattr(again, table), getattr(result, table))
    assert again.provenance["options"] == result.provenance["options"]
    assert not [path for path in (tmp_path / "deep" / "out").iterdir() if path.name.startswith(".")]


def test_loading_what_is_no_comparison_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(spectra.SpectraError, match="holds no saved comparison"):
        spectra.load(tmp_path)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(spectra.SpectraError, match="format"):
        spectra.load(tmp_path)


def test_an_interruption_keeps_the_finished_rows(pair: tuple[Weights, Weights]) -> None:
    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(ComparisonInterrupted) as interruption:
        spectra.compare(*pair, workers=1, progress=stop)
    kept = interruption.value.comparison
    assert len(kept.layers) == 1
    assert kept.provenance["interrupted"]
    assert len(kept.components) == 24


def test_progress_reaches_its_end_and_names_every_matrix(pair: tuple[Weights, Weights]) -> None:
    steps: list[tuple[int, int, str]] = []
    spectra.compare(*pair, progress=lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1]
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert {name for _, _, name in steps} == {name for name in pair[0] if name.endswith("weight")}


def test_the_provenance_names_inputs_versions_and_solvers(pair: tuple[Weights, Weights], tmp_path: Path) -> None:
    import hashlib

    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for path, weights in zip(paths, pair, strict=True):
        save_file(weights, path)
    provenance = spectra.compare(paths[0], paths[1]).provenance
    digest = hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert provenance["base"]["files"] == {str(paths[0]): digest}
    assert list(provenance["tuned"]) == ["tuned"]
    assert provenance["algorithms"]["base"] == {"gram64": 4}
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["threads_per_worker"] == 1


def test_threads_are_given_back(pair: tuple[Weights, Weights]) -> None:
    before, running = torch.get_num_threads(), threading.active_count()
    spectra.compare(*pair, workers=2)
    assert torch.get_num_threads() == before
    assert threading.active_count() == running


@pytest.mark.parametrize(
    ("sources", "labels"),
    [
        (["runs/a/model.safetensors", "runs/b/model.safetensors"], ["a", "b"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/full.pt"], ["full"]),
        (["x/full/pytorch_model.bin"], ["full"]),
        (["a/s1/m.pt", "b/s2/m.pt", "a/s2/m.pt"], ["a/s1/m", "b/s2/m", "a/s2/m"]),
    ],
)
def test_labels_are_what_tells_the_paths_apart(
    sources: list[str], labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in sources:
        path = tmp_path / source
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
        else:
            path.mkdir()
    assert list(labelled(sources)) == labels


def test_labels_of_things_in_memory(pair: tuple[Weights, Weights]) -> None:
    base, tuned = pair
    assert list(labelled(tuned)) == ["tuned"]
    assert list(labelled({"state_dict": tuned, "epoch": 3})) == ["tuned"]
    assert list(labelled([tuned, base])) == ["tuned 1", "tuned 2"]
    assert list(labelled({"model": tuned, "optimizer": {"state": {}}})) == ["tuned"]
    assert list(labelled({"one": tuned, "two": base})) == ["one", "two"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu9"}, "no device"),
        ({"device": "meta"}, "not supported"),
        ({"slices": 0}, "at least 1"),
        ({"epsilon": 2.0}, "between 0 and 1"),
    ],
)
def test_impossible_options_are_one_sentence(
    pair: tuple[Weights, Weights], options: dict[str, object], message: str
) -> None:
    with pytest.raises(spectra.SpectraError, match=message):
        spectra.compare(*pair, **options)  # type: ignore[arg-type]


def test_no_tuned_model_is_one_sentence(pair: tuple[Weights, Weights]) -> None:
    with pytest.raises(spectra.SpectraError, match="no tuned checkpoint"):
        spectra.compare(pair[0], [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_cpu_numbers(pair: tuple[Weights, Weights]) -> None:
    here, there = spectra.compare(*pair, device="cpu").layers, spectra.compare(*pair, device="cuda").layers
    for column in MEASURES:
        np.testing.assert_allclose(there[column].astype(float), here[column].astype(float), rtol=1e-5, atol=1e-6)


def test_a_merged_adapter_shows_its_own_rank_whatever_its_dtype() -> None:
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(96, 64, generator=generator)
    D = 0.05 * torch.randn(96, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        row = spectra.compare({"fc.weight": W.to(dtype)}, {"fc.weight": (W.to(dtype) + D).to(dtype)}).layers.iloc[0]
        assert row.numerical_rank == row.low_rank == 4, dtype


def test_a_dense_model_gets_the_same_rows_beside_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(24, 40), "down": torch.nn.Linear(40, 24)})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in weights.items()}
    dense = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}
    both = spectra.compare(weights, {"adapter": tmp_path, "dense": dense})
    alone = spectra.compare(weights, {"dense": dense})
    pd.testing.assert_frame_equal(
        both.components[both.components.tuned == "dense"].reset_index(drop=True), alone.components
    )
    pd.testing.assert_frame_equal(
        both.layers[both.layers.tuned == "dense"].reset_index(drop=True), alone.layers.reset_index(drop=True)
    )
    of_adapter = both.layers[both.layers.tuned == "adapter"].set_index("name")
    assert of_adapter.status.to_dict() == {"up.weight": "compared", "down.weight": "unchanged"}
    assert of_adapter.update_form["up.weight"] == "low rank"
    assert of_adapter.numerical_rank["up.weight"] == 3


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """36 more layers are 104 MB more of weights; what stays of them is their rows."""
    program = (
        "import sys, spectra; spectra.compare(sys.argv[1], sys.argv[2], workers=1);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for layers in (12, 48):
        generator = torch.Generator().manual_seed(0)
        base = {f"layers.{i}.q_proj.weight": torch.randn(600, 600, generator=generator) for i in range(layers)}
        paths = [str(tmp_path / f"{layers}-{side}.safetensors") for side in ("base", "tuned")]
        save_file(base, paths[0])
        save_file({name: 1.5 * W.flip(0) for name, W in base.items()}, paths[1])
        done = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 50


def test_float8_weights_are_compared_also_with_themselves() -> None:
    generator = torch.Generator().manual_seed(6)
    base = {"fc.weight": torch.randn(16, 24, generator=generator).to(torch.float8_e4m3fn)}
    tuned = {"fc.weight": torch.randn(16, 24, generator=generator).to(torch.float8_e4m3fn)}
    assert spectra.compare(base, base).layers.status.tolist() == ["unchanged"]
    row = spectra.compare(base, tuned).layers.iloc[0]
    D = tuned["fc.weight"].double() - base["fc.weight"].double()
    assert row.update_norm == pytest.approx(float(torch.linalg.norm(D)), rel=1e-6)


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 8)})
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up"])).save_pretrained(tmp_path)
    with pytest.raises(spectra.SpectraError, match="is an adapter and no base"):
        spectra.compare(tmp_path, weights)


def test_infinities_on_both_sides_are_not_unchanged(pair: tuple[Weights, Weights]) -> None:
    base, tuned = ({name: W.clone() for name, W in weights.items()} for weights in pair)
    for weights in (base, tuned):
        weights["layer.1.up.weight"].fill_(float("inf"))
    failed = spectra.compare(base, tuned).layers.set_index("name").loc["layer.1.up.weight"]
    assert failed.status == "failed"
    assert "960 infinite" in failed.note


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_zero_weight_has_no_directions_and_says_so(pair: tuple[Weights, Weights], side: str) -> None:
    base, tuned = ({name: W.clone() for name, W in weights.items()} for weights in pair)
    (base if side == "base" else tuned)["layer.1.up.weight"].zero_()
    result = spectra.compare(base, {"tuned": tuned})
    row = result.layers.set_index("name").loc["layer.1.up.weight"]
    assert row.status == "compared"
    assert f"the {side} weight is all zero" in row.note
    assert pd.isna(row.intruders)
    assert np.isnan(row.left_overlap)
    if side == "base":
        assert np.isnan(row.relative_update)
        assert np.isnan(row.diagonal_share)
    assert np.isfinite(result.layers.relative_update.drop(row.name, errors="ignore").dropna()).all()


def test_an_interruption_while_hashing_keeps_every_row(
    pair: tuple[Weights, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(checkpoint: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectra.comparing.fingerprint", stop)
    with pytest.raises(ComparisonInterrupted) as interruption:
        spectra.compare(*pair)
    assert len(interruption.value.comparison.layers) == 4


def test_an_interruption_names_what_was_not_reached(pair: tuple[Weights, Weights]) -> None:
    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(ComparisonInterrupted) as interruption:
        spectra.compare(*pair, workers=1, progress=stop)
    unmatched = interruption.value.comparison.unmatched
    assert unmatched.reason.str.contains("not reached").sum() == 3


def test_one_pattern_may_be_a_string_and_a_wrong_dtype_is_named(pair: tuple[Weights, Weights]) -> None:
    assert spectra.compare(*pair, include="*query*").layers.name.tolist() == ["layer.0.query.weight"]
    with pytest.raises(spectra.SpectraError, match=r"torch\.float16"):
        spectra.compare(*pair, dtype=torch.float16)


def test_a_cache_changes_no_row_and_saves_the_base(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    shapes = {"up": (180, 130), "down": (130, 180), "query": (130, 130), "small": (24, 24)}
    base = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    pair = base, {name: W + 0.05 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    plain = spectra.compare(*pair)
    first, second = (spectra.compare(*pair, cache=tmp_path / "cache") for _ in range(2))
    assert first.provenance["cache"]["misses"] == second.provenance["cache"]["hits"] == 3  # small ones are not kept
    for result in (first, second):
        pd.testing.assert_frame_equal(result.layers, plain.layers, check_exact=True)
        pd.testing.assert_frame_equal(result.components, plain.components, check_exact=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_whose_squares_leave_float64_fail_alone() -> None:
    W = torch.randn(200, 150, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    base = {"huge.weight": W * 1e200, "small.weight": W[:60, :60] * 1e200, "sound.weight": W}
    tuned = {name: weight * 1.01 for name, weight in base.items()}
    layers = spectra.compare(base, tuned).layers.set_index("name")
    assert layers.status.to_dict() == {"huge.weight": "failed", "small.weight": "failed", "sound.weight": "compared"}
    assert "leave the range of float64" in layers.note["huge.weight"]

"""Small matrices are measured together, and nobody can tell: rows, failures and progress are each matrix's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import spectra
from spectra.comparing import ComparisonInterrupted
from spectra.comparison import Comparison
from spectra.engines import batching
from spectra.engines.batching import Batch, batched
from spectra.jobs import Job, Settings
from spectra.linalg.lapack import LapackError
from spectra.measures.stack import measure_stack
from spectra.pairing import pair

Weights = dict[str, Tensor]
SETTINGS = Settings(None, 8, 10, 0.5, False)
CPU = torch.device("cpu")


def heads(count: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.head.weight": torch.randn(*shape, generator=generator).to(dtype) for i in range(count)}


def tuned_from(base: Weights, seed: int = 1, size: float = 0.05) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: (W + size * torch.randn(W.shape, generator=generator)).to(W.dtype) for name, W in base.items()}


def jobs_of(base: Weights, **tuned: Weights) -> list[Job]:
    pairings = {
        label: pair(spectra.open_checkpoint(base), spectra.open_checkpoint(weights)) for label, weights in tuned.items()
    }
    names = [item.matrix.name for item in next(iter(pairings.values())).pairs]
    by_name = {(label, item.matrix.name): item for label, pairing in pairings.items() for item in pairing.pairs}
    return [Job(tuple((label, by_name[label, name]) for label in tuned)) for name in names]


def only(result: Comparison, names: list[str]) -> list[pd.DataFrame]:
    tables = (result.layers, result.components, result.slices)
    return [table[table.name.isin(names)].reset_index(drop=True) for table in tables]


def assert_equal_rows(one: list[pd.DataFrame], other: list[pd.DataFrame]) -> None:
    for left, right in zip(one, other, strict=True):
        pd.testing.assert_frame_equal(left, right, check_exact=True)


# What goes together


def test_matrices_of_one_shape_and_dtype_go_together_and_others_do_not() -> None:
    base = {**heads(6, (8, 12)), "other.weight": torch.eye(12, 8), "half.weight": torch.eye(8, 12).half()}
    base["large.weight"] = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    units = batched(jobs_of(base, a=tuned_from(base)), SETTINGS, [CPU])
    assert isinstance(units[0], Job)  # the longest first
    assert units[0].matrix.name == "large.weight"
    assert sorted(len(unit.jobs) for unit in units) == [1, 1, 1, 6]
    assert sum(isinstance(unit, Batch) for unit in units) == 3


def test_batches_are_bounded_and_there_is_one_for_each_worker() -> None:
    base = heads(40, (64, 64))
    jobs = jobs_of(base, a=tuned_from(base))
    assert [len(unit.jobs) for unit in batched(jobs, SETTINGS, [CPU])] == [40]
    assert [len(unit.jobs) for unit in batched(jobs, SETTINGS, [CPU] * 3)] == [13, 13, 14]
    many = batched(jobs * 30, SETTINGS, [CPU])
    assert max(len(unit.jobs) for unit in many) * 64 * 64 * 8 <= batching.CPU_BYTES
    assert sum(len(unit.jobs) for unit in many) == 1200


def test_on_another_device_every_dense_matrix_goes_by_shape_and_by_free_memory(tmp_path: Path) -> None:
    """`meta` stands for a device that does not tell what is free: a fixed budget then."""
    device = torch.device("meta")
    base = heads(5, (700, 900))
    jobs = jobs_of(base, a=tuned_from(base))
    sizes = [len(unit.jobs) for unit in batched(jobs * 20, SETTINGS, [device])]
    assert sum(sizes) == 100
    assert 1 < max(sizes) * 8 * 700 * 900 * 6 < batching.DEVICE_BYTES
    assert max(len(unit.jobs) for unit in batched(jobs * 20, SETTINGS, [device, device])) <= max(sizes) / 2 + 1
    fast = Settings(None, 8, 10, 0.5, True)
    assert all(isinstance(unit, Job) for unit in batched(jobs, fast, [device]))


# Rows


@pytest.mark.parametrize("shape", [(64, 64), (17, 33), (40, 13), (5, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_is_the_same_bits_alone_and_in_any_company(shape: tuple[int, int], dtype: torch.dtype) -> None:
    base = heads(60, shape, dtype)
    tuned = tuned_from(base)
    for name in list(base)[:3]:
        base[name][:, 1:] = 0  # these need another solver than the rest of their batch
    everything = spectra.compare(base, {"a": tuned}, workers=1)
    for some in (list(base)[:1], list(base)[30:31], list(base)[1:50:7]):
        result = spectra.compare({n: base[n] for n in some}, {"a": {n: tuned[n] for n in some}}, workers=2)
        assert_equal_rows(only(result, some), only(everything, some))


def test_five_hundred_experts_have_the_rows_that_each_has_alone() -> None:
    base = heads(500, (16, 24))
    tuned = tuned_from(base)
    everything = spectra.compare(base, {"a": tuned})
    assert (everything.layers.status == "compared").all()
    for name in list(base)[::100]:
        alone = spectra.compare({name: base[name]}, {"a": {name: tuned[name]}})
        assert_equal_rows(only(alone, [name]), only(everything, [name]))


def test_a_row_does_not_depend_on_the_other_tuned_models() -> None:
    base = heads(5, (20, 30))
    a, b = tuned_from(base, 1), tuned_from(base, 2)
    del b["layers.2.head.weight"]
    both = spectra.compare(base, {"b": b, "a": a})
    alone = spectra.compare(base, {"a": a})
    mine = [table[table.tuned == "a"].reset_index(drop=True) for table in only(both, list(base))]
    assert_equal_rows(mine, only(alone, list(base)))


def test_numbers_agree_with_an_svd() -> None:
    base = heads(12, (32, 48))
    tuned = tuned_from(base)
    layers = spectra.compare(base, tuned).layers.set_index("name")
    for name, W in base.items():
        W64, D = W.double().numpy(), (tuned[name].double() - W.double()).numpy()
        U, s, Vh = np.linalg.svd(W64, full_matrices=False)
        C = U.T @ D @ Vh.T
        row = layers.loc[name]
        assert row.diagonal_share == pytest.approx(np.sum(np.diag(C) ** 2) / np.sum(D**2), abs=1e-9)
        assert row.spectral_norm_base == pytest.approx(s[0], rel=1e-12)
        assert row.nuclear_norm_update == pytest.approx(np.linalg.svd(D, compute_uv=False).sum(), rel=1e-9)


# Failures


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_fails_alone(side: str, bad: float) -> None:
    base = heads(6, (12, 12))
    tuned = tuned_from(base)
    sound = spectra.compare(base, {"a": tuned})
    (base if side == "base" else tuned)["layers.3.head.weight"][2, 1] = bad
    result = spectra.compare(base, {"a": tuned})
    row = result.layers.set_index("name").loc["layers.3.head.weight"]
    assert row.status == "failed"
    assert "'layers.3.head.weight' in state dict in memory holds 1" in row.note
    others = [name for name in base if name != "layers.3.head.weight"]
    assert_equal_rows(only(result, others), only(sound, others))


def test_a_batch_of_nothing_but_broken_matrices_says_so_of_each() -> None:
    base = {name: torch.full_like(W, torch.nan) for name, W in heads(3, (6, 6)).items()}
    result = spectra.compare(base, {"a": heads(3, (6, 6))})
    assert (result.layers.status == "failed").all()
    assert result.layers.note.str.contains("36 NaN").all()


def test_a_file_that_breaks_off_fails_where_it_breaks_off(tmp_path: Path) -> None:
    base = heads(6, (12, 12))
    torch.save(tuned_from(base), tmp_path / "tuned.pt")
    path = tmp_path / "tuned.safetensors"
    save_file(tuned_from(base), path)
    checkpoint = spectra.open_checkpoint(path)
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(len(content) - 100)  # after the headers were read
    result = spectra.compare(base, {"a": checkpoint})
    assert set(result.layers.status) == {"compared", "failed"} or (result.layers.status == "failed").all()
    assert len(result.layers) == 6
    assert (result.layers.note[result.layers.status == "failed"] != "").all()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, LapackError])
def test_a_batch_that_is_too_large_is_halved_and_gives_the_same_rows(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = heads(9, (10, 14))
    tuned = tuned_from(base)
    sound = spectra.compare(base, {"a": tuned, "b": tuned_from(base, 5)}, workers=1)
    sizes = []

    def limited(W: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(W))
        if len(W) > 2:
            raise error("too many")
        return measure_stack(W, *arguments, **options)

    monkeypatch.setattr(batching, "measure_stack", limited)
    result = spectra.compare(base, {"a": tuned, "b": tuned_from(base, 5)}, workers=1)
    assert sizes[0] == 9
    assert_equal_rows(only(result, list(base)), only(sound, list(base)))


def test_a_matrix_that_does_not_fit_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(batching, "measure_stack", never)
    base = heads(3, (10, 14))
    layers = spectra.compare(base, tuned_from(base)).layers
    assert (layers.status == "failed").all()
    assert layers.note.str.contains("10 x 14 did not fit into memory; use fewer workers or another device").all()


def test_where_stacked_solvers_fail_a_single_matrix_has_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise LapackError("no convergence")

    base = heads(3, (20, 14))
    tuned = tuned_from(base)
    sound = spectra.compare(base, tuned).layers
    monkeypatch.setattr(batching, "spectra", never)
    layers = spectra.compare(base, tuned).layers
    assert (layers.status == "compared").all()
    np.testing.assert_allclose(layers.stable_rank, sound.stable_rank, rtol=1e-6)
    np.testing.assert_allclose(layers.diagonal_share, sound.diagonal_share, atol=1e-6)


# Matrices that two tuned models share


@pytest.mark.parametrize("shape", [(20, 30), (200, 180)], ids=["in batches", "one at a time"])
def test_identical_tuned_matrices_are_measured_once_and_each_model_gets_its_row(shape: tuple[int, int]) -> None:
    base = heads(4, shape)
    a = tuned_from(base, 1)
    b = {name: W.clone() for name, W in a.items()}
    b["layers.2.head.weight"][3, 4] += 1.0
    b["layers.3.head.weight"] = base["layers.3.head.weight"].clone()
    renamed = {f"module.{name}": W for name, W in b.items()}
    result = spectra.compare(base, {"a": a, "b": renamed})
    assert result.provenance["notes"][-1] == (
        "b: bit-identical to a in 2 of the matrices, which were measured once for both"
    )
    layers = result.layers.set_index(["tuned", "name"])
    alone = spectra.compare(base, {"b": renamed})
    for table, expected in zip(only(result, list(base)), only(alone, list(base)), strict=True):
        mine = table[table.tuned == "b"].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, expected, check_exact=True)
    assert (
        layers.loc[("b", "layers.2.head.weight")].update_norm != layers.loc[("a", "layers.2.head.weight")].update_norm
    )
    assert layers.loc[("b", "layers.3.head.weight")].status == "unchanged"


def test_what_differs_in_dtype_alone_is_not_the_same() -> None:
    base = heads(2, (20, 30))
    a = {name: W.bfloat16() for name, W in tuned_from(base).items()}
    b = {name: W.float() for name, W in a.items()}
    result = spectra.compare(base, {"a": a, "b": b})
    assert not any("bit-identical" in note for note in result.provenance["notes"])
    assert result.layers.tuned_dtype.tolist() == ["bfloat16"] * 2 + ["float32"] * 2


@pytest.mark.parametrize("shape", [(6, 6), (200, 180)])
def test_identical_broken_matrices_fail_each_in_its_own_words(shape: tuple[int, int]) -> None:
    base = heads(1, shape)
    broken = {name: torch.full_like(W, torch.nan) for name, W in base.items()}
    layers = spectra.compare(base, {"a": broken, "b": {"state_dict": broken}}).layers
    assert layers.status.tolist() == ["failed", "failed"]
    assert layers.note.str.contains(f"{shape[0] * shape[1]} NaN").all()


# The rest of a run


def test_progress_names_every_matrix_of_a_batch_and_reaches_its_end() -> None:
    base = heads(30, (12, 12))
    steps: list[tuple[int, int, str]] = []
    spectra.compare(base, tuned_from(base), progress=lambda *step: steps.append(step))
    assert sorted(name for _, _, name in steps) == sorted(base)
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert steps[-1][0] == steps[-1][1]


def test_an_interruption_keeps_the_batches_that_were_finished() -> None:
    base = {**heads(6, (30, 30)), **{f"small.{i}.weight": W for i, W in enumerate(heads(5, (8, 9)).values())}}

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(ComparisonInterrupted) as interruption:
        spectra.compare(base, tuned_from(base), workers=1, progress=stop)
    kept = interruption.value.comparison
    assert sorted(kept.layers.name) == sorted(heads(6, (30, 30)))
    assert kept.unmatched.reason.str.contains("not reached").sum() == 5


def test_small_matrices_are_not_kept_in_a_cache(tmp_path: Path) -> None:
    base = {**heads(4, (16, 16)), "large.weight": torch.randn(150, 140, generator=torch.Generator().manual_seed(3))}
    tuned = tuned_from(base)
    plain = spectra.compare(base, tuned)
    kept = spectra.compare(base, tuned, cache=tmp_path / "cache")
    assert kept.provenance["cache"]["misses"] == len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert_equal_rows(only(kept, list(base)), only(plain, list(base)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_every_stored_dtype_is_upcast_before_any_kernel(dtype: torch.dtype) -> None:
    base = heads(3, (14, 18), dtype)
    tuned = heads(3, (14, 18), dtype, seed=4)
    layers = spectra.compare(base, tuned).layers.set_index("name")
    assert (layers.status == "compared").all()
    assert set(layers.base_algorithm) == {"gesdd64" if dtype == torch.float64 else "gram64"}
    for name, W in base.items():
        assert layers.update_norm[name] == pytest.approx(float((tuned[name].double() - W.double()).norm()), rel=1e-9)


def test_fast_iterates_where_that_is_the_faster_way() -> None:
    small, large = heads(3, (64, 64)), heads(2, (160, 200))
    fast = spectra.compare(small, tuned_from(small), fast=True).layers
    assert fast.equals(spectra.compare(small, tuned_from(small)).layers)  # all values come cheaper than a few
    assert set(spectra.compare(large, tuned_from(large), fast=True).layers.tuned_algorithm) == {"lanczos"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fast", [False, True])
def test_cuda_gives_the_rows_of_the_cpu(dtype: torch.dtype, fast: bool) -> None:
    base = {
        **heads(8, (64, 64), dtype),
        "large.weight": torch.randn(300, 500, generator=torch.Generator().manual_seed(3)).to(dtype),
    }
    tuned = tuned_from(base)
    tuned["large.weight"] = (base["large.weight"] + torch.outer(torch.ones(300), torch.ones(500))).to(dtype)
    there, here = (spectra.compare(base, tuned, device=device, fast=fast) for device in ("cuda", "cpu"))
    assert there.provenance["tf32"] is False
    assert (there.layers.status == "compared").all()
    for column in ("update_norm", "diagonal_share", "outside_share", "stable_rank", "lowest_best_cosine", "cosine"):
        np.testing.assert_allclose(there.layers[column], here.layers[column], rtol=1e-4, atol=1e-5, err_msg=column)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_that_is_nearly_full_halves_its_batches() -> None:
    free, _ = torch.cuda.mem_get_info()
    base = heads(40, (512, 512))
    units = batched(jobs_of(base, a=tuned_from(base)), SETTINGS, [torch.device("cuda")])
    taken = torch.empty(max(free - (200 << 20), 0), dtype=torch.uint8, device="cuda")  # after the batches were planned
    outcomes = [outcome for unit in units for outcome in unit.run(SETTINGS, torch.device("cuda"))]
    del taken
    assert {outcome.status for outcome in outcomes} == {"compared"}

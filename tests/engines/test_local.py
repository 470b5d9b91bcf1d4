"""The loop over jobs: every job once, each worker on a place of its own, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
import torch

import spectra
from spectra.engines.devices import ieee_products, named_devices, spread
from spectra.engines.local import run, run_on
from spectra.errors import SpectraError


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_is_done_once_and_told_with_its_index(workers: int) -> None:
    assert sorted(run(lambda job: job * job, range(20), workers)) == [(i, i * i) for i in range(20)]


def test_each_worker_has_a_place_of_its_own() -> None:
    """Two "devices", two workers: both work at once, and never two of them in one place."""
    busy: Counter[str] = Counter()
    lock, met = threading.Lock(), threading.Barrier(2, timeout=20)
    crowded = []

    def work(job: int, place: str) -> str:
        with lock:
            busy[place] += 1
            crowded.append(busy[place] > 1)
        if job < 2:
            met.wait()  # the first two are under way together, so that they cannot share a place
        time.sleep(0.001)
        with lock:
            busy[place] -= 1
        return place

    done = dict(run_on(work, range(30), ["left", "right"]))
    assert set(done) == set(range(30))
    assert {done[0], done[1]} == {"left", "right"}
    assert not any(crowded)


def test_a_place_is_given_back_when_its_job_fails() -> None:
    def work(job: int, place: str) -> int:
        if job == 0:
            raise ValueError("the first one fails")
        return job

    with pytest.raises(ValueError, match="the first one"):
        list(run_on(work, range(3), ["only"]))


@pytest.mark.parametrize("places", [["a"], ["a", "b"]])
def test_stopping_early_starts_no_further_job(places: list[str]) -> None:
    started: list[int] = []
    found = run_on(lambda job, place: started.append(job), range(50), places)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert len(started) <= 2 * len(places)


def test_the_same_rows_come_from_one_place_and_from_two(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"{i}.weight": torch.randn(20 + i % 3, 20, generator=generator) for i in range(12)}
    tuned = {name: W + 0.1 for name, W in base.items()}
    one = spectra.compare(base, tuned, workers=1)
    monkeypatch.setattr("spectra.comparing.named_devices", lambda names: [torch.device("cpu"), torch.device("cpu", 0)])
    two = spectra.compare(base, tuned, workers=1)
    assert two.provenance["device"] == "cpu,cpu:0"
    assert two.provenance["workers"] == 2
    assert one.layers.equals(two.layers)
    assert one.components.equals(two.components)


def test_workers_take_the_devices_in_turn_and_each_device_has_one() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert spread([first, second], 1) == [first, second]
    assert spread([first, second], 3) == [first, second, first]
    assert spread([torch.device("cpu")], 4) == [torch.device("cpu")] * 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tpu9", "'tpu9' is no device"),
        ("cpu,cpu", "over CUDA devices only"),
        (["cpu", "mps"], "over CUDA devices only"),
        ("cuda:0,,cuda:1", "CUDA|no device"),
        ("", "'' is no device"),
        ([], "no device was named"),
        ("cpu,meta", "'meta' is not supported"),
    ],
)
def test_a_list_of_devices_that_makes_no_sense_is_one_sentence(names: str | list[str], message: str) -> None:
    with pytest.raises(SpectraError, match=message) as refusal:
        named_devices(names)
    assert "\n" not in str(refusal.value)
    with pytest.raises(SpectraError, match=message):
        spectra.compare({"w": torch.eye(2)}, {"w": torch.eye(2)}, device=names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(SpectraError, match="'cuda:0' was asked for and this machine or this torch has no CUDA"):
        named_devices("cuda:0,cuda:1")


def test_tf32_is_off_while_a_comparison_runs_and_as_it_was_afterwards() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    seen = []
    try:
        matmul.fp32_precision = "tf32"
        with ieee_products():
            seen.append(matmul.fp32_precision)
        weights = {"w.weight": torch.diag(torch.tensor([2.0, 1.0]))}
        tuned = {"w.weight": torch.eye(2)}
        spectra.compare(weights, tuned, progress=lambda *step: seen.append(matmul.fp32_precision))
        assert seen == ["ieee", "ieee"]
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cuda_devices_share_the_work() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"{i}.weight": torch.randn(200, 150, generator=generator) for i in range(8)}
    tuned = {name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    two = spectra.compare(base, tuned, device=["cuda:0", "cuda:1"])
    assert two.provenance["device"] == "cuda:0,cuda:1"
    assert two.provenance["tf32"] is False
    one = spectra.compare(base, tuned, device="cpu")
    assert (two.layers.intruders == one.layers.intruders).all()
    assert (two.layers.update_norm - one.layers.update_norm).abs().max() < 1e-6 * one.layers.update_norm.max()

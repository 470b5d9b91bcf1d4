"""Whole runs on a small plain network: where methods start, what moves, and that a run can be stopped anywhere."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import spectra
from spectra import SpectraError
from spectra.lora import merge
from spectra.report.sequence_scores import scores_beside
from spectra.training import METHODS, Run, Task, TensorExamples, TrainingInterrupted, load_run, train
from spectra.training.building import build
from spectra.training.examples import drawn, in_turn
from spectra.training.loop import _train_mode
from spectra.training.methods import Preparation, method_named
from spectra.training.saving import save_trained
from spectra.training.settings import TrainSettings
from spectra.training.state import draw_apart, random_state, restore_random_state, seeded
from spectra.training.tasks import evaluate
from tests.test_tensor_files import no_file_above
from tests.training.small import Base, WithNewHead, inputs, make_base, method_settings, new_task, old_task, run_small

pytest.importorskip("accelerate")
pytest.importorskip("peft")

PEFT = ["peft:true", "peft:gaussian", "peft:pissa", "peft:olora", "peft:orthogonal"]


def curve(run: Run) -> list[dict[str, Any]]:
    """All lines of the run but for the time they took."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(run: Run) -> dict[str, torch.Tensor]:
    (file,) = run.result.glob("*.safetensors")
    return load_file(file)


def assert_same(one: Run, two: Run) -> None:
    """The same curve, and weights that agree bit by bit."""
    assert curve(one) == curve(two)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", [*METHODS, *PEFT])
def test_every_method_starts_from_the_base_and_learns(tmp_path: Path, name: str) -> None:
    run = run_small(tmp_path, {"method": method_settings(name), "optimiser": {"steps": 30, "learning_rate": 2e-2}})
    metrics = run.metrics
    at_start = metrics[(metrics.step == 0) & (metrics.split == "old")]
    assert at_start.score.item() == 1.0  # the base's own labels: any change of its function would show
    with torch.no_grad():
        logits = make_base()(inputs())
    exact = torch.nn.functional.cross_entropy(logits, logits.argmax(1)).item()
    assert at_start.loss.item() == pytest.approx(exact, rel=1e-5)
    losses = metrics[metrics.split == "train"].loss
    assert losses[-6:].mean() < losses[:6].mean()
    assert run.summary["forgetting"] == pytest.approx(1.0 - metrics[metrics.split == "old"].score.iloc[-1])
    assert run.summary["forgetting"] == 0 or name != "head"


@pytest.mark.parametrize("name", ["full", "head", "slice", "lora_ga", "peft:pissa"])
def test_only_what_the_method_names_moves(tmp_path: Path, name: str) -> None:
    settings = TrainSettings.from_mapping({"method": method_settings(name)})
    built = build(settings, base=make_base(), task=new_task)
    examples = built.task.train
    assert examples is not None
    batch = examples.batch(range(16))
    model = method_named(name)(built.task, settings.method, Preparation(batches=lambda: [batch]))
    total, _, count = built.task.called_through(model).losses(batch)
    (total / count).backward()
    moved = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {key for key, parameter in model.named_parameters() if parameter.requires_grad} - unused(moved)
    if name == "full":
        assert moved == {key for key, _ in model.named_parameters() if "classifier" not in key}
    elif name == "head":
        assert moved == {"head.weight", "head.bias"}
    else:
        assert all("lora_" in key or ".modules_to_save." in key for key in moved)
        assert sum("lora_" in key for key in moved) == 4


def unused(moved: set[str]) -> set[str]:
    """The base's own head, which the new task does not call; only a full fine-tuning asks for its gradient."""
    return {f"body.classifier.{kind}" for kind in ("weight", "bias")} if "body.fc1.weight" in moved else set()


def test_head_alone_leaves_the_base_bit_by_bit(tmp_path: Path) -> None:
    base = make_base()
    run = run_small(tmp_path, {"method": method_settings("head")})
    assert isinstance(run.model, WithNewHead)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in run.model.body.state_dict().items())


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    model[1].requires_grad_(False)
    _train_mode(model)
    assert [module.training for module in model] == [True, False, True]


def test_given_base_stays_as_it_is(tmp_path: Path) -> None:
    base = make_base()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    spectra_kept: dict[str, Any] = {}
    for position in (0.0, 1.0):
        settings = {"method": {"name": "slice", "rank": 2, "position": position}, "optimiser": {"steps": 3}}
        train(
            settings, base=base, task=new_task, spectra=spectra_kept, out=str(tmp_path / str(position)), compare=False
        )
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert set(spectra_kept) == {"body.fc1", "body.fc2"}


def test_accumulated_step_is_the_step_of_the_large_batch(tmp_path: Path) -> None:
    """Also where batches hold unequal numbers of counted targets, which a mean of means would get wrong."""

    def partly(base: nn.Module) -> Task:
        task = new_task(base)
        assert isinstance(task.train, TensorExamples)
        labels = task.train.columns["labels"].clone()
        labels[::3] = -100
        model = nn.Sequential(
            base.fc1, nn.ReLU(), base.fc2, nn.Linear(16, 3)
        )  # no dropout: batches draw their own masks
        torch.nn.init.constant_(model[3].weight, 0.1)
        torch.nn.init.zeros_(model[3].bias)
        train = TensorExamples({"input": task.train.columns["x"], "labels": labels})
        return Task(model, train=train, test=train, head=("3",))

    runs = [
        train(
            {
                "method": {"name": "full"},
                "optimiser": {"name": "sgd", "steps": 4, "batch_size": size, "accumulate": times},
            },
            base=make_base(),
            task=partly,
            out=str(tmp_path / str(size)),
            compare=False,
        )
        for size, times in ((24, 1), (8, 3))
    ]
    one, two = (weights(run) for run in runs)
    assert all(torch.allclose(one[name], two[name], atol=1e-7) for name in one)


def test_same_seed_repeats_and_another_does_not(tmp_path: Path) -> None:
    one, two, other = (
        run_small(tmp_path / name, {"seed": seed, "optimiser": {"steps": 5}})
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert_same(one, two)
    assert curve(one) != curve(other)


def test_caller_keeps_its_random_numbers(tmp_path: Path) -> None:
    base = make_base()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(
        {"method": {"name": "head"}, "optimiser": {"steps": 1}, "compare": False, "out": str(tmp_path)},
        base=base,
        task=new_task,
    )
    assert torch.equal(torch.rand(3), expected)


class _Enough(Exception):
    pass


@pytest.mark.parametrize("name", ["full", "slice", "lora_ga"])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, name: str) -> None:
    changes = {"method": method_settings(name), "evaluate_every": 4, "save_every": 3}
    whole = run_small(tmp_path / "whole", changes)

    def stop_at(last: int) -> Any:
        def progress(step: int, steps: int, word: str) -> None:
            if step == last:
                raise _Enough

        return progress

    for last in (5, 10):  # two steps and one step after a save: they are lost, and made again
        with pytest.raises(_Enough):
            run_small(tmp_path / "parts", changes, resume=True, progress=stop_at(last))
    torch.manual_seed(99)
    parts = run_small(tmp_path / "parts", changes, resume=True)
    assert_same(whole, parts)
    timeless = {key: value for key, value in whole.summary.items() if key not in ("seconds", "peak_memory_mib")}
    assert timeless == {key: value for key, value in parts.summary.items() if key in timeless}
    assert not (parts.folder / "state.pt").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.small import run_small

def progress(step, steps, word):
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

run_small(Path(sys.argv[1]), {"evaluate_every": 5, "save_every": 3}, resume=True, progress=progress)
"""


def test_killed_process_loses_only_the_steps_since_the_last_save(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(SpectraError, match="not finished; go on with it by --resume"):
        load_run(tmp_path / "killed")
    # As a kill in the middle of writing would leave them:
    (tmp_path / "killed" / ".state.pt.abc.pt").write_bytes(b"half a state")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "spl')
    steps: list[int] = []
    changes = {"evaluate_every": 5, "save_every": 3}
    resumed = run_small(tmp_path / "killed", changes, resume=True, progress=lambda step, *_: steps.append(step))
    assert steps[0] == 7
    assert_same(run_small(tmp_path / "whole", changes), resumed)
    assert not [path.name for path in resumed.folder.iterdir() if path.name.startswith(".")]
    (resumed.folder / "state.pt").write_bytes(b"of a run that was killed after its last line")
    run_small(tmp_path / "killed", changes, resume=True)
    assert not (resumed.folder / "state.pt").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    def progress(step: int, steps: int, word: str) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted, match=r"interrupted after step 5; .*--resume goes on"):
        run_small(tmp_path / "parts", progress=progress)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(run_small(tmp_path / "whole"), run_small(tmp_path / "parts", resume=True))


def test_nan_loss_stops_in_one_sentence_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    def poisoned(base: nn.Module) -> Task:
        task = new_task(base)
        assert isinstance(task.train, TensorExamples)
        task.train.columns["x"][drawn(90, 0, 64, 65)] = float("nan")  # of the fifth step
        return task

    settings = {
        "method": {"name": "full"},
        "optimiser": {"steps": 6, "batch_size": 16},
        "out": str(tmp_path),
        "save_every": 1,
    }
    with pytest.raises(SpectraError) as raised:
        train(settings, base=make_base(), task=poisoned)
    message = str(raised.value)
    assert "\n" not in message
    assert "became nan at step" in message and "learning rate 0.000" in message and "last finite loss" in message
    step = int(message.split("at step ")[1].split()[0])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert step == 5
    assert state["step"] == step - 2  # the one after it gave this very loss
    assert all(torch.isfinite(value).all() for value in state["tensors"].values())
    assert not (tmp_path / "summary.json").exists()


def test_step_that_overflows_is_never_saved(tmp_path: Path) -> None:
    """Loss and gradient are finite, and only the weights after the step are not."""

    def large(base: nn.Module) -> Task:
        task = new_task(base)
        assert isinstance(task.train, TensorExamples)
        task.train.columns["x"].mul_(1e3)
        return task

    optimiser = {"name": "sgd", "learning_rate": 3e38, "schedule": "constant", "clip": 0, "steps": 3}
    settings = {"method": {"name": "full"}, "optimiser": optimiser, "save_every": 1, "out": str(tmp_path)}
    with pytest.raises(SpectraError, match=r"at step 1 .*no state had been saved yet; start again with --resume and a"):
        train(settings, base=make_base(), task=large)
    assert not (tmp_path / "state.pt").exists()


def test_folder_of_another_run_is_not_overwritten(tmp_path: Path) -> None:
    run = run_small(tmp_path / "run")
    before = (run.folder / "summary.json").read_text()
    with pytest.raises(SpectraError, match=r"other settings \(optimiser\.steps\)"):
        run_small(tmp_path / "run", {"optimiser": {"steps": 2}}, resume=True)
    with pytest.raises(SpectraError, match="this very run, finished; give --resume to show it again"):
        run_small(tmp_path / "run")
    assert run_small(tmp_path / "run", resume=True).summary == run.summary
    assert (run.folder / "summary.json").read_text() == before
    assert run_small(tmp_path / "run", {"optimiser": {"steps": 2}}, force=True).summary["steps"] == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(SpectraError, match="holds files that are no run"):
        run_small(tmp_path / "other")
    run_small(tmp_path / "other", force=True)
    assert (tmp_path / "other" / "thesis.tex").read_text() == "years of work"


def test_force_takes_away_nothing_but_a_run(tmp_path: Path) -> None:
    """A folder called `model` beside which a run is made may be the very base of it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_text("the only copy")
    with pytest.raises(SpectraError, match="holds 'model', which no run of this toolkit left there"):
        run_small(tmp_path, force=True)
    run = run_small(tmp_path / "run", {"method": method_settings("full")})
    for reads in ({"model": {"source": str(run.result)}}, {"data": {"train": str(run.folder / "metrics.jsonl")}}):
        with pytest.raises(SpectraError, match=r"lies in its own folder .*, where it would be replaced"):
            train({"out": str(run.folder), "method": {"name": "full"}, **reads}, force=True)
    assert (tmp_path / "model" / "weights.bin").exists() and (run.result / "model.safetensors").exists()
    assert load_run(run.folder).summary == run.summary


def test_resuming_from_another_base_or_a_broken_state_is_refused(tmp_path: Path) -> None:
    def progress(step: int, steps: int, word: str) -> None:
        if step == 6:
            raise _Enough

    with pytest.raises(_Enough):
        run_small(tmp_path, {"save_every": 3}, progress=progress)
    settings = TrainSettings.from_file(tmp_path / "settings.json")
    torch.manual_seed(8)
    with pytest.raises(SpectraError, match="the base is not the one"):
        train(settings, base=Base(), task=new_task, retain={"old": old_task}, resume=True)
    state = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(SpectraError, match=r"state\.pt is no saved state of a run"):
        run_small(tmp_path, {"save_every": 3}, resume=True)


@pytest.mark.parametrize("name", ["slice", "lora", "full"])
def test_result_reproduces_the_score_and_is_compared(tmp_path: Path, name: str) -> None:
    run = run_small(tmp_path, {"method": method_settings(name), "compare": True})
    assert run.model is not None
    model = merge(run.model) if name != "full" else run.model
    task = new_task(make_base()).called_through(model)
    assert evaluate(task, in_turn(task.test, 64))["score"] == run.summary["score"]
    layers = run.comparison.layers.set_index("name")
    assert set(layers.index[layers.status == "compared"]) == {"body.fc1.weight", "body.fc2.weight"}
    rank = {"slice": 8, "lora": 4, "full": 12}[name]
    assert layers.numerical_rank["body.fc1.weight"] == rank
    base = {f"body.{key}": value for key, value in make_base().state_dict().items()}
    again = spectra.compare(base, run.result).layers.set_index("name")
    wanted = layers.relative_update["body.fc2.weight"]
    assert again.relative_update["body.fc2.weight"] == pytest.approx(wanted, rel=1e-9)
    assert load_run(run.folder).summary == run.summary


def test_curves_show_both_tasks(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    run = load_run(run_small(tmp_path, {"evaluate_every": 4}).folder)
    axes = run.plot.curves()
    new, old = axes.get_lines()
    assert list(new.get_xdata()) == [0, 4, 8, 12] == list(old.get_xdata())
    assert old.get_ydata()[0] == 1.0
    assert new.get_ydata()[-1] == run.summary["score"]
    plt.close("all")


def test_gradients_that_a_base_comes_with_are_left_behind(tmp_path: Path) -> None:
    runs = []
    for name in ("clean", "stale"):
        base = make_base()
        if name == "stale":
            base(inputs()).square().sum().backward()
        settings = {
            "method": {"name": "full"},
            "optimiser": {"steps": 2},
            "compare": False,
            "out": str(tmp_path / name),
        }
        runs.append(train(settings, base=base, task=new_task, compare=False))
    assert_same(*runs)


def test_processes_draw_masks_of_their_own() -> None:
    drawn_numbers = []
    for process in range(3):
        with seeded(5):
            before = random_state(torch.device("cpu"))
            draw_apart(5, process)
            drawn_numbers.append((torch.rand(1).item(), float(np.random.rand()), random.random()))
            restore_random_state(before, torch.device("cpu"))
            first = torch.rand(1).item(), float(np.random.rand()), random.random()
    assert drawn_numbers[0] == first
    assert all(len({*numbers}) == 3 for numbers in zip(*drawn_numbers, strict=True))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """On the CPU, by gloo: gradients of the shares of a batch add up to that of the whole."""
    script = """
import sys
from pathlib import Path
from tests.training.small import run_small
run_small(Path(sys.argv[1]), {"device": "cpu", "optimiser": {"steps": 3}}, still=True)
"""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, sys.executable, "-c", script, str(tmp_path / "two")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    one = run_small(tmp_path / "one", {"device": "cpu", "optimiser": {"steps": 3}}, still=True)
    two = load_run(tmp_path / "two")
    assert (one.summary["processes"], two.summary["processes"]) == (1, 2)
    assert two.metrics[["step", "split", "score"]].equals(one.metrics[["step", "split", "score"]])
    assert two.metrics.loss.tolist() == pytest.approx(one.metrics.loss.tolist(), rel=1e-5)
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@pytest.mark.parametrize("name", ["slice", "full"])
def test_kept_steps_are_the_run_as_it_then_stood(tmp_path: Path, name: str) -> None:
    optimiser = {"schedule": "constant", "warmup": 0.0}
    changes = {"method": method_settings(name), "keep_every": 5, "optimiser": optimiser}
    run = run_small(tmp_path / "run", changes, still=True)
    kept = sorted(path.name for path in run.folder.glob("step-*"))
    assert kept == ["step-10", "step-12", "step-5"]
    scored = run.metrics.query("split == 'test'")["step"].tolist()
    assert scored == [0, 5, 10, 12]
    base = {f"body.{key}": value for key, value in make_base().state_dict().items()}
    tuned = {path.name: path for path in (run.folder / "step-5", run.folder / "step-12")}
    layers = spectra.compare(base, tuned).layers.set_index(["tuned", "name"])["relative_update"]
    # At a constant rate, a shorter run of the same seed is the beginning of a longer one.
    short = run_small(tmp_path / "short", {**changes, "optimiser": {**optimiser, "steps": 5}}, still=True)
    for folder, other in ((run.folder / "step-12", run.result), (run.folder / "step-5", short.result)):
        file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
        assert (folder / file).read_bytes() == (other / file).read_bytes()
    assert layers["step-5", "body.fc1.weight"] < layers["step-12", "body.fc1.weight"]
    assert not list(run_small(run.folder, {**changes, "keep_every": None}, force=True).folder.glob("step-*"))


def test_kept_steps_survive_a_kill_and_make_a_sequence(tmp_path: Path) -> None:
    def progress(step: int, steps: int, word: str) -> None:
        if step == 7:
            raise _Enough

    changes = {"keep_every": 3, "save_every": 2}
    with pytest.raises(_Enough):
        run_small(tmp_path / "parts", changes, progress=progress)
    parts, whole = run_small(tmp_path / "parts", changes, resume=True), run_small(tmp_path / "whole", changes)
    for step in (3, 6, 9, 12):
        files = (run.folder / f"step-{step}" / "adapter_model.safetensors" for run in (parts, whole))
        one, other = (file.read_bytes() for file in files)
        assert one == other
    base = {f"body.{key}": value for key, value in make_base().state_dict().items()}
    tuned = {path.name: path for path in whole.folder.glob("step-*")}
    scores, _ = scores_beside({name: str(path) for name, path in tuned.items()})
    metrics = whole.metrics.set_index(["split", "step"])["score"]
    assert scores["step-6"]["score"] == metrics["test", 6]
    assert scores["step-6"]["forgetting"] == pytest.approx(metrics["old", 0] - metrics["old", 6])
    assert set(spectra.compare(base, tuned).layers["tuned"]) == set(tuned)


def test_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    class Narrow(nn.Linear):
        """A layer for another number of inputs."""

    def wrong(base: nn.Module) -> Task:
        task = new_task(base)
        return Task(Narrow(5, 3), task.test, task.train)

    settings = {"method": {"name": "full"}, "optimiser": {"steps": 3}, "compare": False}
    with pytest.raises(SpectraError) as raised:
        train(settings, base=make_base(), task=wrong, out=str(tmp_path / "new" / "run"))
    message = str(raised.value)
    assert message.startswith("Narrow cannot be run on a batch of x 30 x 12, labels 30: ")
    assert "mend the task" in message and "\n" not in message
    assert not (tmp_path / "new").exists()
    run = run_small(tmp_path / "old")
    with pytest.raises(SpectraError, match="Narrow cannot be run"):
        train(settings, base=make_base(), task=wrong, out=str(run.folder), force=True)
    assert load_run(run.folder).summary == run.summary  # what was there is replaced after a first step only
    with pytest.raises(SpectraError, match="resume goes on with a run and force replaces it"):
        run_small(run.folder, resume=True, force=True)


def test_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    changes = {"optimiser": {"steps": 60}, "save_every": 0}
    with (
        no_file_above(5000),
        pytest.raises(SpectraError, match=r"cannot write .*metrics\.jsonl: .*go on with --resume"),
    ):
        run_small(tmp_path / "run", changes)
    assert_same(run_small(tmp_path / "run", changes, resume=True), run_small(tmp_path / "whole", changes))

    def progress(step: int, steps: int, word: str) -> None:
        if step == steps:
            (tmp_path / "last" / "summary.json").mkdir()

    with pytest.raises(SpectraError, match=r"cannot write .*summary\.json: .*go on with --resume"):
        run_small(tmp_path / "last", progress=progress)
    for name in ("slice", "full"):
        run = run_small(tmp_path / name, {"method": method_settings(name), "optimiser": {"steps": 1}})
        assert run.model is not None
        with no_file_above(1000), pytest.raises(SpectraError, match=r"cannot write .*more: .* go on with --resume"):
            save_trained(run.folder / "more", new_task(make_base()), run.model, is_adapter=name == "slice")
        assert not list(run.folder.glob("*more*"))


def test_run_goes_on_at_another_learning_rate_and_says_so(tmp_path: Path) -> None:
    def progress(step: int, steps: int, word: str) -> None:
        if step == 7:
            raise _Enough

    with pytest.raises(_Enough):
        run_small(tmp_path, progress=progress)  # saved after every second of 12 steps, without being asked to
    lower = {"optimiser": {"learning_rate": 1e-3}}
    with pytest.raises(SpectraError, match=r"\(optimiser\.learning_rate\); give --resume to go on with them"):
        run_small(tmp_path, lower)
    with pytest.raises(SpectraError, match=r"\(optimiser\.steps\); choose another folder"):
        run_small(tmp_path, {"optimiser": {"steps": 13}}, resume=True)
    run = run_small(tmp_path, lower, resume=True)
    assert "optimiser.learning_rate is 0.001 from step 7 on; it was 0.01 before" in run.summary["notes"]
    rates = run.metrics.query("split == 'train'").set_index("step").learning_rate
    assert rates[6] > 5e-3 and rates[7] < 1e-3
    assert TrainSettings.from_file(tmp_path / "settings.json").optimiser.learning_rate == 1e-3
    with pytest.raises(SpectraError, match=r"\(optimiser\.learning_rate\); choose another folder"):
        run_small(tmp_path, resume=True)  # it is finished


def test_run_that_diverged_goes_on_from_its_last_good_state(tmp_path: Path) -> None:
    wild = {"name": "sgd", "learning_rate": 300.0, "schedule": "constant", "warmup": 0.0, "clip": 0.0, "steps": 20}
    full = {"method": method_settings("full"), "save_every": 1}
    with pytest.raises(SpectraError, match=r"last good state is in .*; go on from there with --resume and a lower"):
        run_small(tmp_path, {**full, "optimiser": wild})
    tame = {**wild, "learning_rate": 1e-9, "clip": 1.0}
    run = run_small(tmp_path, {**full, "optimiser": tame}, resume=True)
    assert run.summary["steps"] == 20
    assert ["learning_rate is 1e-09" in note or "clip is 1 " in note for note in run.summary["notes"]] == [True, True]


def test_summary_counts_every_parameter_once_and_keeps_notes(tmp_path: Path) -> None:
    summary = run_small(tmp_path, {"optimiser": {"steps": 0}}).summary
    model = new_task(make_base()).model
    factors = 4 * (12 + 24) + 4 * (24 + 16)
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters()) + factors
    assert summary["trainable_parameters"] == factors + 16 * 3 + 3
    assert summary["notes"] == ["adapting all linear layers, without body.classifier, head: 2 modules"]
    assert (summary["steps"], summary["classes"], summary["data_sha256"]) == (0, None, {})


@pytest.mark.parametrize("name", ["full", "head"])
def test_weights_in_float16_are_not_trained(tmp_path: Path, name: str) -> None:
    settings = {"method": {"name": name}, "optimiser": {"steps": 3}, "out": str(tmp_path / "run")}
    with pytest.raises(SpectraError, match=r"would be trained in float16.* set model\.dtype to float32, and precision"):
        train(settings, base=make_base(), task=lambda base: _halved(new_task(base)))
    assert not (tmp_path / "run").exists()


def test_weights_in_bfloat16_are_trained_with_a_word_of_warning(tmp_path: Path) -> None:
    settings = {"method": {"name": "full"}, "optimiser": {"steps": 1}, "compare": False, "out": str(tmp_path / "run")}

    def narrow(base: nn.Module) -> Task:
        task = new_task(base)
        task.model.bfloat16()
        columns = {name: X.bfloat16() if name == "x" else X for name, X in task.train.columns.items()}  # type: ignore[union-attr]
        return Task(task.model, TensorExamples(columns), TensorExamples(columns), head=("head",))

    (note,) = train(settings, base=make_base(), task=narrow).summary["notes"]
    assert note.startswith("'body.fc1.weight' and 7 other parameters are trained in bfloat16, which rounds away steps")


class Noisy:
    """Examples that are augmented anew each time that they are drawn."""

    def __init__(self, examples: TensorExamples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        found = self.examples.batch(indices)
        return {**found, "x": found["x"] + 0.3 * torch.randn_like(found["x"])}


def noisy_task(base: nn.Module) -> Task:
    task = new_task(base)
    assert isinstance(task.train, TensorExamples)
    return replace(task, train=Noisy(task.train))


def test_how_often_a_run_is_saved_changes_none_of_its_numbers(tmp_path: Path) -> None:
    """Neither where examples are random, although saving looks ahead whether the next step has a loss."""

    def go(name: str, resume: bool = False, **others: Any) -> Run:
        settings = {"method": {"rank": 4, "position": 0.5}, "optimiser": {"steps": 8}, "compare": False}
        settings |= {"out": str(tmp_path / name), "save_every": others.pop("save_every", 3)}
        return train(settings, base=make_base(), task=noisy_task, resume=resume, **others)

    never = go("never", save_every=0)
    assert_same(never, go("often"))

    def progress(step: int, steps: int, word: str) -> None:
        if step == 5:
            raise _Enough

    with pytest.raises(_Enough):
        go("parts", progress=progress)
    assert_same(never, go("parts", resume=True))


def _halved(task: Task) -> Task:
    task.model.half()
    return task

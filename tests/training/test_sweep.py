"""Sweeps: the runs of a grid, whatever stops them, and step sizes that are matched."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from spectra.errors import SpectraError
from spectra.training import (
    Grid,
    Sweep,
    SweepInterrupted,
    TrainSettings,
    load_sweep,
    read_sweep_file,
    step_size_factor,
    sweep,
)
from spectra.training.settings import MethodSettings
from spectra.training.sweep_grid import plan
from spectra.training.sweep_matching import matched_rates, start_sizes
from spectra.training.sweep_result import COLUMNS, table_of
from tests.training.small import make_base, new_task, old_task, run_small

SETTINGS: dict[str, Any] = {
    "method": {"rank": 4},
    "optimiser": {"steps": 6, "batch_size": 16, "learning_rate_pattern": {"*head*": 2.0}},
}
GRID: dict[str, Any] = {"positions": [0.0, 1.0], "methods": ["full", "random"], "learning_rates": [1e-2]}


def swept(out: Path, grid: dict[str, Any] | None = None, **options: Any) -> Sweep:
    given: dict[str, Any] = {"workers": 0, "task": new_task, "retain": {"old": old_task}, **options}
    return sweep(SETTINGS, {**GRID, **(grid or {})}, out=out, base=make_base(), **given)


def assert_same(one: Sweep, other: Sweep) -> None:
    """Bit by bit, apart from how long it took."""
    pd.testing.assert_frame_equal(
        one.runs.drop(columns="seconds"), other.runs.drop(columns="seconds"), check_exact=True
    )


def first_head_weight(model: nn.Module) -> float:
    """A stand-in for a validation score that depends on what was trained."""
    return float(
        next(p for name, p in model.named_parameters() if "head" in name and p.requires_grad).detach().flatten()[0]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep with matched step sizes that nothing stopped, one run of it diverging."""
    out = tmp_path_factory.mktemp("whole") / "sweep"
    return swept(out, {"match_step_size": 0.5, "rates_of": {"full": [1e-2, 1e30]}}, validation=first_head_weight)


def test_the_table_has_a_row_a_run_and_all_columns(whole: Sweep) -> None:
    runs = whole.runs
    assert list(runs.columns) == list(COLUMNS)
    assert list(runs["method"]) == ["slice", "slice", "full", "full", "random"]
    finished = runs[runs["status"] == "finished"]
    numbers = [
        "score_before",
        "score",
        "validation_score",
        "loss",
        "forgetting",
        "steps",
        "relative_update",
        "diagonal_share",
    ]
    assert finished[numbers].notna().all(axis=None)
    assert (finished["retained_before"] == 1).all()
    assert ((finished["retained_before"] - finished["retained_after"]) == finished["forgetting"]).all()


def test_a_run_that_diverges_is_a_row_with_its_reason(whole: Sweep) -> None:
    (failed,) = whole.runs[whole.runs["status"] == "failed"].to_dict("records")
    assert failed["learning_rate"] == 1e30
    assert "became" in failed["reason"] and "learning_rate" in failed["reason"]
    assert math.isnan(failed["score"])
    assert "1 failed" in repr(whole)


def test_a_saved_table_is_read_back_as_it_was(whole: Sweep, tmp_path: Path) -> None:
    again = load_sweep(whole.save(tmp_path))
    pd.testing.assert_frame_equal(again.runs, whole.runs, check_exact=True)
    assert again.provenance["grid"]["match_step_size"] == 0.5


class Stop(Exception):
    """A crash of the process that runs a sweep."""


def test_stopped_half_way_and_gone_on_with_it_equals_one_that_was_not(whole: Sweep, tmp_path: Path) -> None:
    grid = {"match_step_size": 0.5, "rates_of": {"full": [1e-2, 1e30]}}
    seen: list[str] = []

    def crash(done: int, total: int, name: str) -> None:
        seen.append(name)
        if done == 2:
            raise Stop

    out = tmp_path / "sweep"
    with pytest.raises(Stop):
        swept(out, grid, validation=first_head_weight, progress=crash)
    assert len(load_sweep(out).runs) == 2
    # Killed between the end of a run and its row: the model is gone, and with it the validation score.
    (out / "runs" / seen[1] / "row.json").unlink()
    resumed = swept(out, grid, validation=first_head_weight, progress=lambda *given: seen.append(given[2]))
    assert_same(resumed, whole)
    assert seen[0] not in seen[1:]  # what was finished is not run again
    assert_same(load_sweep(out), whole)


SCRIPT = """
import sys
from spectra.training import sweep
from tests.training.small import make_base, new_task, old_task
from tests.training.test_sweep import GRID, SETTINGS

if __name__ == "__main__":
    grid = {**GRID, "match_step_size": 0.5, "rates_of": {"full": [1e-2, 1e30]}}
    sweep(SETTINGS, grid, out=sys.argv[1], base=make_base(), task=new_task, retain={"old": old_task}, workers=1,
          progress=lambda done, total, name: print(done, flush=True))
"""


@pytest.fixture
def in_another_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "sweep")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root,
    ) as process:  # fmt: skip
        yield process
        process.kill()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_with_its_workers_and_gone_on_with_here(
    in_another_process: subprocess.Popen[str], whole: Sweep, tmp_path: Path
) -> None:
    """A real kill -9 of the parent: its worker leaves with it, and what is left is gone on with by another engine."""
    assert in_another_process.stdout is not None and in_another_process.stderr is not None
    assert in_another_process.stdout.readline() == "1\n", in_another_process.stderr.read()
    workers = children(in_another_process.pid)
    in_another_process.kill()
    in_another_process.wait()
    wait_for_end(workers)
    out = tmp_path / "sweep"
    assert 0 < len(load_sweep(out).runs) < 5
    resumed = swept(out, {"match_step_size": 0.5, "rates_of": {"full": [1e-2, 1e30]}})
    without_validation = whole.runs.assign(validation_score=math.nan)
    assert_same(resumed, Sweep(without_validation))


def children(process: int) -> list[int]:
    task = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in task.read_text().split()] if task.exists() else []


def wait_for_end(processes: list[int]) -> None:
    """Return when they are gone; a zombie that nobody waits for counts as gone."""
    for process in processes:
        status = Path(f"/proc/{process}/stat")
        for _ in range(600):
            if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"the worker {process} outlived its parent")


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SweepInterrupted, match="goes on from there") as caught:
        swept(tmp_path / "sweep", {"methods": []}, progress=interrupt)
    assert len(caught.value.sweep.runs) == 1


def test_the_base_is_decomposed_once_for_all_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spectra.lora.attaching as attaching

    decomposed: list[tuple[int, ...]] = []
    original = attaching.svd

    def counted(W: torch.Tensor, dtype: torch.dtype) -> Any:
        decomposed.append(tuple(W.shape))
        return original(W, dtype)

    monkeypatch.setattr(attaching, "svd", counted)
    swept(tmp_path / "sweep", {"positions": [0.0, 0.25, 0.5, 1.0], "methods": []})
    assert sorted(decomposed) == [(16, 24), (24, 12)]


def test_other_settings_are_refused_and_a_larger_grid_is_not(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    swept(out, {"positions": [0.0], "methods": []})
    with pytest.raises(SpectraError, match=r"other settings \(optimiser.steps\)"):
        sweep(
            {**SETTINGS, "optimiser": {"steps": 7, "batch_size": 16, "learning_rate_pattern": {"*head*": 2.0}}},
            GRID, out=out, base=make_base(), task=new_task, workers=0, retain={"old": old_task},
        )  # fmt: skip
    with pytest.raises(SpectraError, match="began with another base"):
        base = make_base()
        base.fc1.weight.data[0, 0] += 1
        sweep(SETTINGS, GRID, out=out, base=base, task=new_task, workers=0)
    with pytest.raises(SpectraError, match="holds a sweep already"):
        swept(out, resume=False)
    done: list[str] = []
    grown = swept(out, {"positions": [0.0, 1.0], "methods": []}, progress=lambda *given: done.append(given[2]))
    assert done == ["slice-1.0_lr-0.01_seed-0"]
    assert list(grown.runs["position"]) == [0.0, 1.0]


def test_a_base_that_changed_in_its_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the settings tells the two apart: the base is what the same function gives, or the same folder."""
    (tmp_path / "made_anew.py").write_text(
        "from pathlib import Path\nimport torch\nfrom tests.training.small import Base\n"
        "def base():\n    torch.manual_seed(len(Path('seed').read_text()))\n    return Base()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {**SETTINGS, "model": {"factory": "made_anew:base"}}

    def again(*positions: float) -> Sweep:
        grid = {"positions": positions, "learning_rates": [1e-2]}
        return sweep(settings, grid, out=tmp_path / "sweep", task=new_task, workers=0)

    Path("seed").write_text("x")
    again(0.0)
    assert len(again(0.0, 1.0).runs) == 2
    Path("seed").write_text("xx")
    with pytest.raises(SpectraError, match="began with another base"):
        again(0.0, 1.0)


def test_examples_that_changed_since_are_refused(tmp_path: Path) -> None:
    """One table holds runs on the same examples, which watched the same tasks of the base's own."""
    from tests.training.test_continual import write_base
    from tests.training.test_files import write_rows

    file, out = tmp_path / "new.jsonl", tmp_path / "sweep"
    settings = {
        "model": {"source": write_base(tmp_path / "base")},
        "data": {"train": write_rows(file, 20, label=lambda text: "yes" if "c" in text else "no")},
        "method": {"rank": 2},
        "optimiser": {"steps": 1, "batch_size": 8},
    }

    def again(*positions: float, **options: Any) -> Sweep:
        return sweep(settings, {"positions": positions, "learning_rates": [1e-3]}, out=out, workers=0, **options)

    one = again(0.0)
    before, rows = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}, file.read_text()
    file.write_text("".join(reversed(rows.splitlines(keepends=True))))
    with pytest.raises(SpectraError, match=r"data\.train holds other examples than those that .*slice-0\.0_lr-0\.001"):
        again(0.0, 1.0)
    file.write_text(rows)
    with pytest.raises(SpectraError, match="seed-0 was made with none, and now 'own' is given; retain the same"):
        again(0.0, 1.0, retain={"own": old_task})
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    both = again(0.0, 1.0)
    pd.testing.assert_frame_equal(both.runs.head(1), one.runs, check_exact=True)
    summary = next(out.glob("runs/slice-1*/summary.json"))
    values = json.loads(summary.read_text())
    del values["data_sha256"]
    summary.write_text(json.dumps(values))
    with pytest.raises(SpectraError, match=r"slice-1.* is of an older version .* tells whether data\.train held"):
        again(0.0)
    summary.unlink()
    with pytest.raises(SpectraError, match=r"is missing; remove .*, and its run is run again"):
        again(0.0)


def test_a_folder_of_an_older_version_is_refused_in_a_sentence(tmp_path: Path) -> None:
    out, grid = tmp_path / "sweep", {"positions": [0.0], "methods": []}
    swept(out, grid)
    values = json.loads((out / "sweep.json").read_text())
    del values["base_sha256"]
    (out / "sweep.json").write_text(json.dumps(values))
    with pytest.raises(SpectraError, match="holds a sweep of an older version of spectra"):
        swept(out, grid)


def test_what_a_function_made_needs_no_fingerprint(tmp_path: Path) -> None:
    """And is not made once more only to ask for one."""
    made: list[str] = []

    def task(base: nn.Module) -> Any:
        made.append("task")
        return new_task(base)

    out, grid = tmp_path / "sweep", {"positions": [0.0], "methods": []}
    swept(out, grid, task=task)
    made.clear()
    swept(out, grid, task=task)
    assert not made


def test_force_is_advised_only_where_it_will_do(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for force in (False, True):
        with pytest.raises(SpectraError, match=r"holds 'adapter', which no run .*; move it away, or choose") as refused:
            run_small(tmp_path, force=force)
        assert "--force" not in str(refused.value)
    (tmp_path / "adapter").rename(tmp_path / "thesis")
    with pytest.raises(SpectraError, match="or --force to use it"):
        run_small(tmp_path)
    run_small(tmp_path, force=True)


def test_killed_while_another_run_is_taken_away_the_folder_stays_that_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import spectra.training.place as place

    class Killed(BaseException):
        pass

    def die(path: Path, **options: Any) -> None:
        raise Killed

    run_small(tmp_path, {"optimiser": {"steps": 2}})
    with monkeypatch.context() as patched:
        patched.setattr(place.shutil, "rmtree", die)
        with pytest.raises(Killed):
            run_small(tmp_path, {"optimiser": {"steps": 3}}, force=True)
    assert (tmp_path / "adapter").exists() and not (tmp_path / "summary.json").exists()
    with pytest.raises(SpectraError, match=r"other settings \(optimiser\.steps\); .* or give --force to replace it"):
        run_small(tmp_path, {"optimiser": {"steps": 3}})
    assert run_small(tmp_path, {"optimiser": {"steps": 3}}, force=True).summary["steps"] == 3


def test_runs_of_another_grid_in_the_folder_stay_in_the_table(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    wide = swept(out, {"positions": [0.0, 1.0], "methods": []})
    ran: list[tuple[int, int, str]] = []
    both = swept(
        out, {"positions": [0.0], "methods": [], "match_step_size": 0.5}, progress=lambda *given: ran.append(given)
    )
    assert ran == [(1, 1, "slice-0.0_lr-0.01_seed-0_matched-0.5")]
    assert list(both.runs["run"]) == [ran[0][2], *wide.runs["run"]]
    pd.testing.assert_frame_equal(both.runs.iloc[1:].reset_index(drop=True), wide.runs, check_exact=True)
    assert_same(load_sweep(out), both)
    with pytest.raises(SpectraError, match="the only run failed"):  # whatever else is in the folder
        swept(out, {"positions": [0.5], "methods": [], "learning_rates": [1e30]})
    assert list(swept(out, {"positions": [0.0], "methods": []}).runs["status"]) == ["finished"] * 3


def test_a_sweep_of_which_every_run_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SpectraError, match=r"the only run failed: .*became"):
        swept(tmp_path / "sweep", {"positions": [0.0], "methods": [], "learning_rates": [1e30]})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(SpectraError, match="no sweep"):
        swept(tmp_path / "other")


def test_functions_that_cannot_be_sent_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpectraError, match="workers=0"):
        swept(tmp_path / "sweep", workers=1, task=lambda base: new_task(base))


# Matched step sizes.


def test_the_factor_is_the_root_of_the_ratio_of_sums_of_singular_values() -> None:
    """Against numpy's SVD of the weights themselves."""
    base, task = make_base(), new_task(make_base())
    names = {"body.fc1": base.fc1, "body.fc2": base.fc2}
    rates = matched_rates(
        task,
        {"top": MethodSettings(position=0.0, rank=4), "end": MethodSettings(position=1.0, rank=4)},
        0.5,
        {},
        seed=0,
    )
    for module, layer in names.items():
        s = torch.linalg.svdvals(layer.weight.detach().double())
        middle = round(0.5 * (len(s) - 4))
        for which, cut in (("top", slice(0, 4)), ("end", slice(len(s) - 4, None))):
            expected = math.sqrt(s[middle : middle + 4].sum() / s[cut].sum())
            for factor in "AB":
                name = f"base_model.model.{module}.lora_{factor}.default.weight"
                assert rates[which][name] == pytest.approx(expected, rel=1e-6)


def test_matched_slices_take_first_steps_of_one_size() -> None:
    """Adam's first step moves every entry of A and B by eta: with eta matched, ||D|| is that of the reference."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(200, 150, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.01, 150).double() ** 2
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)

    def step(start: int, eta: float) -> float:
        s = S[start : start + 8].sqrt()
        B0, A0 = U[:, start : start + 8] * s, s[:, None] * Vh[start : start + 8]
        dB, dA = (eta * torch.randn(x.shape, generator=generator, dtype=torch.float64).sign() for x in (B0, A0))
        return float(torch.linalg.matrix_norm(dB @ A0 + B0 @ dA))

    reference = S[60:68].sum()
    for start in (0, 30, 142):
        eta = 1e-4 * step_size_factor(float(reference), float(S[start : start + 8].sum()))
        assert step(start, eta) == pytest.approx(step(60, 1e-4), rel=0.1)
    assert step(0, 1e-4) > 2 * step(60, 1e-4)  # unmatched, they differ


def test_patterns_of_the_settings_are_kept_and_multiplied_in() -> None:
    task = new_task(make_base())
    methods = {"top": MethodSettings(position=0.0, rank=4)}
    plain = matched_rates(task, methods, 0.5, {}, seed=0)["top"]
    both = matched_rates(task, methods, 0.5, {"*lora_B*": 16.0, "*head*": 3.0}, seed=0)["top"]
    assert {name: both[name] for name in plain} == {
        name: factor * (16.0 if "lora_B" in name else 1.0) for name, factor in plain.items()
    }
    assert {name: both[name] for name in both.keys() - plain.keys()} == {"*head*": 3.0}


def test_a_pattern_that_fits_nothing_is_refused_where_rates_are_matched(tmp_path: Path) -> None:
    task, methods = new_task(make_base()), {"top": MethodSettings(position=0.0, rank=4)}
    with pytest.raises(
        SpectraError, match=r"learning_rate_pattern has '\*new_haed\*', which fits no trained parameter"
    ):
        matched_rates(task, methods, 0.5, {"*lora_B*": 2.0, "*head*": 2.0, "*new_haed*": 3.0}, seed=0)


def test_slices_of_orthonormal_factors_need_no_matching() -> None:
    sizes = [
        start_sizes(new_task(make_base()), MethodSettings(position=p, rank=4, scale="orthonormal"), seed=0).sizes
        for p in (0.0, 1.0)
    ]
    assert list(sizes[0].values()) == pytest.approx([4.0, 4.0]) == list(sizes[1].values())


def test_matched_runs_learn_at_the_matched_rate(whole: Sweep, tmp_path: Path) -> None:
    """The rates reach the runs: a matched slice ends elsewhere than an unmatched one, the reference does not."""
    plain = swept(tmp_path / "sweep", {"positions": [0.0, 0.5], "methods": []})
    matched = swept(tmp_path / "matched", {"positions": [0.0, 0.5], "methods": [], "match_step_size": 0.5})
    assert plain.runs["relative_update"][0] != matched.runs["relative_update"][0]
    assert plain.runs["relative_update"][1] == matched.runs["relative_update"][1]
    assert list(matched.runs["matched_position"]) == [0.5, 0.5]


# Grids.


def test_the_plan_is_the_whole_grid_in_settings() -> None:
    grid = Grid(positions=(0.0, 0.5), methods=("lora", "peft:olora"), learning_rates=(1e-3, 1e-2), seeds=(3, 4))
    runs = plan(TrainSettings(), grid)
    assert len(runs) == len({run.name for run in runs}) == 4 * 2 * 2
    run = next(run for run in runs if run.name == "slice-0.5_lr-0.01_seed-4")
    assert (run.settings.method.name, run.settings.method.position) == ("slice", 0.5)
    assert (run.settings.optimiser.learning_rate, run.settings.seed) == (0.01, 4)
    assert all(run.settings.method.position is None for run in runs if run.place["method"] == "lora")
    assert not any(set('/\\:*?"<>|') & set(run.name) for run in runs)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "nothing to run"),
        ({"position": [0.5]}, "did you mean positions"),
        ({"positions": [1.5]}, "between 0 and 1"),
        ({"positions": 0.5}, "a list of numbers"),
        ({"positions": [0.5], "starts": [3]}, "keep one"),
        ({"methods": ["lor"]}, "did you mean lora"),
        ({"methods": ["slice"]}, "give positions"),
        ({"methods": "lora"}, "a list of names"),
        ({"methods": ["lora"], "learning_rates": [0.0]}, "above 0"),
        ({"methods": ["lora"], "seeds": []}, "no seeds"),
        ({"methods": ["lora"], "seeds": [0.5]}, "whole numbers"),
        ({"methods": ["lora"], "rates_of": {"full": [1e-3]}}, "does not run"),
        ({"methods": ["lora"], "match_step_size": True}, "must be a position"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_in_a_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SpectraError, match=words):
        Grid.from_mapping(given)


def test_a_file_holds_settings_and_grid(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        '[method]\nrank = 4\n[sweep]\npositions = [0, 0.5]\nmethods = ["lora"]\nrates_of = {lora = [1e-3]}\n'
    )
    settings, grid = read_sweep_file(file)
    assert settings.method.rank == 4
    assert grid is not None and grid == Grid.from_mapping(grid.to_mapping())
    assert (grid.positions, grid.rates_of) == ((0.0, 0.5), {"lora": (1e-3,)})
    file.write_text("[sweep]\npositions = [0]\nsteps = 3\n")
    with pytest.raises(SpectraError, match=r"sweep\.steps"):
        read_sweep_file(file)


def test_a_picture_says_which_slices_it_leaves_out() -> None:
    def row(position: float, matched: float | None) -> dict[str, Any]:
        place = {"run": f"{position}-{matched}", "method": "slice", "position": position, "matched_position": matched}
        numbers = {"learning_rate": 1e-2, "seed": 0, "status": "finished", "score": position, "forgetting": position}
        return {**place, **numbers, "metric": "accuracy"}

    plain, matched = ([row(position, which) for position in (0.0, 1.0)] for which in (None, 0.5))

    def legend(rows: list[dict[str, Any]], rates: Any = None) -> list[str]:
        found = Sweep(table_of(rows)).plot.tradeoff(rates)[0].get_legend()
        assert found is not None
        return [text.get_text() for text in found.get_texts()]

    assert legend([*plain, *matched]) == ["slices", "plain slices: not shown"]
    assert legend([*plain, *matched], "fixed") == legend(plain) == legend(matched) == ["slices"]


@pytest.mark.parametrize("given", ["out=x", "seed=3", "method.position=0.5", "optimiser.learning_rate=1e-3"])
def test_settings_that_a_sweep_decides_itself_are_refused(tmp_path: Path, given: str) -> None:
    from spectra_cli.app import app
    from typer.testing import CliRunner

    command = ["sweep", "--positions", "0", "--learning-rates", "1e-2", "--out", str(tmp_path / "out"), "--set", given]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, SpectraError), done.output
    assert f"--set {given.partition('=')[0]} would change no run" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_table_has_the_same_types_whatever_is_missing() -> None:
    empty, one = table_of([]), table_of([{"run": "a", "seed": 1}])
    assert list(empty.dtypes) == list(one.dtypes)

"""Settings from TOML, mappings and flags: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spectra import SpectraError
from spectra.training import METHODS, TrainSettings
from spectra.training.methods import adapter_config, method_named

FILE = """
seed = 3
out = "run"
[model]
source = "base"
[task]
kind = "causal-lm"
[data]
train = "a.jsonl"
[method]
name = "slice"
rank = 4
position = 0.25
targets = ["query", "value"]
rank_pattern = { "layer.1.*.query" = 8 }
[optimiser]
learning_rate = 1
epochs = 2
[retain]
test = "b.jsonl"
"""


def test_file_is_read_and_comes_back_from_json(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(FILE)
    settings = TrainSettings.from_file(tmp_path / "run.toml")
    assert (settings.seed, settings.task.kind, settings.method.position) == (3, "causal-lm", 0.25)
    assert settings.optimiser.learning_rate == 1.0
    assert isinstance(settings.optimiser.epochs, float)
    assert settings.retain is not None and settings.retain.test == "b.jsonl"
    (tmp_path / "settings.json").write_text(json.dumps(settings.to_mapping()))
    assert TrainSettings.from_file(tmp_path / "settings.json") == settings


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"optimiser": {"learning_rat": 1.0}}, r"optimiser\.learning_rat, .*did you mean learning_rate\?"),
        ({"methd": {}}, r"methd, which is no setting of the top level; did you mean method\?"),
        ({"method": {"rank": 0}}, r"method\.rank = 0, which must be at least 1"),
        ({"seed": -1}, "seed = -1, which must be at least 0"),
        ({"seed": 2**63}, r"must be below 2\^63"),
        ({"method": {"rank": 2.5}}, r"method\.rank = 2\.5, which must be a whole number"),
        ({"method": {"rank": True}}, "must be a whole number"),
        ({"method": "slice"}, "method = 'slice', which must be a table"),
        ({"method": {"position": 1.5}}, "between 0 and 1"),
        ({"method": {"position": 0.5, "start": 3}}, r"both method\.position and method\.start"),
        ({"optimiser": {"steps": 3, "epochs": 1.0}}, r"both optimiser\.steps and optimiser\.epochs"),
        ({"optimiser": {"learning_rate": float("nan")}}, "must be at least 0"),
        ({"optimiser": {"schedule": "step"}}, "must be one of constant, linear, cosine"),
        ({"model": {"source": "a", "factory": "b:c"}}, r"both model\.source and model\.factory"),
        ({"data": {"holdout": 1.0}}, "must be below 1"),
        ({"method": {"name": "full", "rank": 4}}, r"method\.rank, which the method full has no use for"),
        ({"method": {"name": "head", "position": 0.5}}, r"method\.position, which the method head has no use for"),
        ({"retain": {"max_length": 0}}, r"retain\.max_length = 0"),
    ],
)
def test_wrong_settings_are_one_sentence(mapping: dict[str, object], message: str) -> None:
    with pytest.raises(SpectraError, match=message) as raised:
        TrainSettings.from_mapping(mapping)
    assert "\n" not in str(raised.value)


def test_broken_and_missing_files_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("seed = = 1")
    with pytest.raises(SpectraError, match=r"broken\.toml is not valid TOML"):
        TrainSettings.from_file(tmp_path / "broken.toml")
    with pytest.raises(SpectraError, match=r"none\.toml cannot be read"):
        TrainSettings.from_file(tmp_path / "none.toml")


def test_changes_by_dotted_keys() -> None:
    settings = TrainSettings.from_mapping({"method": {"start": 2}, "optimiser": {"steps": 5}})
    changed = settings.changed({"method.rank_pattern.layer.*.query": 2, "optimiser.epochs": 1, "retain.test": "x.csv"})
    assert changed.method.rank_pattern == {"layer.*.query": 2}
    assert (changed.optimiser.steps, changed.optimiser.epochs) == (None, 1.0)
    assert changed.retain is not None
    assert settings.changed({"method.position": 0.5}).method.start is None
    assert settings.changed({"method.name": "lora"}).method.start is None
    assert settings.changed({"method.name": "random"}).method.start == 2
    with pytest.raises(SpectraError, match="'seed' is one value and no table"):
        settings.changed({"seed.more": 1})


def test_only_what_decides_the_numbers_makes_runs_different() -> None:
    settings = TrainSettings.from_mapping({"out": "a", "save_every": 5, "seed": 1})
    assert not settings.differences(settings.changed({"out": "b", "save_every": 7, "device": "cpu"}))
    assert settings.differences(settings.changed({"seed": 2, "method.rank": 3})) == ["method.rank", "seed"]


def test_every_method_has_a_name_and_others_are_refused() -> None:
    assert {"full", "head", "lora", "slice", "pissa", "milora", "random", "lora_ga"} <= METHODS.keys()
    assert method_named("peft:olora") is METHODS["lora"]
    with pytest.raises(SpectraError, match="'slic' is no method; did you mean slice"):
        method_named("slic")
    with pytest.raises(SpectraError, match="needs a start or a position"):
        adapter_config(TrainSettings().method)


def test_method_without_adapter_drops_what_is_an_adapters() -> None:
    slices = TrainSettings.from_mapping({"method": {"position": 0.5, "rank": 4, "targets": ["query"]}})
    full = slices.changed({"method.name": "full"})
    assert (full.method.rank, full.method.position, full.method.targets) == (None, None, ())
    assert TrainSettings.from_mapping(full.to_mapping()) == full
    assert full.changed({"method.name": "lora"}).method.rank == 8
    with pytest.raises(SpectraError, match=r"method\.rank, which the method full"):
        slices.changed({"method.name": "full", "method.rank": 4})


def test_settings_of_a_method_reach_the_adapter() -> None:
    method = (
        TrainSettings().changed({"method.targets": "all-linear", "method.name": "lora_ga", "method.gamma": 4}).method
    )
    config = adapter_config(method)
    assert (config.target_modules, config.gamma) == ("all-linear", 4.0)

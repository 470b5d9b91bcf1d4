"""The grid of a sweep, and the runs that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from os import PathLike
from typing import Any

from spectra.errors import SpectraError
from spectra.training.methods import adapter_config, full, head, method_named
from spectra.training.misspelt import closest
from spectra.training.settings import TrainSettings
from spectra.training.settings_file import read_settings

# What the grid decides of a run's settings; the rest is the same in all runs of a sweep.
DECIDED = {"method.name", "method.position", "method.start", "optimiser.learning_rate", "seed"}


@dataclass(frozen=True)
class Grid:
    """{slices and other methods} x {learning rates} x {seeds}: the table `[sweep]` of a settings file.

    Attributes:
        positions, starts: slices of every adapted weight, by one of the two (0 = largest singular values).
        methods: others, by their names in `spectra.training.METHODS`.
        learning_rates: of all of them; empty: the one of the settings.
        rates_of: method (or "slice") -> learning rates of its own, in the place of those.
        seeds: of each.
        match_step_size: the position of a reference slice. Slices, and the random control, then learn at
            eta sqrt(sum s_ref / sum s_slice) in every module, which gives their first steps the size of the reference's
            (`spectra.training.step_size_factor`). None: all at one rate. Other methods learn at the plain rate.
    Raises: SpectraError for a grid that is empty or contradicts itself.
    """

    positions: Sequence[float] = ()
    starts: Sequence[int] = ()
    methods: Sequence[str] = ()
    learning_rates: Sequence[float] = ()
    seeds: Sequence[int] = (0,)
    rates_of: Mapping[str, Sequence[float]] = field(default_factory=dict)
    match_step_size: float | None = None

    def __post_init__(self) -> None:
        for name in ("positions", "learning_rates"):
            object.__setattr__(self, name, _numbers(getattr(self, name), name, float))
        for name in ("starts", "seeds"):
            object.__setattr__(self, name, _numbers(getattr(self, name), name, int))
        if isinstance(self.methods, str) or not all(isinstance(name, str) for name in self.methods):
            raise SpectraError(f"sweep.methods is {self.methods!r}; give a list of names")
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)))
        rates = {name: _numbers(given, f"rates_of.{name}", float) for name, given in self.rates_of.items()}
        object.__setattr__(self, "rates_of", rates)
        if self.match_step_size is not None:
            object.__setattr__(self, "match_step_size", float(self.match_step_size))
        self._check()

    def _check(self) -> None:
        if self.positions and self.starts:
            raise SpectraError("the sweep names slices by positions and by starts; keep one of them")
        if not (self.positions or self.starts or self.methods):
            raise SpectraError("the sweep has nothing to run; give positions (or starts) of slices, or methods")
        if not self.seeds:
            raise SpectraError("the sweep has no seeds; give at least one")
        if "slice" in self.methods:
            raise SpectraError("the sweep names the method slice without saying which; give positions instead")
        if wrong := [place for place in (*self.positions, self.match_step_size or 0.0) if not 0 <= place <= 1]:
            raise SpectraError(f"the sweep names the position {wrong[0]:g}, which must lie between 0 and 1")
        if wrong_start := [start for start in self.starts if start < 0]:
            raise SpectraError(f"the sweep names the start {wrong_start[0]}, which must be at least 0")
        known = {*self.methods, *(["slice"] if self.positions or self.starts else [])}
        for name in self.methods:
            method_named(name)
        if unknown := [name for name in self.rates_of if name not in known]:
            raise SpectraError(f"sweep.rates_of names {unknown[0]!r}, which this sweep does not run")
        rates = (*self.learning_rates, *(rate for own in self.rates_of.values() for rate in own))
        if bad := [rate for rate in rates if not (rate > 0 and isfinite(rate))]:
            raise SpectraError(f"the sweep has a learning rate of {bad[0]:g}; give numbers above 0")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "the settings") -> Grid:
        """A grid out of plain values, as TOML gives them. Raises `SpectraError` naming a key that there is not."""
        if not isinstance(mapping, Mapping):
            raise SpectraError(f"{source} gives sweep = {mapping!r}, which must be a table")
        known = [item.name for item in fields(cls)]
        for key in mapping:
            if key not in known:
                raise SpectraError(f"{source} gives sweep.{key}, which is no setting of [sweep]{closest(key, known)}")
        matched = mapping.get("match_step_size")
        if matched is not None and (isinstance(matched, bool) or not isinstance(matched, int | float)):
            raise SpectraError(
                f"{source} gives sweep.match_step_size = {matched!r}, which must be a position, such as 0.5"
            )
        if not isinstance(mapping.get("rates_of", {}), Mapping):
            raise SpectraError(f"{source} gives sweep.rates_of, which must be a table from methods to learning rates")
        return cls(**mapping)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, which `from_mapping` reads back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _numbers(given: Any, name: str, kind: type) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise SpectraError(f"sweep.{name} is {given!r}; give a list of numbers")
    for value in given:
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            words = "numbers" if kind is float else "whole numbers"
            raise SpectraError(f"sweep.{name} holds {value!r}; give a list of {words}")
    return tuple(dict.fromkeys(kind(value) for value in given))


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: the name of its folder, its settings (without `out`), and its place in the grid.

    point: the method, or the slice, apart from learning rate and seed.
    """

    name: str
    point: str
    settings: TrainSettings
    place: Mapping[str, Any]


def plan(settings: TrainSettings, grid: Grid) -> list[PlannedRun]:
    """All runs of a grid, seed by seed, so that a sweep which is stopped early has seen all of it once.

    Raises: SpectraError for a method that the settings do not allow.
    """
    runs = [
        _planned(settings, grid, method, slice_, rate, seed)
        for seed in grid.seeds
        for method, slice_ in _points(grid)
        for rate in grid.rates_of.get(method) or grid.learning_rates or (settings.optimiser.learning_rate,)
    ]
    for run in runs:
        if method_named(run.settings.method.name) not in (full, head):
            adapter_config(run.settings.method)
    return runs


def _points(grid: Grid) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for position in grid.positions:
        yield "slice", {"position": position}
    for start in grid.starts:
        yield "slice", {"start": start}
    for method in grid.methods:
        yield method, {}


def _planned(
    settings: TrainSettings, grid: Grid, method: str, slice_: Mapping[str, Any], rate: float, seed: int
) -> PlannedRun:
    matched = grid.match_step_size if method in MATCHED else None
    point = "-".join(str(value) for value in (method.replace(":", "-"), *slice_.values()))
    name = f"{point}_lr-{rate}_seed-{seed}" + ("" if matched is None else f"_matched-{matched}")
    changes = {"method.name": method, "method.position": None, "method.start": None}
    changes |= {f"method.{key}": value for key, value in slice_.items()}
    chosen = settings.changed({**changes, "optimiser.learning_rate": rate, "seed": seed, "out": None})
    return PlannedRun(
        name,
        point,
        chosen,
        {
            "run": name,
            "method": method,
            "position": slice_.get("position"),
            "start": slice_.get("start"),
            "rank": chosen.method.rank if method_named(method) not in (full, head) else None,
            "learning_rate": rate,
            "matched_position": matched,
            "seed": seed,
        },
    )


MATCHED = ("slice", "pissa", "milora", "random")  # methods whose factors start with a size that can be matched


def read_sweep_file(path: str | PathLike[str]) -> tuple[TrainSettings, Grid | None]:
    """Settings and grid of a TOML file: what `TrainSettings.from_file` reads, and a table `[sweep]` beside it.

    Returns: None for the grid where there is no such table.   Raises: SpectraError naming the key that is wrong.
    """
    mapping = read_settings(path)
    grid = mapping.pop("sweep", None)
    settings = TrainSettings.from_mapping(mapping, str(path))
    return settings, None if grid is None else Grid.from_mapping(grid, str(path))

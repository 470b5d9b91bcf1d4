"""What a run is: every choice that decides its numbers, in frozen values read from a TOML file, a mapping or flags."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from spectra.errors import SpectraError
from spectra.training.settings_file import read_settings
from spectra.training.settings_reading import flat, read_table

TaskKind = Literal["text-classification", "image-classification", "causal-lm", "masked-lm", "custom"]

SETTINGS = "settings.json"
WITHOUT_ADAPTER = ("full", "head")  # methods that train parameters of the model itself


@dataclass(frozen=True)
class ModelSettings:
    """`[model]`: the base. Exactly one of source and factory.

    source: a Hugging Face folder (or an id that is in the local cache).   factory: "package.module:function", called
    without arguments, gives an `nn.Module`.   dtype: of the weights while they are trained, such as "float32".
    """

    source: str | None = None
    factory: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class TaskSettings:
    """`[task]`: what is learnt. kind "custom" needs a factory, "package.module:function", called with the base module;
    it gives a `spectra.training.Task`."""

    kind: TaskKind = "text-classification"
    factory: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """`[data]`: files of rows (CSV, JSON lines, JSON, Parquet) or image folders with one subfolder a class.

    train, test: a file or folder each; without test, `holdout` of the rows of train, drawn with the seed, are kept
    apart for it.   max_length: tokens a text is cut to; None: 128, or as many as the model has positions for where
    those are fewer.   limit: rows read of each file.
    """

    train: str | None = None
    test: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    max_length: int | None = None
    limit: int | None = None
    holdout: float = 0.2


@dataclass(frozen=True)
class RetainSettings:
    """`[retain]`: the base's own task, scored with the base's own head before, during and after training.

    kind None: what the base's class was made for.   test: its data.   factory: as in `[task]`, for kind "custom".
    max_length, limit: as in `[data]`.
    """

    kind: TaskKind | None = None
    factory: str | None = None
    test: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    max_length: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class MethodSettings:
    """`[method]`: which parameters move, and from where. Names are those of `spectra.training.METHODS`.

    rank, alpha, exclude, dropout, scale, gamma and the patterns are those of `spectra.lora.SliceConfig`, targets its
    `target_modules`: patterns, or "all-linear". A slice is given by exactly one of position (0 = largest singular
    values, 1 = smallest) and start. rank is 8 where an adapter is trained and none is given; `full` and `head`, which
    train none, take nothing but their name.   gradient_batches: over how many training batches `lora_ga` averages the
    gradient that it starts from.
    """

    name: str = "slice"
    rank: int | None = None
    position: float | None = None
    start: int | None = None
    alpha: float | None = None
    scale: Literal["sqrt_sigma", "orthonormal"] = "sqrt_sigma"
    use_rslora: bool = False
    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    start_pattern: Mapping[str, int] = field(default_factory=dict)
    position_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    gamma: float = 16.0
    gradient_batches: int = 8

    def __post_init__(self) -> None:
        if self.rank is None and self.name not in WITHOUT_ADAPTER:
            object.__setattr__(self, "rank", 8)


@dataclass(frozen=True)
class OptimiserSettings:
    """`[optimiser]`. Exactly one of steps and epochs; a step is one update, of batch_size x accumulate examples.

    epochs: passes over the training examples, as many whole steps as it takes to have seen all of them so often.
    warmup: the share of all steps over which the rate rises linearly from 0.   weight_decay: of matrices only, never of
    biases and norms; it pulls A and B toward 0, which for a slice is away from the base.   clip: the largest norm of
    the gradient; 0: no clipping.   momentum: of sgd.   learning_rate_pattern: globs on parameter names to factors of
    the learning rate, the first that fits; {"*classifier*": 10.0} lets a new head learn faster.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = 0.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    accumulate: int = 1
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip: float = 1.0
    learning_rate_pattern: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSettings:
    """A run. `out` is its folder; two runs of equal settings, but for `out` and what only says how, are one run.

    evaluate_every: in steps; None evaluates before and after only.   save_every: in steps, after which the state is
    saved from which a killed run goes on; None saves after every tenth of the run, 0 only at its end and on Ctrl-C.
    keep_every: in steps; what is trained is scored and kept in a folder `step-N`, at the end too, for `spectra compare
    BASE step-* --sequence`.   device: "auto", "cpu", "cuda", "cuda:1", "mps".   shard: of several processes, every one
    keeps a share of each weight (FSDP) instead of all weights.   precision: of the forward pass ("no", "bf16", "fp16").
    compare: whether base and result are compared at the end.   cache: a folder of base spectra, as of `compare`.
    trackers: names that `accelerate` knows ("tensorboard", "wandb").
    """

    model: ModelSettings = ModelSettings()
    task: TaskSettings = TaskSettings()
    data: DataSettings = DataSettings()
    method: MethodSettings = MethodSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    retain: RetainSettings | None = None
    seed: int = 0
    out: str | None = None
    evaluate_every: int | None = None
    save_every: int | None = None
    keep_every: int | None = None
    evaluation_batch_size: int = 64
    device: str = "auto"
    shard: bool = False
    precision: Literal["no", "bf16", "fp16"] = "no"
    compare: bool = True
    cache: str | None = None
    trackers: tuple[str, ...] = ()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TrainSettings:
        """Read a TOML file (or the settings.json of a run). Raises `SpectraError` naming the key that is wrong."""
        return cls.from_mapping(read_settings(path), str(path))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "the settings") -> TrainSettings:
        """Settings from nested plain values, as TOML gives them.

        >>> TrainSettings.from_mapping({"method": {"name": "slice", "position": 0.5}}).method.position
        0.5
        """
        settings: TrainSettings = read_table(cls, mapping, "", source)
        settings.check(source)
        return settings

    def to_mapping(self) -> dict[str, Any]:
        """Nested plain values, which `from_mapping` reads back."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def changed(self, changes: Mapping[str, Any], source: str = "the settings") -> TrainSettings:
        """These settings with others in their place, by dotted keys: {"method.position": 0.25, "seed": 1}.

        Of two that exclude each other (steps, epochs; position, start; source, factory) the new one drops the old one;
        a method that takes no slice drops the slice of the last one, and one without an adapter all of the last one's.
        """
        mapping = self.to_mapping()
        for one, other in (*_EITHER, *((other, one) for one, other in _EITHER)):
            if changes.get(one) is not None and other not in changes:
                changes = {**changes, other: None}
        if changes.get("method.name") in WITHOUT_ADAPTER:
            unset = dataclasses.asdict(MethodSettings(name=changes["method.name"]))
            changes = {**{f"method.{key}": value for key, value in unset.items()}, **changes}
        elif changes.get("method.name", "slice") not in ("slice", "random"):
            changes = {**{key: None if "pattern" not in key else {} for key in _OF_A_SLICE}, **changes}
        for key, value in changes.items():
            *tables, last = key.split(".", 2)  # what is left in the third place is a pattern, which may hold dots
            place = mapping
            for table in tables:
                if place.get(table) is None:
                    place[table] = {}
                place = place[table]
                if not isinstance(place, dict):
                    raise SpectraError(f"{source} gives {key!r}, but {table!r} is one value and no table")
            place[last] = value
        return type(self).from_mapping(mapping, source)

    def differences(self, other: TrainSettings) -> list[str]:
        """The dotted keys whose values decide a run's numbers and differ."""
        one, two = flat(self.to_mapping()), flat(other.to_mapping())
        keys = (key for key in sorted({*one, *two}) if key.split(".")[0] not in _SAYS_HOW)
        return [key for key in keys if one.get(key) != two.get(key)]

    def check(self, source: str = "the settings") -> None:
        """Refuse what cannot be run. Raises `SpectraError` naming the key."""
        method, optimiser = self.method, self.optimiser
        if self.model.source is not None and self.model.factory is not None:
            raise SpectraError(f"{source} gives both model.source and model.factory; keep one of them")
        if method.position is not None and method.start is not None:
            raise SpectraError(f"{source} gives both method.position and method.start; keep one of them")
        if method.position is not None and not 0 <= method.position <= 1:
            raise SpectraError(f"{source} gives method.position = {method.position}, which must lie between 0 and 1")
        unset = MethodSettings(name=method.name)
        idle = [item.name for item in dataclasses.fields(method) if vars(method)[item.name] != vars(unset)[item.name]]
        if method.name in WITHOUT_ADAPTER and idle:
            raise SpectraError(
                f"{source} gives method.{idle[0]}, which the method {method.name} has no use for, since it trains no "
                "adapter; leave it out"
            )
        if optimiser.steps is not None and optimiser.epochs is not None:
            raise SpectraError(f"{source} gives both optimiser.steps and optimiser.epochs; keep one of them")
        least: dict[str, tuple[float | None, float]] = {
            "seed": (self.seed, 0),
            "method.rank": (method.rank, 1),
            "method.start": (method.start, 0),
            "method.gradient_batches": (method.gradient_batches, 1),
            "optimiser.steps": (optimiser.steps, 0),
            "optimiser.epochs": (optimiser.epochs, 0),
            "optimiser.batch_size": (optimiser.batch_size, 1),
            "optimiser.accumulate": (optimiser.accumulate, 1),
            "optimiser.learning_rate": (optimiser.learning_rate, 0),
            "optimiser.weight_decay": (optimiser.weight_decay, 0),
            "optimiser.momentum": (optimiser.momentum, 0),
            "optimiser.warmup": (optimiser.warmup, 0),
            "optimiser.clip": (optimiser.clip, 0),
            "data.max_length": (self.data.max_length, 1),
            "data.limit": (self.data.limit, 1),
            "retain.max_length": (self.retain.max_length if self.retain else None, 1),
            "retain.limit": (self.retain.limit if self.retain else None, 1),
            "data.holdout": (self.data.holdout, 0),
            "evaluate_every": (self.evaluate_every, 1),
            "save_every": (self.save_every, 0),
            "keep_every": (self.keep_every, 1),
            "evaluation_batch_size": (self.evaluation_batch_size, 1),
        }
        for key, (value, bound) in least.items():
            if value is not None and not value >= bound:  # not >= refuses NaN too
                raise SpectraError(f"{source} gives {key} = {value}, which must be at least {bound:g}")
        if self.seed >= 2**63:
            raise SpectraError(f"{source} gives seed = {self.seed}, which must be below 2^63")
        for key, share in (("optimiser.warmup", optimiser.warmup), ("data.holdout", self.data.holdout)):
            if share >= 1:
                raise SpectraError(f"{source} gives {key} = {share}, which must be below 1")


_EITHER = (
    ("optimiser.steps", "optimiser.epochs"),
    ("method.position", "method.start"),
    ("model.source", "model.factory"),
)
_OF_A_SLICE = ("method.position", "method.start", "method.position_pattern", "method.start_pattern")

# What changes where and how a run is made and kept, and none of its numbers. (Their rounding, and the masks of dropout,
# follow the device and the number of processes.)
_SAYS_HOW = {"out", "save_every", "device", "shard", "cache", "compare", "trackers"}

# What a run that diverged may go on with otherwise: it decides numbers, and which steps it held for is noted.
ADJUSTABLE = ("optimiser.learning_rate", "optimiser.clip")

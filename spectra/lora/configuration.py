"""Which modules get which slice: plain values, checked when they are given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from spectra.errors import SpectraError
from spectra.lora.initialisations import METHODS
from spectra.lora.slices import Scale, check_position
from spectra.numeric import is_number, is_whole

ALL_LINEAR = "all-linear"
PEFT = "peft:"  # what stands before the name of an initialisation of peft


@dataclass(frozen=True)
class SliceConfig:
    """What `attach` puts where.

    A pattern is a glob on a module's name, or on the end of it: `query` and `attention.*.query` both mean
    `encoder.layer.0.attention.self.query`. It is no regular expression. Of several in a mapping that match a name, the
    first one counts; one that matches no adapted module is refused.

    Attributes:
        rank: r.
        position, start: which slice, one of them: start = round(position (k - r)), k = min(m, n) of each weight.
        method: `slice`, its ends `pissa` (start 0) and `milora` (position 1), `random`, `lora`, `lora_ga`, or
            `peft:<init>` for an `init_lora_weights` of peft (`peft:olora`, `peft:true`).
        alpha: c = alpha / r, and alpha / sqrt(r) with `use_rslora` and for `lora_ga`, as in peft. None: c = 1 whatever
            the rank, which is alpha = r. Slices do not need another: B0 A0 c does not depend on c.
        scale: `sqrt_sigma` or `orthonormal`, see `slice_init`. `random` of scale sqrt_sigma takes its sizes from the
            slice that a start or position names, from the root mean square of all s_i without.
        target_modules: patterns, or "all-linear". None: what peft takes for this type of transformers model, else all
            linear layers but the head.
        exclude: patterns that take modules out of these.
        modules_to_save: names of modules that are trained whole, and saved with the adapter (a new head).
        rank_pattern, alpha_pattern, start_pattern, position_pattern: pattern -> value for the modules that it matches.
        dropout: of the adapter's input, with one mask for both terms, so that it does not change step 0.
        seed: of the random methods; each module draws from it and its own name.
        gamma: of `lora_ga`.
    Raises: SpectraError for values that contradict each other or make no sense.
    """

    rank: int = 16
    position: float | None = None
    start: int | None = None
    method: str = "slice"
    alpha: float | None = None
    use_rslora: bool = False
    scale: Scale = "sqrt_sigma"
    target_modules: Sequence[str] | str | None = None
    exclude: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    start_pattern: Mapping[str, int] = field(default_factory=dict)
    position_pattern: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    seed: int = 0
    gamma: float = 16.0

    def __post_init__(self) -> None:
        for name in ("exclude", "modules_to_save"):
            if isinstance(getattr(self, name), str):
                raise SpectraError(f"{name} takes a list of names, not one string; give [{getattr(self, name)!r}]")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            self._check_targets(self.target_modules)
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        self._check_numbers()
        if self.method not in METHODS and not self.method.startswith(PEFT):
            raise SpectraError(
                f"{self.method!r} is no method; give {', '.join(METHODS)}, or {PEFT}<init> for one of peft's"
            )
        if self.scale not in ("sqrt_sigma", "orthonormal"):
            raise SpectraError(f"{self.scale!r} is no scale of a slice; give sqrt_sigma or orthonormal")
        self._check_slice()
        self._make_plain()

    @staticmethod
    def _check_targets(given: Any) -> None:
        if not isinstance(given, Sequence) or not all(isinstance(pattern, str) for pattern in given):
            raise SpectraError(f"target_modules is {given!r}; give a list of patterns, or {ALL_LINEAR!r}")
        if ALL_LINEAR in given:
            raise SpectraError(f"{ALL_LINEAR!r} stands alone as target_modules, not in a list; give it as a string")

    def _check_numbers(self) -> None:
        for name, rank in self._given("rank").items():
            if not is_whole(rank) or rank < 1:
                raise SpectraError(f"{name} is {rank!r}; give a whole number from 1 up")
        for name, start in self._given("start").items():
            if start is not None and not (is_whole(start) and start >= 0):
                raise SpectraError(f"{name} is {start!r}; give a whole number from 0 up")
        for name, position in self._given("position").items():
            if position is not None:
                check_position(name, position)
        for name, alpha in self._given("alpha").items():
            if alpha is not None and not (is_number(alpha) and alpha > 0):
                raise SpectraError(f"{name} is {alpha!r}; give a number above 0")
        if not is_whole(self.seed):
            raise SpectraError(f"seed is {self.seed!r}; give a whole number")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise SpectraError(f"dropout is {self.dropout!r}; give a number from 0 to below 1")
        if not is_number(self.gamma) or not self.gamma > 0:
            raise SpectraError(f"gamma is {self.gamma!r}; give a number above 0, such as the 16 of LoRA-GA")

    def _given(self, name: str) -> dict[str, Any]:
        """A value and those of its patterns, by the words in which a message names them."""
        patterns: Mapping[str, Any] = getattr(self, f"{name}_pattern")
        return {name: getattr(self, name), **{f"{name}_pattern[{key!r}]": value for key, value in patterns.items()}}

    def _make_plain(self) -> None:
        """Numbers of numpy become Python's own, which JSON holds."""
        for name in ("rank", "position", "start", "alpha", "dropout", "seed", "gamma"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern", "start_pattern", "position_pattern"):
            object.__setattr__(self, name, {key: _plain(value) for key, value in getattr(self, name).items()})

    def _check_slice(self) -> None:
        named = [name for name in ("start", "position") if getattr(self, name) is not None]
        patterned = [name for name in ("start_pattern", "position_pattern") if getattr(self, name)]
        if len(named) == 2:
            raise SpectraError("a slice is named by its start or by its position; give one of them")
        if self.method not in ("slice", "random") and (named or patterned):
            raise SpectraError(
                f"the method {self.method} takes no {(named + patterned)[0]}; leave it out, or take the method slice"
            )
        if self.method == "slice" and not (named or patterned):
            raise SpectraError("the method slice needs a start or a position; position 0 is the top of the spectrum")

    def rank_of(self, module: str) -> int:
        """r of a module."""
        rank: int = first_match(self.rank_pattern, module, self.rank)
        return rank

    def scaling_of(self, module: str) -> float:
        """c of a module."""
        alpha: float | None = first_match(self.alpha_pattern, module, self.alpha)
        rank = self.rank_of(module)
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    @property
    def is_rank_stabilised(self) -> bool:
        """Whether alpha is divided by sqrt(r)."""
        return self.use_rslora or self.method == "lora_ga"

    def slice_of(self, module: str) -> tuple[int | None, float | None]:
        """(start, position) of a module, one of them None; both, where its method takes none."""
        if self.method == "pissa":
            return 0, None
        if self.method == "milora":
            return None, 1.0
        start: int | None = first_match(self.start_pattern, module, None)
        position: float | None = first_match(self.position_pattern, module, None)
        if start is not None and position is not None:
            raise SpectraError(f"{module!r} is matched by start_pattern and by position_pattern; give it one of them")
        if start is None and position is None:
            start, position = self.start, self.position
        if self.method == "slice" and start is None and position is None:
            raise SpectraError(f"no pattern gives {module!r} a slice; give a start or a position for all others")
        return start, position

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and TOML hold them; `SliceConfig.from_dict` takes them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SliceConfig:
        """The configuration of these values; SpectraError for one that there is not."""
        known = [item.name for item in fields(cls)]
        if unknown := sorted(values.keys() - {*known}):
            raise SpectraError(f"{unknown[0]!r} is no setting of a slice; give some of {', '.join(known)}")
        return cls(**values)


def _plain(number: Any) -> int | float | None:
    if number is None:
        return None
    return int(number) if isinstance(number, Integral) else float(number)


def matches(pattern: str, module: str) -> bool:
    """Whether a glob names a module, by its whole name or by its last components."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def first_match(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that names the module."""
    return next((value for pattern, value in patterns.items() if matches(pattern, module)), otherwise)

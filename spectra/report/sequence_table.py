"""Several tuned models in order (saved steps of a run, tasks learnt in turn): a row each, over the same matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spectra.errors import SpectraError
from spectra.report import summary
from spectra.report.wording import printable

if TYPE_CHECKING:
    import pandas as pd

    from spectra.comparison import Comparison

KEY = "sequence"  # of the provenance of a comparison whose models were declared to be in order
SCORES = ("score", "forgetting")
Scores = Mapping[str, Mapping[str, float]]

POOLED = ("diagonal_share", "off_diagonal_share", "outside_share")
MEDIANS = (
    "left_overlap", "right_overlap", "left_angle", "overlap_null", "stable_rank", "effective_rank", "energy_rank_90",
)  # fmt: skip
OF_COMPONENTS = ("stability", "rotation")
COLUMNS = (
    "tuned", "order", "step", "matrices", "relative_update", *POOLED, "diagonal_enrichment", "spectral_shift",
    *OF_COMPONENTS, *MEDIANS, "intruders", "spread_intruders", "matrices_with_intruders", "lowest_best_cosine", *SCORES,
)  # fmt: skip
COUNTS = ("order", "step", "matrices", "intruders", "spread_intruders", "matrices_with_intruders")


def is_sequence(result: Comparison) -> bool:
    """Whether the models of a comparison were declared to be in order (`Comparison.in_sequence`)."""
    return isinstance(result.provenance.get(KEY), Mapping) and len(summary.tuned_labels(result)) > 1


def in_sequence(result: Comparison, scores: Scores | None = None, notes: Sequence[str] = ()) -> Comparison:
    """The comparison with its models declared to be in the order given, and what is known of their scores.

    Args:
        scores: label -> "score" (of the new task) and "forgetting" (of the old one), either or both, for any of the
            models, None or NaN for a gap; None: what stands in runs beside the checkpoints.
        notes: what is to be said of the order.
    Raises: SpectraError for fewer than two models, for scores of a model or a name that is not there, and for what is
        no number.
    """
    labels = _labels(result)
    if scores is None:
        from spectra.report.sequence_scores import scores_beside

        scores, found = scores_beside(_sources(result, labels))
        notes = (*notes, *found)
    known = checked_scores(scores, labels, "the scores")
    kept = {label: known[label] for label in labels if label in known}
    said = [*result.provenance.get("notes", ()), *(note for note in notes if note)]
    return replace(result, provenance={**result.provenance, "notes": said, KEY: {"scores": kept}})


def checked_scores(scores: Any, labels: Sequence[str], source: str) -> dict[str, dict[str, float]]:
    """Scores by label and name, without gaps (None, NaN).

    Raises SpectraError where they are of a model that is none of `labels`, of a kind that is not known, or no numbers.
    """
    if not isinstance(scores, Mapping):
        raise SpectraError(f"{source}: give label -> {{'score': ..., 'forgetting': ...}}, not {scores!r}")
    found: dict[str, dict[str, float]] = {}
    for label, named in scores.items():
        who = repr(printable(str(label)))
        if label not in labels:
            raise SpectraError(
                f"{source}: {who} is none of the models compared: {', '.join(repr(printable(each)) for each in labels)}"
            )
        if not isinstance(named, Mapping):
            raise SpectraError(f"{source}: of {who} give {{'score': ..., 'forgetting': ...}}, not {named!r}")
        for name in named:
            if name not in SCORES:
                raise SpectraError(f"{source}: {name!r} of {who} is not known; give score, forgetting, or both")
        numbers = {name: _number(value, name, who, source) for name, value in named.items() if value is not None}
        found[label] = {name: value for name, value in numbers.items() if not math.isnan(value)}
    return found


def _number(value: Any, name: str, who: str, source: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise SpectraError(f"{source}: the {name} of {who} is {printable(str(value))!r}, which is no number")
    return number


def sequence_table(result: Comparison) -> pd.DataFrame:
    """A row per tuned model, in order, all over the same matrices; columns as in `spectra/definitions.md`.

    Matrices count that were compared (or are bit-identical to the base) in every model. Counts of intruders are over
    all of them; everything else leaves out those that stand apart in the last model (`summary.is_outlier`). Sizes and
    shares are pooled, of measures of matrices and components the medians are taken.

    Raises: SpectraError for fewer than two models.
    """
    import pandas as pd

    labels = _labels(result)
    shared = shared_matrices(result)
    steps = steps_of(labels)
    scores = _scores(result)
    rows = []
    for at, label in enumerate(labels):
        row: dict[str, Any] = {"tuned": label, "order": at + 1, "step": steps[at] if steps else None}
        rows.append(row | _measures(result, label, shared) | dict(scores.get(label, {})))
    kinds = {name: "Int64" if name in COUNTS else "str" if name == "tuned" else "float64" for name in COLUMNS}
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(kinds)


@dataclass(frozen=True)
class Shared:
    """Names of the matrices that every model of a sequence has: `all`, and those that are `typical` of the last one."""

    all: frozenset[str]
    typical: frozenset[str]


def shared_matrices(result: Comparison) -> Shared:
    """The matrices that are measured, or bit-identical to the base, in every model."""
    labels = _labels(result)
    of_model = [_counting(summary.rows_of(result, label)) for label in labels]
    everywhere = frozenset.intersection(*(frozenset(rows["name"]) for rows in of_model))
    last = summary.rows_of(result, labels[-1])
    apart = frozenset(last["name"][summary.is_outlier(last)])
    return Shared(everywhere, everywhere - apart or everywhere)


def steps_of(labels: Sequence[str]) -> list[int] | None:
    """The numbers that the labels end in, where all have one after words that differ in numbers alone.

    >>> steps_of(["step-50", "step-100"]), steps_of(["mnist28", "cifar10"])
    ([50, 100], None)
    >>> steps_of(["step-2", "step-2 (2)"])  # a path that was given twice
    [2, 2]
    """
    found = [re.fullmatch(r"(.*?)(\d+)( \(\d+\))?", label, re.DOTALL) for label in labels]
    if any(match is None for match in found):
        return None
    words = {re.sub(r"\d+", "#", match[1]) for match in found if match}
    return [int(match[2]) for match in found if match] if len(words) == 1 else None


def natural_order(sources: Sequence[str], labels: Sequence[str]) -> tuple[list[int], str]:
    """The order of a sequence as places in what was given, and what is to be said of it.

    The given order stays, but where it is that of a shell's `*`, by letters, and the numbers at the ends of the names
    say otherwise: step-100 stands before step-50 then, and was not meant to.

    >>> natural_order(["a/step-100", "a/step-50"], ["step-100", "step-50"])[0]
    [1, 0]
    """
    given = list(range(len(labels)))
    steps = steps_of(labels)
    if steps is None or steps == sorted(steps):
        return given, ""
    if list(sources) != sorted(sources):
        return given, "the sequence is in the order given, although the numbers in the names are in another"
    order = sorted(given, key=lambda at: steps[at])
    names = ", ".join(printable(labels[at]) for at in order)
    return order, f"the models were given in the order of letters and put into that of their numbers: {names}"


def _labels(result: Comparison) -> list[str]:
    labels = summary.tuned_labels(result)
    if len(labels) < 2:
        raise SpectraError(f"a sequence has at least two tuned models, and this comparison has {len(labels)}")
    return labels


def _sources(result: Comparison, labels: Sequence[str]) -> dict[str, str]:
    described = result.provenance.get("tuned", {})
    return {label: str(described[label].get("source", "")) for label in labels if label in described}


def _scores(result: Comparison) -> Scores:
    declared = result.provenance.get(KEY)
    return declared.get("scores", {}) if isinstance(declared, Mapping) else {}


def _counting(layers: pd.DataFrame) -> pd.DataFrame:
    return layers[(layers["status"] == "unchanged") | layers.index.isin(summary.compared(layers).index)]


def _measures(result: Comparison, label: str, shared: Shared) -> dict[str, Any]:
    layers = summary.rows_of(result, label)
    every, typical = (layers[layers["name"].isin(names)] for names in (shared.all, shared.typical))
    moved, counted = summary.compared(typical), summary.compared(every)
    parts = result.components[(result.components["tuned"] == label) & result.components["name"].isin(shared.typical)]
    return {
        "matrices": len(typical),
        "relative_update": summary.pooled_update(typical),
        **{name: summary.pooled_share(moved, name) for name in POOLED},
        "diagonal_enrichment": summary.pooled_enrichment(moved),
        "spectral_shift": summary.pooled_shift(moved),
        **{name: summary.median(parts, name) for name in OF_COMPONENTS},
        **{name: summary.median(moved, name) for name in MEDIANS},
        "intruders": int(counted["intruders"].fillna(0).sum()),
        "spread_intruders": _spread(counted),
        "matrices_with_intruders": int((counted["intruders"].fillna(0) > 0).sum()),
        "lowest_best_cosine": float(counted["lowest_best_cosine"].min()) if len(counted) else float("nan"),
    }


def _spread(layers: pd.DataFrame) -> int | None:
    """The sum of `spread_intruders`; None of an older result, which has none."""
    known = layers["spread_intruders"].dropna() if "spread_intruders" in layers else ()
    return int(sum(known)) if len(known) else None

"""What fine-tuning did, in sentences, each with the numbers that led to it and none without evidence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spectra.report import sentences_size as size
from spectra.report import sentences_spectrum as spectrum
from spectra.report import summary
from spectra.report.evidence import Evidence, Finding, Numbers, gather
from spectra.report.sequence_sentences import over_the_sequence
from spectra.report.sequence_table import is_sequence
from spectra.report.wording import number, printable

if TYPE_CHECKING:
    from spectra.comparison import Comparison

__all__ = ["Finding", "diagnose"]

SENTENCES = (
    size.nothing,
    size.outliers,
    size.zero,
    size.size,
    size.depth,
    size.roles,
    spectrum.singular_values_or_directions,
    spectrum.sign,
    spectrum.part_of_the_spectrum,
    spectrum.rank,
    spectrum.intruders,
    spectrum.leading_directions,
    spectrum.full_decompositions,
    size.rounding,
    size.unchanged,
    size.failed,
)


def diagnose(result: Comparison) -> list[Finding]:
    """Say what fine-tuning did to the weights and what that is consistent with.

    Outliers (see `summary.is_outlier`) are named first and left out of every sum after that. Sums over matrices are
    weighted by energy, medians count each matrix once. Sentences without evidence (no compared matrix, NaN measures)
    are not made.

    Returns: findings in reading order, tuned model by tuned model, then one that compares the models (of a sequence,
    several that say how each measure went).
    """
    evidence = [gather(result, tuned) for tuned in summary.tuned_labels(result)]
    findings = [sentence(each) for each in evidence for sentence in SENTENCES]
    between = over_the_sequence(result) if is_sequence(result) else [_between(evidence)]
    return [finding for finding in [*findings, *between] if finding is not None]


def _between(evidence: list[Evidence]) -> Finding | None:
    """Several tuned models side by side, the one that moved furthest first."""
    updates = {each.tuned: summary.pooled_update(each.typical) for each in evidence if len(each.typical)}
    updates = {tuned: update for tuned, update in updates.items() if not math.isnan(update)}
    if len(updates) < 2:
        return None
    order = sorted(updates, key=lambda tuned: -updates[tuned])
    intruders = {
        each.tuned: int(each.compared["intruders"].fillna(0).sum()) for each in evidence if each.tuned in updates
    }
    numbers: Numbers = {f"relative_update of {tuned}": updates[tuned] for tuned in order}
    numbers |= {f"intruders of {tuned}": intruders[tuned] for tuned in order}
    sizes = ", ".join(
        f"{printable(tuned)} by {number(updates[tuned])} ({intruders[tuned]} intruders)" for tuned in order
    )
    text = f"Of the tuned models {printable(order[0])} moved furthest, outliers aside: {sizes} of the base in norm."
    return Finding(text, numbers, ", ".join(updates), [])

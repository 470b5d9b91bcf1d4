"""What a terminal and a page say after the tables: findings, what was not compared, notes, files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.report import summary
from spectra.report.sentences_size import SHOWN_REASONS
from spectra.report.wording import counted, listed

if TYPE_CHECKING:
    from spectra.comparison import Comparison

MOST_REASONS = 8
FILES = (
    "layers.parquet",
    "components.parquet",
    "slices.parquet",
    "unmatched.parquet",
    "comparison.json",
    "report.html",
)


def sections(result: Comparison, labels: Sequence[str], out: Path | None) -> Iterator[tuple[str, list[str]]]:
    """What follows the tables: a heading and its sentences each."""
    findings = result.diagnosis()
    for tuned in labels:
        of = f": {tuned}" if len(labels) > 1 else ""
        yield f"What fine-tuning did{of}", [finding.text for finding in findings if finding.tuned == tuned]
    if len(labels) > 1:
        yield "Between the models", [finding.text for finding in findings if finding.tuned not in labels]
    for tuned in labels:
        of = f": {tuned}" if len(labels) > 1 else ""
        yield f"Not compared{of}", left_out_sentences(result, tuned)
    yield "Notes", joined_notes([str(note) for note in result.provenance.get("notes", [])], labels)
    if result.provenance.get("interrupted"):
        yield "Interrupted", ["The work was stopped: matrices that were not reached are in no table."]
    yield "Files", [_files(out)]


def left_out_sentences(result: Comparison, tuned: str) -> list[str]:
    """What was not compared: a sentence per reason with its count and a few names, the commonest reason first.

    Failures that a sentence of the diagnosis has quoted are not said again.
    """
    reasons = summary.left_out(result, tuned)
    quoted = [reason for reason in reasons if reason.failed][:SHOWN_REASONS]
    reasons = [reason for reason in reasons if reason not in quoted]
    sentences = [
        f"{reason.text} - {counted(len(reason.names), 'tensor')}: {listed(reason.names)}"
        for reason in reasons[:MOST_REASONS]
    ]
    rest = reasons[MOST_REASONS:]
    if rest:
        tensors = counted(sum(len(reason.names) for reason in rest), "tensor")
        sentences.append(f"{tensors} for {counted(len(rest), 'other reason')}: see the table `unmatched`")
    return sentences


def joined_notes(notes: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The notes in their order; those that say the same of several tuned models once, with the labels joined.

    >>> joined_notes(["a: one shard", "b: one shard", "b: two files"], ["a", "b"])
    ['a, b: one shard', 'b: two files']
    """
    of_text: dict[tuple[bool, str], list[str]] = {}
    for note in notes:
        label = max((label for label in labels if note.startswith(f"{label}: ")), key=len, default="")
        said_of = of_text.setdefault((bool(label), note[len(label) + 2 :] if label else note), [])
        if label and label not in said_of:
            said_of.append(label)
    return [f"{', '.join(said_of)}: {text}" if said_of else text for (_, text), said_of in of_text.items()]


def _files(out: Path | None) -> str:
    if out is None:
        return "nothing was written: --out DIR keeps tables and pictures"
    there = [name for name in FILES if (out / name).exists()]
    pictures = len(list(out.glob("pictures/*.png")))
    return (
        f"{out}"
        + (f": {', '.join(there)}" if there else "")
        + (f", {counted(pictures, 'picture')}" if pictures else "")
    )

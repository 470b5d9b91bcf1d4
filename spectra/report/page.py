"""A comparison as HTML: a summary for notebooks, and one self-contained page with its pictures."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.report import summary
from spectra.report.pictures import standard_set
from spectra.report.rows import COLUMNS, MARKS, Line, model_lines
from spectra.report.sections import left_out_sentences
from spectra.report.sequence_table import is_sequence
from spectra.report.tables import heading
from spectra.report.wording import printable

if TYPE_CHECKING:
    from spectra.comparison import Comparison
    from spectra.report.evidence import Finding

TOP = 10
SHOWN = COLUMNS[:7]
STYLE = """
.spectra { font-family: system-ui, sans-serif; font-size: 14px; line-height: 1.45; max-width: 62em; }
.spectra table { border-collapse: collapse; margin: .5em 0; }
.spectra th, .spectra td { padding: .15em .6em; text-align: right; font-variant-numeric: tabular-nums; }
.spectra th:nth-child(2), .spectra td:nth-child(2) { text-align: left; font-family: ui-monospace, monospace; }
.spectra thead th { border-bottom: 1px solid currentColor; }
.spectra tr.role:not(.role + .role) td, .spectra tr.model:not(.model + .model) td { border-top: 1px solid #8888; }
.spectra tr.model td { font-weight: 600; }
.spectra .meaning { opacity: .75; font-size: 12px; }
.spectra figure { margin: 1.5em 0; } .spectra img { max-width: 100%; background: white; }
"""


def summary_html(result: Comparison) -> str:
    """The comparison for a notebook: title, per tuned model a table and findings, and what was not compared, folded.

    Self-contained and light (no pictures, no scripts); every name is escaped.
    """
    return f'<div class="spectra"><style>{STYLE}</style>{_summary(result)}</div>'


def write_page(
    result: Comparison, folder: str | os.PathLike[str], pictures: Sequence[str | os.PathLike[str]] = ()
) -> Path:
    """Write `report.html` into `folder`: the summary and the standard pictures in one file that needs no other.

    Args:
        pictures: files that `save_pictures` has just written for this very result: they are embedded; others are drawn.
    Returns: the path of the page.   Raises: OSError where the folder cannot be written.
    """
    from spectra.atomic import replacing

    drawn = {Path(path).name: Path(path) for path in pictures}
    figures = []
    for picture in standard_set(result):
        image = drawn[picture.file].read_bytes() if picture.file in drawn else picture.png()
        source = base64.b64encode(image).decode("ascii")
        caption = _text(picture.caption)
        picture_tag = f'<img alt="{caption}" src="data:image/png;base64,{source}">'
        figures.append(f"<figure>{picture_tag}<figcaption>{caption}</figcaption></figure>")
    page = Path(folder) / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>spectra: what fine-tuning did</title><style>{STYLE}</style>"
    )
    body = f'<main class="spectra">{_summary(result)}{"".join(figures)}</main>'
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'
    with replacing(page) as path:
        path.write_text(text, encoding="utf-8")
    return page


def _summary(result: Comparison) -> str:
    labels = summary.tuned_labels(result)
    base = result.provenance.get("base")
    source = str(base.get("source", "")) if isinstance(base, dict) else ""
    against = f" against {_text(source)}" if source else ""
    parts = [f"<h3>What fine-tuning did: {_text(', '.join(labels)) or 'nothing was compared'}{against}</h3>"]
    findings = result.diagnosis()
    if is_sequence(result):
        from spectra.report.sequence_printing import sequence_html

        parts.append(sequence_html(result))
        parts.append(_list([finding for finding in findings if finding.tuned not in labels]))
    for tuned in labels[-1:] if is_sequence(result) else labels:
        lines = model_lines(result, tuned, TOP)
        parts.append(f"<h4>{_text(heading(result, tuned))}</h4>")
        if lines:
            parts.append(_table(result, lines))
        parts.append(_list([finding for finding in findings if finding.tuned == tuned]))
        missing = left_out_sentences(result, tuned)
        if missing:
            items = "".join(f"<li>{_text(sentence)}</li>" for sentence in missing)
            parts.append(f"<details><summary>not compared</summary><ul>{items}</ul></details>")
    if not is_sequence(result):
        parts.append(_list([finding for finding in findings if finding.tuned not in labels]))
    if result.provenance.get("interrupted"):
        parts.append("<p>The work was stopped: matrices that were not reached are in no table.</p>")
    return "".join(parts)


def _table(result: Comparison, lines: Sequence[Line]) -> str:
    head = "".join(f'<th title="{_text(column.explained(result))}">{_text(column.title)}</th>' for column in SHOWN)
    body = []
    for line in lines:
        cells = [column.write(line.values.get(column.measure, float("nan"))) for column in SHOWN]
        if line.kind == "failed":
            cells[0] = "failed"
        numbers = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        body.append(f'<tr class="{line.kind}"><td>{_text(line.marks)}</td><td>{_text(line.name)}</td>{numbers}</tr>')
    marks = [f"{mark} {meaning}" for mark, meaning in MARKS.items() if any(mark in line.marks for line in lines)]
    meanings = [f"{column.title}: {column.explained(result)}" for column in SHOWN] + marks
    return (
        f"<table><thead><tr><th></th><th>matrix</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        f'<p class="meaning">{"; ".join(_text(meaning) for meaning in meanings)}.</p>'
    )


def _list(findings: Sequence[Finding]) -> str:
    return f"<ul>{''.join(f'<li>{_text(finding.text)}</li>' for finding in findings)}</ul>" if findings else ""


def _text(text: str) -> str:
    return escape(printable(text))

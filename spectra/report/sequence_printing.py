"""A sequence in a terminal, in a page and as JSON: its table, and what is said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from spectra.report import summary
from spectra.report.sections import sections
from spectra.report.sequence_table import SCORES, sequence_table
from spectra.report.wording import number, percent, printable, shorten

if TYPE_CHECKING:
    import pandas as pd

    from spectra.comparison import Comparison

CELL = 8  # characters of a number, with the space before it
BETWEEN = "Between the models"  # the heading that sections() gives what is said of several models
LEAST_NAME, PAGE_WIDTH = 12, 120


def _count(value: float) -> str:
    return f"{value:.0f}"


HEADINGS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("update", "relative_update", number),
    ("sv x", "diagonal_enrichment", lambda value: number(value, 2)),
    ("turn", "off_diagonal_share", percent),
    ("out", "outside_share", percent),
    ("rot", "rotation", lambda value: number(value, 2)),
    ("kept", "left_overlap", lambda value: f"{value:.2f}"),
    ("eff", "effective_rank", number),
    ("intr", "intruders", _count),
    ("score", "score", number),
    ("lost", "forgetting", number),
)
LEGEND = (
    "update, sv x, turn, out: pooled over the same matrices in every model, as in the tables of single models; "
    "rot (first-order angles, radians), kept, eff: medians; intr: the sum of the intruders"
)
LEGEND_OF_SCORES = "; score: of the new task; lost: forgetting"


def print_sequence(result: Comparison, console: Console, out: Path | None = None) -> None:
    """Print a sequence for a person: a line per model, how each measure went, what was not compared, the files.

    Names are text: no markup or escape in them acts.
    """
    if console.is_terminal:
        _print(result, console, out)
        return
    with console.capture() as captured:
        _print(result, console, out)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))  # no trailing blanks


def _print(result: Comparison, console: Console, out: Path | None) -> None:
    def encodable(text: str, style: str = "") -> Text:
        return Text(printable(text).encode(console.encoding, "backslashreplace").decode(console.encoding), style)

    labels = summary.tuned_labels(result)
    console.print(Text(f"{len(labels)} tuned models in sequence", "bold"))
    table = sequence_table(result)
    console.print(_table(table, console.width, encodable))
    console.print(Text(_legend(table), "dim"))
    console.print()
    said = sorted(sections(result, labels, out), key=lambda section: section[0] != BETWEEN)
    missing = dict(said).get(f"Not compared: {labels[-1]}")
    for title, sentences in said:
        # Of models in order the last one is described, and the others by what changed.
        of_earlier = title in {f"What fine-tuning did: {label}" for label in labels[:-1]}
        again = sentences == missing and title != f"Not compared: {labels[-1]}"
        if sentences and not of_earlier and not again:
            console.print(encodable("Over the sequence" if title == BETWEEN else title, "bold"))
            for sentence in sentences:
                grid = Table.grid(padding=(0, 1))
                grid.add_row(Text("-"), encodable(sentence))
                console.print(Padding(grid, (0, 0, 0, 1)))
            console.print()


def sequence_html(result: Comparison) -> str:
    """The table of a sequence as HTML; every name is escaped."""
    table = sequence_table(result)
    headings, rows = _cells(table, PAGE_WIDTH)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ("", *headings))
    body = "".join(f"<tr><td></td>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    meaning = f'<p class="meaning">{escape(_legend(table))}.</p>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{meaning}"


def sequence_json(result: Comparison) -> list[dict[str, Any]]:
    """The rows of the table as plain values; missing ones are None."""
    rows: list[dict[str, Any]] = json.loads(sequence_table(result).to_json(orient="records", double_precision=15))
    return rows


def _legend(table: pd.DataFrame) -> str:
    return LEGEND + (LEGEND_OF_SCORES if table[list(SCORES)].notna().any(axis=None) else "")


def _table(table: pd.DataFrame, width: int, encodable: Callable[[str], Text]) -> Table:
    headings, rows = _cells(table, width)
    drawn = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for at, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if at == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(encodable, row))
    return drawn


def _cells(table: pd.DataFrame, width: int) -> tuple[list[str], list[list[str]]]:
    """Headings and written cells; scores have columns only where one is known."""
    shown = [heading for heading in HEADINGS if table[heading[1]].notna().any()]
    room = max(LEAST_NAME, width - CELL * len(shown))
    names = [shorten(name, room) for name in table["tuned"]]
    columns = [
        ["-" if math.isnan(value) else write(value) for value in table[name].to_numpy("float64", na_value=math.nan)]
        for _, name, write in shown
    ]
    rows = [list(row) for row in zip(names, *columns, strict=True)]
    return ["model", *(title for title, _, _ in shown)], rows

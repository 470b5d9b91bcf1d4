"""What a covariance shift looks like in a terminal, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from spectra.report.rows import Column, Line
from spectra.report.shift_plots import FOLDER
from spectra.report.shift_rows import columns_of, shift_lines
from spectra.report.shift_sentences import describe
from spectra.report.shift_summary import functional_summary, measured, mode_of
from spectra.report.wording import counted, listed, matrices, pattern, printable, shorten

if TYPE_CHECKING:
    from spectra.shift import CovarianceShift

CELL = 8  # characters of a number, with the space before it
NARROWEST_NAME = 34  # columns of numbers are dropped before names get shorter than this
MODES = {
    "same_inputs": "both weights on the base's inputs",
    "end_to_end": "each model on its own inputs",
    "data_free": "without data, inputs taken as white",
}
FILES = (
    "shift_layers.parquet",
    "shift_components.parquet",
    "shift_slices.parquet",
    "shift_unmatched.parquet",
    "shift_functional.parquet",
    "covariance_shift.json",
)


def print_shift(result: CovarianceShift, console: Console, top: int = 15, out: Path | None = None) -> None:
    """Print a shift for a person: the strongest matrices, roles, the whole; what that means; what was left out.

    Args:
        console: its width decides how many columns there are. Names are text: no markup or escape in them acts.
        top: how many matrices are listed.   out: the folder that the result was written to; None where nowhere.
    """
    if console.is_terminal:
        _print(result, console, top, out)
        return
    with console.capture() as captured:
        _print(result, console, top, out)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))  # no trailing blanks


def heading(result: CovarianceShift) -> str:
    """One line: what was measured, how, on how many samples."""
    mode, rows = mode_of(result), measured(result)
    centred = "" if result.provenance.get("centred", True) else ", uncentred"
    basis = f"{rows['basis'].iloc[0]} basis" if len(rows) else "nothing measured"
    samples = int(rows["samples"].max()) if len(rows) and mode != "data_free" else 0
    on = f", {counted(samples, 'position')}" if samples else ""
    return f"covariance shift of {matrices(len(rows))} ({MODES.get(mode, mode)}; {basis}{centred}{on})"


def _print(result: CovarianceShift, console: Console, top: int, out: Path | None) -> None:
    def text(words: str, style: str = "") -> Text:
        return Text(printable(words).encode(console.encoding, "backslashreplace").decode(console.encoding), style=style)

    columns = _columns(result, console.width)
    console.print(text(heading(result), "bold"))
    lines = shift_lines(result, top)
    if lines:
        console.print(_table(lines, columns, console.width))
        more = len(measured(result)) - sum(line.kind == "matrix" for line in lines)
        if more > 0:
            console.print(text(f"  ... and {matrices(more)} that shifted less (--top {top + more} shows all)"))
        console.print()
        legend = Table.grid(padding=(0, 1))
        for column in columns:
            legend.add_row(Text(column.title, "bold"), Text(column.meaning, "dim"))
        legend.add_row(Text("lines", "bold"), Text("over several matrices: medians", "dim"))
        console.print(legend)
        console.print()
    for title, sentences in _sections(result, out):
        if sentences:
            console.print(text(title, "bold"))
            for sentence in sentences:
                bullet = Table.grid(padding=(0, 1))
                bullet.add_row(Text("-"), text(sentence))
                console.print(Padding(bullet, (0, 0, 0, 1)))
            console.print()


def _sections(result: CovarianceShift, out: Path | None) -> Iterator[tuple[str, list[str]]]:
    yield "What fine-tuning did to the features", [finding.text for finding in describe(result)]
    yield "Not measured", left_out(result)
    yield "Notes", [str(note) for note in result.provenance.get("notes", [])]
    yield "Files", [_files(out)]


def left_out(result: CovarianceShift) -> list[str]:
    """A sentence per reason why matrices were not measured, the commonest first."""
    groups: dict[str, tuple[str, dict[str, None]]] = {}  # a name may stand on both sides
    for name, reason in zip(result.unmatched["name"], result.unmatched["reason"], strict=True):
        groups.setdefault(pattern(str(reason)), (str(reason), {}))[1][str(name)] = None
    ordered = sorted(groups.values(), key=lambda group: -len(group[1]))
    return [f"{reason} - {counted(len(names), 'tensor')}: {listed(list(names))}" for reason, names in ordered]


def _files(out: Path | None) -> str:
    if out is None:
        return "nothing was written: --out DIR keeps tables and pictures"
    there = [name for name in FILES if (out / name).exists()]
    pictures = len(list((out / FOLDER).glob("*.png")))
    return f"{out}: {', '.join(there)}" + (f", {counted(pictures, 'picture')} in {FOLDER}" if pictures else "")


def _columns(result: CovarianceShift, width: int) -> list[Column]:
    """The columns that a console of this width has room for, in their order."""
    columns = columns_of(result)
    kept = sorted(columns, key=lambda column: column.priority)[: max(1, (width - NARROWEST_NAME - 3) // CELL)]
    return [column for column in columns if column in kept]


def _table(lines: Sequence[Line], columns: Sequence[Column], width: int) -> Table:
    name_width = max(8, width - 3 - CELL * len(columns))
    longest = max(len(printable(line.name)) for line in lines)
    table = Table(box=None, padding=0, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("", width=3, no_wrap=True)
    table.add_column("matrix", width=min(name_width, max(longest, 6)), no_wrap=True, overflow="crop")
    for column in columns:
        table.add_column(column.title, width=CELL, justify="right", no_wrap=True, overflow="crop")
    previous = lines[0].kind
    for line in lines:
        if line.kind != previous:
            table.add_row()
        previous = line.kind
        cells = [column.write(line.values.get(column.measure, math.nan)) for column in columns]
        name = Text(shorten(printable(line.name), name_width))
        table.add_row(Text(""), name, *(Text(cell) for cell in cells), style="bold" if line.kind == "model" else "")
    return table


def shift_to_json(result: CovarianceShift, top: int = 15) -> dict[str, Any]:
    """The shift for machines: plain dicts, lists, numbers and strings; NaN and infinities are None.

    Keys: `mode`, `strongest` rows of `layers`, `roles` and `whole` (medians), `findings`, `functional` (a summary per
    measure), `not_measured`, `provenance`.
    """
    import pandas as pd

    lines = shift_lines(result, 0)
    plain = {
        "mode": mode_of(result),
        "matrices": len(measured(result)),
        "strongest": measured(result).head(top).to_dict("records"),
        "roles": {line.name.rsplit(",", 1)[0]: line.values for line in lines if line.kind == "role"},
        "whole": next((line.values for line in lines if line.kind == "model"), {}),
        "findings": [
            {"text": each.text, "numbers": each.numbers, "matrices": each.matrices} for each in describe(result)
        ],
        "functional": functional_summary(result.functional).to_dict("index"),
        "not_measured": result.unmatched.to_dict("records"),
        "provenance": dict(result.provenance),
    }
    written: dict[str, Any] = json.loads(
        pd.Series(plain, dtype=object).to_json(double_precision=15, default_handler=str)
    )
    return written

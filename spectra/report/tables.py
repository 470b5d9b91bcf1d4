"""What a comparison looks like in a terminal, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from spectra.report import summary
from spectra.report.rows import COLUMNS, MARKS, Column, Line, model_lines
from spectra.report.sections import sections
from spectra.report.wording import ELLIPSIS, counted, matrices, printable, shorten

if TYPE_CHECKING:
    from spectra.comparison import Comparison

CELL = 7  # characters of a number, with the space before it
NARROWEST_NAME = 34  # columns of numbers are dropped before names get shorter than this
LEAST_SOURCE = 16  # characters of a path, under which it says nothing
ROLE_FROM = 118  # console width from which the role has its own column


def print_comparison(result: Comparison, console: Console, top: int = 15, out: Path | None = None) -> None:
    """Print a comparison for a person.

    Per tuned model its strongest changes, a line per role and for the whole model; then what that means, what was not
    compared and why, and where the files are.

    Args:
        console: its width decides how many columns there are. Names are text: no markup or escape in them acts.
        top: how many matrices are listed for each tuned model.
        out: the folder that the result is (being) written to; None where it is kept nowhere.
    """
    if console.is_terminal:
        _print(result, console, top, out)
        return
    with console.capture() as captured:
        _print(result, console, top, out)
    console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))  # no trailing blanks


def _print(result: Comparison, console: Console, top: int, out: Path | None) -> None:
    encodable = _Encodable(console.encoding)
    labels = summary.tuned_labels(result)
    shown: list[Line] = []
    columns = _columns(console.width)
    for tuned in labels:
        lines = model_lines(result, tuned, top)
        shown += lines
        for line in heading(result, tuned, console.width).splitlines():  # its own breaks, not one inside a count
            console.print(encodable(line, "bold"))
        if lines:
            console.print(_table(lines, columns, console.width, encodable))
        listed_here = sum(line.kind == "matrix" for line in lines)
        more = len(summary.compared(summary.rows_of(result, tuned))) - listed_here
        if more > 0:
            console.print(
                encodable(f"  ... and {matrices(more)} that changed less (--top {listed_here + more} shows all)")
            )
        console.print()
    if any(line.kind != "failed" for line in shown):
        console.print(_legend(result, shown, columns))
        console.print()
    for title, sentences in sections(result, labels, out):
        if sentences:
            console.print(encodable(title, "bold"))
            for sentence in sentences:
                console.print(Padding(_bullet(sentence, encodable), (0, 0, 0, 1)))
            console.print()


class _Encodable:
    """Text that the console's encoding can write; other letters become escapes."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding

    def __call__(self, text: str, style: str = "") -> Text:
        return Text(printable(text).encode(self.encoding, "backslashreplace").decode(self.encoding), style=style)


def heading(result: Comparison, tuned: str, width: int = 0) -> str:
    """One line on a tuned model: its label, its source, how many of its matrices were compared.

    Args:
        width: where given and too narrow for it all, the source is shortened, then the counts get their own line.
    """
    layers = summary.rows_of(result, tuned)
    counts = [
        f"{matrices(count) if first else count} {status}"
        for first, (status, count) in zip((True, False, False), _statuses(result, tuned).items(), strict=True)
        if count or first
    ]
    named = result.provenance.get("tuned")
    described = named.get(tuned) if isinstance(named, Mapping) else None
    source = str(described.get("source", "")) if isinstance(described, Mapping) else ""
    said = ", ".join(counts) if len(layers) else "nothing compared"
    label = printable(tuned)
    room = min(60, width - len(f"{label} (): {said}")) if width else 60
    if not source or source == tuned:
        where = ""
    elif room < LEAST_SOURCE:
        where = f" ({_end(source, max(LEAST_SOURCE, width - len(label) - 4))})"
    else:
        where = f" ({_end(source, room)})"
    fits = not width or len(f"{label}{where}: {said}") <= width
    return f"{label}{where}:{' ' if fits else chr(10) + '  '}{said}"


def _end(source: str, width: int) -> str:
    text = printable(source)
    return text if len(text) <= width else ELLIPSIS + text[len(ELLIPSIS) - width :]


def _statuses(result: Comparison, tuned: str) -> dict[str, int]:
    status = summary.rows_of(result, tuned)["status"]
    return {name: int((status == name).sum()) for name in ("compared", "unchanged", "failed")}


def _columns(width: int) -> list[Column]:
    """The columns that a console of this width has room for, in their order."""
    room = max(1, (width - NARROWEST_NAME - 3 - (18 if width >= ROLE_FROM else 0)) // CELL)
    kept = sorted(COLUMNS, key=lambda column: column.priority)[:room]
    return [column for column in COLUMNS if column in kept]


def _table(lines: Sequence[Line], columns: Sequence[Column], width: int, encodable: _Encodable) -> Table:
    with_role = width >= ROLE_FROM
    name_width = max(8, width - 3 - CELL * len(columns) - (18 if with_role else 0))
    longest = max(len(encodable(line.name)) for line in lines)
    table = Table(box=None, padding=0, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("", width=3, no_wrap=True)
    table.add_column("matrix", width=min(name_width, max(longest, 6)), no_wrap=True, overflow="crop")
    if with_role:
        table.add_column("  role", width=18, no_wrap=True, overflow="crop")
    for column in columns:
        table.add_column(column.title, width=CELL, justify="right", no_wrap=True, overflow="crop")
    previous = lines[0].kind
    for line in lines:
        if line.kind != previous and line.kind in ("role", "model"):
            table.add_section()
            table.add_row()
        previous = line.kind
        cells = [column.write(line.values.get(column.measure, math.nan)) for column in columns]
        if line.kind == "failed":
            cells = ["failed", *["-"] * (len(columns) - 1)]
        name = Text(shorten(encodable(line.name).plain, name_width))
        role = [encodable(f"  {line.role}")] if with_role else []
        table.add_row(Text(f" {line.marks}"), name, *role, *(Text(cell) for cell in cells), style=_style(line))
    return table


def _style(line: Line) -> str:
    return {"failed": "red", "model": "bold"}.get(line.kind, "yellow" if line.marks else "")


def _legend(result: Comparison, lines: Sequence[Line], columns: Sequence[Column]) -> Table:
    """What each column and each mark that occurs means, a line each, and how lines over several matrices are made."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column()
    for column in columns:
        grid.add_row(Text(column.title, "bold"), Text(column.explained(result), "dim"))
    for mark, meaning in MARKS.items():
        if any(mark in line.marks for line in lines):
            grid.add_row(Text(mark, "bold"), Text(meaning, "dim"))
    sums = "over several matrices: update = sqrt(sum ||D||^2) / sqrt(sum ||W||^2); sv x, turn %, out % of the pooled "
    sums += "energy; intr = the sum; all else medians"
    grid.add_row(Text("lines", "bold"), Text(sums, "dim"))
    return grid


def _bullet(sentence: str, encodable: _Encodable) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_row(Text("-"), encodable(sentence))
    return grid


def to_json(result: Comparison, top: int = 15) -> dict[str, Any]:
    """The comparison for machines: what `print_comparison` says, with every column of `layers` for the `top` matrices.

    Returns: plain dicts, lists, numbers and strings; NaN and infinities are None. Keys: `models` (per tuned model
    `status` counts, `strongest` rows, `outliers`, `roles` and `whole` lines), `findings`, `not_compared`, `provenance`.
    """
    labels = summary.tuned_labels(result)
    models = {}
    for tuned in labels:
        lines = model_lines(result, tuned, 0)
        moved = summary.compared(summary.rows_of(result, tuned))
        strongest = moved.sort_values("relative_update", ascending=False, kind="stable").head(top)
        models[tuned] = {
            "status": _statuses(result, tuned),
            "strongest": strongest.to_dict("records"),
            "outliers": list(moved["name"][summary.is_outlier(moved)]),
            "roles": {line.name.split(",")[0]: line.values for line in lines if line.kind == "role"},
            "whole": {line.name.split(",")[0]: line.values for line in lines if line.kind == "model"},
        }
    plain = {
        "models": models,
        "findings": [
            {"tuned": each.tuned, "text": each.text, "numbers": each.numbers, "matrices": each.matrices}
            for each in result.diagnosis()
        ],
        "not_compared": {
            tuned: [
                {"reason": reason.text, "count": len(reason.names), "names": reason.names}
                for reason in summary.left_out(result, tuned)
            ]
            for tuned in labels
        },
        "provenance": dict(result.provenance),
    }
    return {key: _plain(value) for key, value in plain.items()}


def _plain(value: Any) -> Any:
    """Nested values as JSON knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    import pandas as pd

    return None if value is pd.NA else str(value)


def inspect_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The tensors of a checkpoint as a table, with totals.

    Args:
        rows: name, shape (None where unknown), dtype, role, layer (None outside the blocks), part, bytes, and
            optionally note; a row per matrix, or per tensor that is none.
    """
    table = Table(
        box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_footer=True, footer_style="bold"
    )
    total = sum(int(row["bytes"] or 0) for row in rows)
    table.add_column("tensor", counted(len({row["name"] for row in rows}), "tensor"), overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("bytes", size_in_words(total), justify="right", no_wrap=True)
    updates = sum(str(row.get("note", "")).startswith("low-rank update") for row in rows)
    count = matrices(sum(bool(row["role"]) for row in rows)) if not updates else counted(updates, "low-rank update")
    table.add_column("role", count, overflow="fold", max_width=24)
    for row in rows:
        shape = " x ".join(str(side) for side in row["shape"]) if row["shape"] is not None else "-"
        layer = "" if row["layer"] is None else f"layer {row['layer']}"
        cells = (
            str(row["name"]) + (f"[{row['part']}]" if row["part"] else ""),
            shape or "scalar",
            str(row["dtype"]).removeprefix("torch."),
            size_in_words(int(row["bytes"])) if row["bytes"] else "",
            ", ".join(text for text in (str(row["role"]), layer, str(row.get("note", "")).split(":")[0]) if text),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def size_in_words(count: int) -> str:
    """A number of bytes in decimal units.

    >>> size_in_words(999), size_in_words(27_000_000)
    ('999 B', '27.0 MB')
    """
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.95 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"

"""`spectra cache ls` and `spectra cache clear`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from spectra.errors import SpectraError

Folder = Annotated[Path, typer.Argument(help="The folder that `spectra compare --cache` was given.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    cache = typer.Typer(help="List or clear a folder of base spectra, as --cache keeps them.", no_args_is_help=True)
    cache.command("ls", no_args_is_help=True)(list_entries)
    cache.command("clear", no_args_is_help=True)(clear)
    app.add_typer(cache, name="cache")


def list_entries(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout in place of the table.")] = False,
) -> None:
    """List the spectra, the most recently used first: shape, precision of the vectors, solver, size, last use."""
    _check(folder)
    from spectra.cache import entries_of

    entries = entries_of(folder)
    if as_json:
        rows = [
            {
                "key": entry.key,
                "bytes": entry.bytes,
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "algorithm": entry.algorithm,
                "used": entry.used.isoformat(timespec="seconds"),
            }
            for entry in entries
        ]
        json.dump(rows, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, pad_edge=False)
    for heading in ("key", "shape", "vectors", "solver", "size", "last used (UTC)"):
        table.add_column(heading, justify="right" if heading in ("shape", "size") else "left", no_wrap=True)
    for entry in entries:
        shape = f"{entry.shape[0]} x {entry.shape[1]}" if entry.dtype else ""
        used = f"{entry.used:%Y-%m-%d %H:%M}"
        table.add_row(entry.key[:12], shape, entry.dtype, entry.algorithm, _size(entry.bytes), used)
    if entries:
        console.print(table, highlight=False)
    total = _size(sum(entry.bytes for entry in entries))
    console.print(f"{len(entries)} spectra, {total}, in {folder}", markup=False, highlight=False, soft_wrap=True)


def clear(folder: Folder) -> None:
    """Remove the spectra, and nothing else that may be in the folder. A run that uses them meanwhile is not harmed."""
    _check(folder)
    from spectra.cache import SpectrumCache

    typer.echo(f"{_size(SpectrumCache(folder).clear())} freed in {folder}")


def _check(folder: Path) -> None:
    """Refuse a folder that is not there: a mistyped one must not be made, nor be called empty."""
    if folder.exists() and not folder.is_dir():
        raise SpectraError(f"{folder} is a file and no folder of spectra; give the one that --cache was given")
    if not folder.is_dir():
        raise SpectraError(f"there is no folder {folder}; give the one that `spectra compare --cache` was given")


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"

"""`spectra define`."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(define)


def define(
    column: Annotated[
        str | None, typer.Argument(help="A column of any table; without one, the whole document.")
    ] = None,
) -> None:
    """Print the definition of a column, or of everything: conventions, equations, sources, accuracy."""
    from spectra import definitions

    typer.echo(f"{column}: {definitions.define(column)}" if column else definitions.document().rstrip())

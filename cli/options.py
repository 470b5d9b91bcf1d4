"""Options that several commands share, each with its one help text."""

from __future__ import annotations

from typing import Annotated

import typer

Include = Annotated[
    list[str] | None,
    typer.Option(help="Only matrices whose name fits this glob, such as '*.attention.*'. May be repeated."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="No matrices whose name fits this glob. May be repeated.")]
Transposed = Annotated[
    list[str] | None,
    typer.Option(help="Globs of the tensors stored (in x out), instead of what config, names and shapes tell."),
]
Workers = Annotated[int | None, typer.Option(help="Matrices at a time; by default one a core.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout in place of the table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]

"""Options that several commands share, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[str, typer.Argument(help="The base: a checkpoint file, a model folder, or a cached hub id.")]
TunedOne = Annotated[str, typer.Argument(help="The tuned model, or a PEFT adapter folder of the base.")]
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
Cache = Annotated[Path | None, typer.Option(help="Keep the base's spectra in this folder for later runs.")]
OutEdit = Annotated[Path, typer.Option("--out", help="The folder to write, in the tuned one's own format.")]
ForceEdit = Annotated[bool, typer.Option("--force", help="Replace what an earlier edit left in the folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout in place of the table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]

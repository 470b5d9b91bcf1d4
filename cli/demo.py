"""`spectra demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import check_writable, finish
from .progress import progress_bar


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Where tables and pictures go.")] = Path("demo-output"),
    top: Annotated[int, typer.Option(help="How many of the most changed matrices the table shows.", min=1)] = 8,
) -> None:
    """Run the main job on real weights: a chemistry BERT and its two fine-tuned classifiers.

    The weights come with the package rxnfp: `pip install --no-deps rxnfp==0.1.0`.
    """
    check_writable(out)
    from spectra.comparing import compare
    from spectra.demo import real_pair

    base, tuned = real_pair()
    typer.echo(f"base:  {base}")
    for label, path in tuned.items():
        typer.echo(f"tuned: {path}  ({label})")
    with progress_bar(quiet=False) as progress:
        result = compare(base, tuned, progress=progress)
    finish(result, out=out, pictures=True, as_json=False, quiet=False, top=top)

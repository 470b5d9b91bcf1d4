"""The command `spectra`."""

from __future__ import annotations

import os
import sys

# One BLAS thread a worker: set before numpy or torch load, so that no idle thread pools are made.
for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from spectra.errors import SpectraError  # noqa: E402

from . import (  # noqa: E402
    cache,
    compare,
    continual,
    covariance,
    define,
    demo,
    edit,
    extract,
    inspect,
    intruders,
    mitigate,
    overlap,
    report,
    sweep,
    train,
)

app = typer.Typer(
    name="spectra",
    help="What did fine-tuning do to the weights? Spectral analysis of a base checkpoint and its tuned descendants.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _command in (
    compare, covariance, intruders, overlap, inspect, report, extract, mitigate, edit, train, sweep, continual, cache,
    define, demo,
):  # fmt: skip
    _command.register(app)


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and leave.", is_eager=True),
) -> None:
    if version:
        import spectra

        typer.echo(spectra.__version__)
        raise typer.Exit


def main() -> None:
    """Run the command; a user's mistake is one sentence on stderr and exit status 2."""
    try:
        app()
    except SpectraError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"spectra: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`head`, a pager) has left: nothing more to say, and nothing to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)

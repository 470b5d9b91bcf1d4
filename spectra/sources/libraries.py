"""The optional libraries: imported when they are needed, kept off the network, and silenced while they work for us."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from spectra.errors import SpectraError

EXTRA = "train"


def library(name: str, purpose: str) -> Any:
    """Import an optional library.

    Args:
        purpose: what it is needed for, as the beginning of a sentence: "to run a Hugging Face model".
    Raises: SpectraError that names the extra to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        missing = error.name or name
        what = "Pillow" if missing == "PIL" else missing.split(".")[0]
        raise SpectraError(
            f"{purpose} takes the package {what}, which is not installed; run pip install 'spectra-weights[{EXTRA}]'"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars, log lines and warnings of the Hugging Face libraries on stderr; their settings come back after.

    What matters in them is looked for by the caller and said in a sentence of ours.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("transformers", "datasets"):
            if name in sys.modules:  # what is not loaded says nothing
                stack.enter_context(_silenced(import_module(f"{name}.utils.logging")))
        yield


@contextmanager
def _silenced(logging: Any) -> Iterator[None]:
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return (text if len(text) <= 200 else f"{text[:200]}...").rstrip(".")

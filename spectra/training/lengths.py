"""How many tokens of a text a model can take."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TypeVar

from torch import nn

from spectra.errors import SpectraError
from spectra.training.settings import DataSettings, RetainSettings

LONGEST = 128  # where the settings name no length

_TABLE = re.compile(r"wpe|(.*_)?positions?(_embeddings?)?")  # what models call a table of learnt positions

Texts = TypeVar("Texts", DataSettings, RetainSettings)


def with_length(texts: Texts, model: nn.Module, table: str) -> Texts:
    """The settings with a `max_length`: theirs, or the usual one where the model has positions for it.

    Args: table, the name of these settings, for messages.
    Raises: SpectraError where they name more tokens than the model has positions for.
    """
    most = positions_of(model)
    if texts.max_length is None:
        return replace(texts, max_length=LONGEST if most is None else min(LONGEST, most))
    if most is not None and texts.max_length > most:
        raise SpectraError(
            f"{table}.max_length is {texts.max_length}, and {type(model).__name__} has positions for {most} tokens; "
            f"give at most {most}"
        )
    return texts


def positions_of(model: nn.Module) -> int | None:
    """The tokens for which a model has learnt positions; None where it computes them, for as many as there are."""
    rows = [
        module.num_embeddings - _reserved(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _TABLE.fullmatch(name.rpartition(".")[2])
    ]
    return min(rows, default=None)


def _reserved(module: nn.Embedding) -> int:
    """Rows before that of the first token: those up to the padding's (RoBERTa), or an offset (OPT)."""
    if module.padding_idx is not None:
        return module.padding_idx + 1
    return int(getattr(module, "offset", 0))

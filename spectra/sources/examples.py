"""Texts in a table -> batches of token ids with attention masks."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from spectra.errors import SpectraError
from spectra.sources.batches import Batch, Batches
from spectra.sources.labels import label_tensor
from spectra.sources.libraries import quietly
from spectra.sources.tables import read_columns

MANY_UNKNOWN = 0.1  # of all tokens


def text_batches(
    file: str | PathLike[str],
    tokenizer: Any,
    *,
    text_column: str = "text",
    label_column: str | None = None,
    config: Any = None,
    task: str | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    limit: int | None = None,
    sort: bool = False,
    cache: str | PathLike[str] | None = None,
) -> Batches:
    """Batches of the texts of a table, each padded to its own longest text.

    Args:
        file: a table that `read_columns` reads.   tokenizer: as `load_tokenizer` gives it.
        text_column, label_column: names of columns; without `label_column`, batches have no labels.
        config: of the model, for its labels.   task: of the model, where it is another than its config says.
        batch_size: texts a batch.   max_length: tokens after which a text is cut; by default the most that the
            tokenizer says the model takes, 512 where it says nothing.
        limit: take the first so many rows.   sort: by length, which saves padding; otherwise in the file's order.
        cache: see `read_columns`.
    Returns: `Batches` with `input_ids` and `attention_mask` (N, T) int64, what else the tokenizer makes, and `labels`
        (N,). Rows without text are left out, which its `notes` say.
    Raises: SpectraError that names file, column or row where something is missing or of the wrong kind.
    """
    if batch_size < 1 or (max_length is not None and max_length < 1):
        raise SpectraError("the batch size and the greatest length must be at least 1; give larger ones")
    columns = read_columns(file, [text_column, *([label_column] if label_column else [])], limit=limit, cache=cache)
    texts = [_text(value, row, str(file), text_column) for row, value in enumerate(columns[text_column], 1)]
    length = max_length or _longest(tokenizer)
    with quietly():
        encoded = tokenizer(texts, truncation=True, max_length=length)
    tokens: Sequence[list[int]] = encoded["input_ids"]
    rows = [row for row, text in enumerate(texts) if text.strip() and len(tokens[row])]
    if not rows:
        raise SpectraError(f"the column {text_column!r} of {file} holds no text; name the column that does")
    labels: Tensor | None = None
    if label_column:
        given = [columns[label_column][row] for row in rows]
        labels = _placed(label_tensor(given, config, str(file), label_column, task, rows), rows, len(texts))
    if sort:
        rows.sort(key=lambda row: len(tokens[row]))  # stable: equal lengths stay in the file's order

    def collate(chosen: Sequence[int]) -> Batch:
        padded = tokenizer.pad({name: [values[row] for row in chosen] for name, values in encoded.items()})
        batch = {name: torch.tensor(values) for name, values in padded.items()}
        return batch if labels is None else {**batch, "labels": labels[list(chosen)]}

    cut = sum(len(tokens[row]) >= length for row in rows)
    unknown = sum(tokens[row].count(tokenizer.unk_token_id) for row in rows) / sum(len(tokens[row]) for row in rows)
    notes = (
        (len(rows) < len(texts), f"{len(texts) - len(rows)} of {len(texts)} rows of {file} have no text: left out"),
        (cut > 0, f"{cut} of {len(rows)} texts fill the {length} tokens after which texts are cut"),
        (unknown > MANY_UNKNOWN, f"{unknown:.0%} of the tokens are unknown to the tokenizer: is it this model's?"),
    )
    return Batches(collate, tuple(rows), batch_size, tuple(said for holds, said in notes if holds))


def _text(value: Any, row: int, source: str, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise SpectraError(
        f"row {row} of {source} has the {type(value).__name__} {str(value)[:40]!r} in the column {column!r}, which "
        "is no text; name the column of texts"
    )


def _longest(tokenizer: Any) -> int:
    longest = int(getattr(tokenizer, "model_max_length", 512))
    return longest if longest <= 1 << 20 else 512  # tokenizers that do not know say 10^30


def _placed(labels: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Labels by the number of their row in the file."""
    placed = torch.zeros(count, dtype=labels.dtype)
    placed[torch.tensor(rows)] = labels
    return placed

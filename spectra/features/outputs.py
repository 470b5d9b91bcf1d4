"""What a model said of one batch: a distribution per position, numbers, or features; and its loss, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from spectra.errors import SpectraError

IGNORED = -100  # the label of a position that has none, as torch's cross entropy has it
MOST_ELEMENTS = 1 << 24  # of a float64 block: 128 MiB
Kind = Literal["categories", "bernoulli", "numbers", "features"]


@dataclass(frozen=True)
class Answer:
    """What a model said of one batch of N samples.

    Attributes:
        kind: "categories" (a softmax over the last axis), "bernoulli" (a sigmoid per class: several labels at once),
            "numbers" (regression) or "features" (a model without logits).
        values: (positions, classes) logits of the positions that count, sample after sample, in the model's dtype; or
            (N, d) numbers or features.
        counts: (N,) how many positions each sample has; 1 each where there is one answer a sample.
        loss: (N,) float64, each sample's mean over its labelled positions; NaN where it has none; None without labels.
        remark: what had to be assumed; "" where nothing.
        unused: what is wrong with labels that came and could not be used; "" where nothing.
        of_plain: whether a plain output was taken for logits, by integer labels; None where these decided nothing.
    """

    kind: Kind
    values: Tensor
    counts: Tensor
    loss: Tensor | None
    remark: str = ""
    unused: str = ""
    of_plain: bool | None = None


def read_answer(output: Any, batch: Any, where: str = "the batch", of_plain: bool | None = None) -> Answer | None:
    """What `output` says of `batch`; None where no floating-point tensor of N samples is in it.

    Logits are found under `logits`, or are the first tensor of a plain output where integer labels came with the batch.
    Their last axis holds the classes; with a middle axis (N, T, classes), the positions that the attention mask leaves
    count. Without logits the features are `last_hidden_state`, its mean over the positions that count, then
    `pooler_output`, then the first tensor. Float labels decide between regression and several labels at once as
    transformers does: one output is a regression, more are several labels.

    Losses are the cross entropy with the labels, and for a causal language model, whose position t predicts the token
    t + 1, with the next label; without labels, with the next input token.

    Args:
        where: the batch's name in messages.
        of_plain: what the answer to an earlier batch says of plain outputs, so that no later label changes it.
    Raises: SpectraError for a label that is none of the classes of the logits.
    """
    labels, unused = _labels(batch)
    found, remark, of_plain, unfit = _logits(output, labels, of_plain)
    answer = _features(output, batch) if found is None else _predicted(output, batch, found.detach(), labels, where)
    if answer is None:
        return None
    if found is not None and labels is not None and not _can_use(labels, answer, found.shape):
        unfit = (
            f"labels of shape {list(labels.shape)} and type {labels.dtype} beside logits of shape {list(found.shape)}"
        )
    return replace(answer, remark=remark, unused=unused or unfit, of_plain=of_plain)


def _predicted(output: Any, batch: Any, logits: Tensor, labels: Tensor | None, where: str) -> Answer | None:
    """The answer that logits, or numbers in their place, are."""
    is_float = labels is not None and labels.is_floating_point()
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1) or (is_float and _named(output) is None):
        return _numbers(_flat(logits), labels)
    if logits.dim() == 2:
        ones = torch.ones(len(logits), dtype=torch.int64)
        if is_float and labels is not None and labels.shape == logits.shape:
            each = F.binary_cross_entropy_with_logits(
                logits.double(), labels.to(logits.device).double(), reduction="none"
            )
            return Answer("bernoulli", logits, ones, each.mean(dim=1).cpu())
        loss = _mean_loss(logits[:, None], labels[:, None], where) if _is_of(labels, logits.shape[:1]) else None
        return Answer("categories", logits, ones, loss)
    if logits.dim() == 3:
        counted = _counted_positions(output, batch, labels, logits)
        loss = _sequence_loss(output, batch, labels, logits, counted, where)
        return Answer("categories", logits[counted], counted.sum(dim=1).cpu(), loss)
    return None


def _can_use(labels: Tensor, answer: Answer, shape: Sequence[int]) -> bool:
    """Whether the loss is of these labels, and not left out or of something else."""
    return answer.loss is not None and (answer.kind in ("bernoulli", "numbers") or _is_of(labels, shape[:-1]))


def _mean_loss(logits: Tensor, labels: Tensor | None, where: str) -> Tensor | None:
    """(N, T, V) logits, (N, T) labels -> (N,) float64 mean cross entropy over the labelled positions."""
    if labels is None:
        return None
    labels = labels.to(logits.device)
    if (foreign := _foreign(labels, logits.shape[-1])) is not None:
        raise SpectraError(
            f"{where} has the label {foreign}, and the model answers with the classes 0 to {logits.shape[-1] - 1}; "
            f"mend that label ({IGNORED} stands for none), or leave the functional check out"
        )
    losses = []
    for row, wanted in zip(logits, labels, strict=True):
        known = wanted != IGNORED
        parts = [
            F.cross_entropy(some.double(), want, reduction="sum")
            for some, want in zip(_blocks(row[known]), _blocks(wanted[known], row.shape[-1]), strict=True)
        ]
        count = int(known.sum())
        losses.append(float(sum(parts)) / count if count else float("nan"))
    return torch.tensor(losses, dtype=torch.float64)


def _foreign(labels: Tensor, classes: int) -> int | None:
    """The first label that is no class."""
    found = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    return int(found[0]) if len(found) else None


def _sequence_loss(
    output: Any, batch: Any, labels: Tensor | None, logits: Tensor, counted: Tensor, where: str
) -> Tensor | None:
    is_causal = "CausalLM" in type(output).__name__
    wanted = labels if _is_of(labels, logits.shape[:2]) else None
    if is_causal and wanted is None:
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(tokens, Tensor) or tokens.shape != logits.shape[:2]:
            return None
        both = counted[:, 1:] & counted[:, :-1]  # padding neither predicts nor is predicted
        wanted = tokens.to(logits.device, torch.int64, copy=True)
        wanted[:, 1:][~both] = IGNORED
    return (
        _mean_loss(logits[:, :-1], None if wanted is None else wanted[:, 1:], where)
        if is_causal
        else _mean_loss(logits, wanted, where)
    )


def _counted_positions(output: Any, batch: Any, labels: Tensor | None, logits: Tensor) -> Tensor:
    """(N, T) bool: the positions whose distributions count."""
    names = ("decoder_attention_mask",) if "Seq2Seq" in type(output).__name__ else ("attention_mask",)
    if isinstance(batch, Mapping):
        for name in names:
            mask = batch.get(name)
            if isinstance(mask, Tensor) and mask.shape == logits.shape[:2]:
                return mask.to(logits.device).bool()
    if names[0] != "attention_mask" and _is_of(labels, logits.shape[:2]):
        return labels.to(logits.device) != IGNORED
    return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)


def _numbers(values: Tensor, labels: Tensor | None) -> Answer:
    loss = None
    if labels is not None and labels.numel() == values.numel():
        wanted = labels.to(values.device).double().reshape(values.shape)
        loss = (values.double() - wanted).square().mean(dim=1).cpu()
    return Answer("numbers", values, torch.ones(len(values), dtype=torch.int64), loss)


def _features(output: Any, batch: Any) -> Answer | None:
    hidden = _named(output, "last_hidden_state")
    if hidden is not None and hidden.dim() == 3:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
            weights = mask.to(hidden.device).double()
        else:
            weights = torch.ones(hidden.shape[:2], dtype=torch.float64, device=hidden.device)
        total = weights.sum(dim=1, keepdim=True).clamp_min(1)  # a sample of padding alone has features of zero
        values = torch.einsum("nt,ntd->nd", weights, hidden.detach().double()) / total
    else:
        pooled = _named(output, "pooler_output")
        found = pooled if pooled is not None else _first(output)
        if found is None:
            return None
        values = _flat(found.detach())
    return Answer("features", values, torch.ones(len(values), dtype=torch.int64), None)


def _logits(output: Any, labels: Tensor | None, of_plain: bool | None) -> tuple[Tensor | None, str, bool | None, str]:
    """The logits of an output, what had to be assumed to call them that, `of_plain`, and what forbids the labels."""
    named = _named(output)
    if named is not None:
        return named, "", of_plain, ""
    first = None if isinstance(output, Mapping) else _first(output)
    if first is None or (labels is None and not of_plain):
        return None, "", of_plain, ""
    as_logits = "the output was taken for logits, since integer labels came with the batches"
    if labels is None:
        return first, as_logits, of_plain, ""
    if labels.is_floating_point() and not of_plain:
        fits = len(labels) == len(first) and labels.numel() == first.numel()
        taken = (first, "the output was taken for a prediction of the float labels") if fits else (None, "")
        return *taken, of_plain, ""
    foreign = _foreign(labels, first.shape[-1])
    is_shaped = labels.shape == first.shape[:-1]
    if of_plain is None and len(first):  # an empty batch has nothing to decide by
        of_plain = is_shaped and foreign is None
    if of_plain:
        return first, as_logits, True, ""
    wrong = f"the label {foreign}" if is_shaped and foreign is not None else f"labels of shape {list(labels.shape)}"
    return None, "", of_plain, f"{wrong} beside an output of shape {list(first.shape)}" if len(first) else ""


def _named(output: Any, name: str = "logits") -> Tensor | None:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 else None


def _first(output: Any) -> Tensor | None:
    """The first floating-point tensor with an axis of samples, in an output of any form."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.dim() > 1 else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    return next((found for part in parts if (found := _first(part)) is not None), None)


def _labels(batch: Any) -> tuple[Tensor | None, str]:
    """The labels of a batch, under "labels" or "label" or the second of a pair (inputs, labels), int64 or floating.

    And what is wrong with what stands under "labels" or "label", where it is none.
    """
    if isinstance(batch, Mapping):
        found = batch.get("labels", batch.get("label"))
    else:
        found = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
    if found is None:
        return None, ""
    try:
        labels = found if isinstance(found, Tensor) else torch.tensor(found)
    except (TypeError, ValueError, RuntimeError):
        labels = None
    if labels is None or labels.dim() == 0:
        return None, f"a {type(found).__name__} for labels" if isinstance(batch, Mapping) else ""
    return labels if labels.is_floating_point() else labels.long(), ""


def _is_of(labels: Tensor | None, shape: Sequence[int]) -> TypeGuard[Tensor]:
    return labels is not None and tuple(labels.shape) == tuple(shape) and not labels.is_floating_point()


def _flat(values: Tensor) -> Tensor:
    return values.reshape(len(values), math.prod(values.shape[1:]))  # -1 is undecided for no samples


def _blocks(rows: Tensor, width: int | None = None) -> Sequence[Tensor]:
    return torch.split(rows, max(1, MOST_ELEMENTS // max(1, width or rows.shape[-1])))

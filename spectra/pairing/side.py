"""One checkpoint as pairing sees it: every name that it answers to, tied ones among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spectra.checkpoints.checkpoint import Adapter, Checkpoint, LowRankInfo, TensorInfo
from spectra.matrices import Matrix, transposed_tensors
from spectra.matrices.finding import divide
from spectra.matrices.names import block_of, unwrapped
from spectra.matrices.roles import role_of
from spectra.pairing.matching import Shape

_LANGUAGE_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|proj_out|cls\.predictions\.decoder|predictions\.decoder|lm_head\.decoder)\.weight$"
)
_LANGUAGE_MODEL = re.compile(r"(LMHeadModel|ForCausalLM|ForConditionalGeneration|ForMaskedLM|ForPreTraining)$")


@dataclass(frozen=True)
class Side:
    """A checkpoint's tensors under all of their names, and the matrices in them.

    Attributes:
        tensors: name -> description, tied names among them.
        stored: tied name -> the name under which the tensor is stored.
        matrices: name -> the matrices that its tensor holds, in order.
        left_out: name -> why its tensor holds no matrix.
        is_transposed: name -> whether it is stored in x out, where something decides it.
        updates: name -> an adapter's update; empty for other checkpoints.
        vocabulary: how many words the model knows, the rows of its largest token embedding; None where it has none.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]
    stored: Mapping[str, str]
    matrices: Mapping[str, list[Matrix]]
    left_out: Mapping[str, str]
    is_transposed: Mapping[str, bool]
    updates: Mapping[str, LowRankInfo]
    vocabulary: int | None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Every name that can be matched. Updates and refused tensors have no shape to be held against a name."""
        shapes: dict[str, Shape] = {name: info.shape for name, info in self.tensors.items()}
        return shapes | dict.fromkeys(self.updates) | dict.fromkeys(self.checkpoint.refused)


def side_of(
    checkpoint: Checkpoint, other: Checkpoint, config: Mapping[str, Any], transposed: Sequence[str] | None
) -> Side:
    """What `checkpoint` offers for matching with `other`."""
    aliases = dict(checkpoint.tied) | _implied_ties(checkpoint, other, config)
    stored = {alias: name for alias, name in aliases.items() if name in checkpoint and alias not in checkpoint}
    known = checkpoint.tensors
    tensors = known | {alias: replace(known[name], name=alias) for alias, name in stored.items()}
    is_transposed = transposed_tensors(tensors, config, transposed)
    found, left_out = divide(tensors, config, is_transposed)
    matrices: dict[str, list[Matrix]] = {}
    for matrix in found:
        name = matrix.tensor
        matrices.setdefault(name, []).append(replace(matrix, tensor=stored[name]) if name in stored else matrix)
    return Side(
        checkpoint=checkpoint,
        tensors=tensors,
        stored=stored,
        matrices=matrices,
        left_out=left_out,
        is_transposed=is_transposed,
        updates=checkpoint.updates if isinstance(checkpoint, Adapter) else {},
        vocabulary=max((matrix.rows for matrix in found if matrix.role == "token_embedding"), default=None),
    )


def _implied_ties(checkpoint: Checkpoint, other: Checkpoint, config: Mapping[str, Any]) -> dict[str, str]:
    """The head that a language model must have and does not store: safetensors keep one name of two that are tied."""
    architectures = config.get("architectures") or []
    if isinstance(checkpoint, Adapter) or not checkpoint.config or config.get("tie_word_embeddings") is False:
        return {}
    if not any(_LANGUAGE_MODEL.search(str(name)) for name in architectures):
        return {}
    if any(_LANGUAGE_HEAD.search(name) for name in (*checkpoint, *checkpoint.tied)):
        return {}
    tables = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2 and _is_vocabulary(name)]
    if len(tables) != 1:
        return {}
    updates = other.updates if isinstance(other, Adapter) else {}
    return {unwrapped(name): tables[0] for name in (*other, *updates) if _LANGUAGE_HEAD.search(name)}


def _is_vocabulary(name: str) -> bool:
    is_table = block_of(name) is None and role_of(name, is_kernel=False, is_in_block=False) == "token_embedding"
    return is_table and "token_type" not in name

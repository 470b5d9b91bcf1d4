"""What a pair reads: one expert of a stack, one of q | k | v, the common rows of a vocabulary; not what lies beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from spectra.checkpoints import Checkpoint, open_checkpoint
from spectra.pairing import Pair, pair

IO = Path("/proc/self/io")
EXPERTS = {"l.0.mlp.experts.gate_up_proj": (24, 256, 128), "l.0.mlp.experts.down_proj": (24, 128, 128)}
IN_OUT = {"l.0.mlp.experts.gate_up_proj": (24, 128, 192), "l.0.mlp.experts.down_proj": (24, 96, 128)}
FUSED = {"l.0.self_attn.in_proj_weight": (768, 256), "l.0.self_attn.out_proj.weight": (256, 256)}
LSTM = {"lstm.weight_ih_l0": (512, 64), "lstm.weight_hh_l0": (512, 128)}
CONV1D = {"h.0.attn.c_attn.weight": (128, 384), "h.0.mlp.c_fc.weight": (128, 512)}
PER_HEAD = {"l.0.attention.query_key_value.weight": (384, 128)}
NEOX = {"model_type": "gpt_neox", "hidden_size": 128, "num_attention_heads": 4}


def bytes_read() -> int:
    return int(next(line for line in IO.read_text().splitlines() if line.startswith("rchar")).split()[1])


def opened(path: Path, shapes: dict[str, tuple[int, ...]], seed: int, config: dict[str, Any]) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    safetensors.torch.save_file(state, path)
    checkpoint = open_checkpoint(path)
    return checkpoint.described(checkpoint.source, config=config)


def paired(tmp_path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any] | None = None) -> list[Pair]:
    sides = (opened(tmp_path / f"{seed}.safetensors", shapes, seed, config or {}) for seed in range(2))
    return list(pair(*sides).pairs)


@pytest.mark.parametrize("shapes", [EXPERTS, IN_OUT, FUSED, LSTM, CONV1D], ids=lambda shapes: next(iter(shapes)))
def test_what_is_read_is_what_lies_in_the_whole_tensor(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    for one in paired(tmp_path, shapes):
        assert torch.equal(one.load_base(), one.matrix.extract(one.base[one.matrix.tensor])), one.matrix.name
        tuned = one.load_tuned()
        assert isinstance(tuned, Tensor)
        assert torch.equal(tuned, one.tuned_matrix.extract(one.tuned[one.tuned_tensor])), one.matrix.name


@pytest.mark.skipif(not IO.exists(), reason="bytes read are counted in /proc/self/io")
@pytest.mark.parametrize(
    ("shapes", "config", "most"),
    [
        (EXPERTS, {}, 1.0),
        (FUSED, {}, 1.0),
        (LSTM, {}, 1.0),
        (IN_OUT, {}, 2.0),  # an expert's gate and up are columns: the rows that hold both are read for each
        (CONV1D, {}, 3.0),  # q, k and v are columns
        (PER_HEAD, NEOX, 3.0),  # their rows are interleaved
    ],
    ids=["experts", "fused", "lstm", "experts in x out", "conv1d", "per head"],
)
def test_all_pairs_of_a_file_read_it_no_more_often_than_said(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any], most: float
) -> None:
    pairs = paired(tmp_path, shapes, config)
    whole = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    pairs[0].load_base()  # imports are done
    before = bytes_read()
    for one in pairs:
        one.load_base()
    assert bytes_read() - before < most * whole + 1000 * len(pairs)


@pytest.mark.skipif(not IO.exists(), reason="bytes read are counted in /proc/self/io")
def test_rows_without_counterpart_are_not_read(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (4000, 64), "model.layers.0.mlp.up_proj.weight": (64, 64)}
    base = opened(tmp_path / "base.safetensors", shapes, 0, {})
    tuned = opened(tmp_path / "tuned.safetensors", shapes | {"model.embed_tokens.weight": (1000, 64)}, 1, {})
    table = next(one for one in pair(base, tuned).pairs if one.matrix.role == "token_embedding")
    table.load_base()  # imports are done
    before = bytes_read()
    assert torch.equal(table.load_base(), base["model.embed_tokens.weight"][:1000])
    assert bytes_read() - before < (1000 + 4000) * 64 * 2 + 4000

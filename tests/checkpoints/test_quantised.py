"""Packed weights are set apart by the name of their scheme; what is plain beside them stays usable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from spectra.checkpoints import CheckpointError, open_checkpoint

INT32, INT8, UINT8 = torch.int32, torch.int8, torch.uint8
FP8, HALF = torch.float8_e4m3fn, torch.float16


def ones(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.ones(shape).to(dtype)


SCHEMES: dict[str, tuple[str, dict[str, Tensor]]] = {
    "gptq": (
        "GPTQ",
        {
            "l.qweight": ones(INT32, 4, 8),
            "l.qzeros": ones(INT32, 1, 1),
            "l.scales": ones(HALF, 1, 8),
            "l.g_idx": ones(INT32, 32),
        },
    ),
    "awq": (
        "AWQ",
        {"l.qweight": ones(INT32, 8, 4), "l.qzeros": ones(INT32, 1, 1), "l.scales": ones(HALF, 1, 8)},
    ),
    "bitsandbytes 4 bit": (
        "bitsandbytes",
        {
            "l.weight": ones(UINT8, 16, 1),
            "l.weight.absmax": ones(torch.float32, 4),
            "l.weight.quant_map": ones(torch.float32, 16),
            "l.weight.quant_state.bitsandbytes__nf4": ones(UINT8, 40),
        },
    ),
    "bitsandbytes 8 bit": (
        "bitsandbytes",
        {"l.weight": ones(INT8, 4, 4), "l.SCB": ones(torch.float32, 4), "l.weight_format": ones(UINT8)},
    ),
    "compressed-tensors": (
        "compressed-tensors",
        {
            "l.weight_packed": ones(INT32, 4, 1),
            "l.weight_scale": ones(HALF, 4, 1),
            "l.weight_shape": ones(torch.int64, 2),
        },
    ),
    "mxfp4": (
        "MXFP4",
        {"l.gate_up_proj_blocks": ones(UINT8, 2, 4, 1, 16), "l.gate_up_proj_scales": ones(UINT8, 2, 4, 1)},
    ),
    "nvfp4": (
        "NVFP4",
        {
            "l.weight": ones(UINT8, 4, 8),
            "l.weight_scale": ones(FP8, 4, 1),
            "l.weight_scale_2": ones(torch.float32),
            "l.input_scale": ones(torch.float32),
        },
    ),
    "hqq": ("HQQ", {"l.W_q": ones(UINT8, 8, 4), "l.scale": ones(HALF, 1, 4), "l.zero": ones(HALF, 1, 4)}),
    "torchao": ("torchao", {"l._weight_qdata": ones(INT8, 4, 4), "l._weight_scale": ones(torch.float32, 4)}),
    "quanto": (
        "quanto",
        {"l.weight._data": ones(INT8, 4, 4), "l.weight._scale": ones(HALF, 4, 1), "l.input_scale": ones(HALF)},
    ),
    "fp8 blocks": ("FP8", {"l.weight": ones(FP8, 4, 4), "l.weight_scale_inv": ones(torch.float32, 1, 1)}),
    "fp8": ("FP8", {"l.weight": ones(FP8, 4, 4), "l.weight_scale": ones(torch.float32)}),
    "int8": ("integers with scales", {"l.weight": ones(INT8, 4, 4), "l.weight_scale": ones(torch.float32, 4)}),
    "bare int8": ("an integer scheme", {"l.weight": ones(INT8, 4, 4)}),
    "mlx": (
        "MLX",
        {"l.weight": ones(torch.uint32, 4, 1), "l.scales": ones(HALF, 4, 1), "l.biases": ones(HALF, 4, 1)},
    ),
}
PLAIN = {
    "embed.weight": ones(torch.bfloat16, 6, 4),
    "l.bias": ones(HALF, 4),
    "position_ids": torch.arange(6).reshape(1, 6),
    "mask": ones(torch.bool, 4, 4),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_told_by_its_companions(tmp_path: Path, name: str) -> None:
    scheme, packed = SCHEMES[name]
    safetensors.torch.save_file(packed | PLAIN, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    assert set(checkpoint) - set(PLAIN) <= {"l.input_scale"}
    assert set(PLAIN) <= set(checkpoint)
    weight = max(packed, key=lambda key: packed[key].numel())
    assert checkpoint.refused[weight].startswith(f"packed by {scheme}") and "dequantise" in checkpoint.refused[weight]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_file_of_packed_weights_alone_is_refused_by_scheme(name: str) -> None:
    scheme, packed = SCHEMES[name]
    packed = {key: tensor for key, tensor in packed.items() if key != "l.input_scale"}
    with pytest.raises(CheckpointError, match=f"weights packed by {scheme}"):
        open_checkpoint(packed)


def test_the_config_names_the_scheme_more_exactly(tmp_path: Path) -> None:
    tensors = {"l.weight": ones(INT8, 4, 4), "l.weight_scale": ones(torch.float32, 4), **PLAIN}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused = open_checkpoint(tmp_path).refused
    assert refused["l.weight"].startswith("packed by compressed-tensors (int-quantized)")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_a_table_of_integers_is_not_said_to_be_packed(dtype: torch.dtype) -> None:
    table = {"i.weight": ones(dtype, 4, 4)}
    checkpoint = open_checkpoint(table | PLAIN)
    assert set(checkpoint) == set(PLAIN)
    reason = checkpoint.refused["i.weight"]
    assert reason.startswith(f"a tensor of integers ({str(dtype).removeprefix('torch.')}) and no weight: ")
    assert "packed" not in reason and "dequantise" not in reason
    with pytest.raises(
        CheckpointError, match=r"nothing that can be used as weights; tensor 'i\.weight' is a tensor of"
    ):
        open_checkpoint(table)


def test_plain_weights_are_never_taken_for_packed_ones() -> None:
    tensors = {
        "a.weight": torch.ones(4, 4),
        "a.scale": torch.ones(4),
        "b.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "b.weight_scale": torch.ones(4),
        "c.weight": ones(FP8, 4, 4),
        "d.weight": torch.ones(4),
        "relative_position_index": torch.ones(49, 49, dtype=torch.int64),
        "num_batches_tracked": torch.tensor(3),
        "layer_scales": torch.ones(3),
    }
    checkpoint = open_checkpoint(tensors)
    assert set(checkpoint) == set(tensors) and not checkpoint.refused

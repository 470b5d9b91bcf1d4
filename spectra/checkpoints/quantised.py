"""Packed weights, recognised by the tensors that lie beside them: read as numbers they would be far too large."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from spectra.checkpoints.checkpoint import TensorInfo

FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
}
# Packed weights are bytes or 32-bit words. Other integers under the name of a weight are a table or an index.
NEVER_PACKED = {torch.int16, torch.uint16, torch.int64, torch.uint64}
PACKABLE = {torch.int8, torch.uint8, torch.int32, torch.uint32}
INTEGERS = PACKABLE | NEVER_PACKED

# quantization_config.quant_method, as written in config.json, to the scheme's usual name.
METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "modelopt": "NVFP4 or FP8 (ModelOpt)",
    "fp8": "FP8 with scales",
    "fbgemm_fp8": "FP8 with scales",
    "hqq": "HQQ",
    "torchao": "torchao",
    "quanto": "quanto",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "bitnet": "BitNet",
    "vptq": "VPTQ",
}


@dataclass(frozen=True)
class Scheme:
    """A scheme, told by the names that lie in one module: all of `companions`, and the dtype of its `weight`."""

    name: str
    companions: frozenset[str]
    fits: Callable[[torch.dtype | None], bool] = lambda _: True


def _packed(dtype: torch.dtype | None) -> bool:
    return dtype in INTEGERS or dtype in FLOAT8


# The more companions, the earlier.
SCHEMES = (
    Scheme("GPTQ", frozenset({"qweight", "qzeros", "g_idx"})),
    Scheme("AWQ", frozenset({"qweight", "qzeros"})),
    Scheme("EETQ", frozenset({"qweight", "weight_scales"})),
    Scheme("GPTQ", frozenset({"qweight"})),
    Scheme("compressed-tensors", frozenset({"weight_packed"})),
    Scheme("NVFP4 (ModelOpt)", frozenset({"weight", "weight_scale", "weight_scale_2"}), _packed),
    Scheme("bitsandbytes (LLM.int8)", frozenset({"weight", "SCB"})),
    Scheme("HQQ", frozenset({"W_q"})),
    Scheme("AQLM", frozenset({"codes", "codebooks"})),
    Scheme("torchao", frozenset({"_weight_qdata"})),
    Scheme("MLX", frozenset({"weight", "scales", "biases"}), _packed),
    Scheme("FP8 with block scales", frozenset({"weight", "weight_scale_inv"}), _packed),
    *(
        Scheme("FP8 with scales", frozenset({"weight", scale}), lambda dtype: dtype in FLOAT8)
        for scale in ("weight_scale", "scale_weight", "scale", "scales")
    ),
    *(
        Scheme("integers with scales", frozenset({"weight", scale}), lambda dtype: dtype in INTEGERS)
        for scale in ("weight_scale", "scale_weight", "scale", "scales")
    ),
)
# Names that lie below the weight itself: `layer.weight.absmax`.
BELOW_THE_WEIGHT = {"absmax": "bitsandbytes (4 bit)", "quant_map": "bitsandbytes (4 bit)", "_data": "quanto"}
NOT_PACKED = {"bias"}


def packed_tensors(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, str]:
    """The tensors that are packed, belong to packed ones, or hold integers where a weight should be: name -> why.

    `config` is the model's config.json, whose `quantization_config` names the scheme more exactly than the tensors do.
    Integer buffers (positions, indices, masks) are not weights and not packed either; they are not listed.
    """
    method = _method(config)
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        modules[module][leaf] = info
    found: dict[str, str] = {}
    packed_below: dict[str, str] = {}
    for module, leaves in modules.items():
        scheme = _scheme_of(frozenset(leaves), leaves["weight"].dtype if "weight" in leaves else None)
        if scheme:
            found |= {info.name: method or scheme for leaf, info in leaves.items() if leaf not in NOT_PACKED}
        below = next((BELOW_THE_WEIGHT[leaf] for leaf in leaves if leaf in BELOW_THE_WEIGHT), None)
        if below:
            packed_below[module] = method or below
    for name, info in tensors.items():
        if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in tensors:
            twins = (name, name.removesuffix("_blocks") + "_scales")
            found |= dict.fromkeys(twins, method or "MXFP4")
        elif packed_below and (
            below := next((packed_below[above] for above in _itself_and_above(name) if above in packed_below), None)
        ):
            found[name] = below
        elif name not in found and _is_packed_weight(info, method):
            found[name] = method or f"an integer scheme without scales ({_short(info.dtype)})"
    integers = {name: _integers(info) for name, info in tensors.items() if name not in found and _is_table(info)}
    return {name: _reason(scheme) for name, scheme in found.items()} | integers


def scheme_names(reasons: Mapping[str, str]) -> list[str]:
    """The schemes named in the reasons of `packed_tensors`, each once."""
    names = (re.match(r"packed by (.+?): ", reason) for reason in reasons.values())
    return sorted({name[1] for name in names if name})


def _itself_and_above(name: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _method(config: Mapping[str, Any]) -> str | None:
    described = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(described, Mapping):
        return None
    method = described.get("quant_method")
    if not isinstance(method, str):
        return None
    kind = described.get("format") or described.get("quant_algo")
    name = METHODS.get(method, method if method.isprintable() else repr(method))
    return (
        f"{name} ({kind})" if isinstance(kind, str) and kind.isprintable() and method == "compressed-tensors" else name
    )


@lru_cache(1024)
def _scheme_of(leaves: frozenset[str], weight: torch.dtype | None) -> str | None:
    """The scheme of a module with these leaves: there are few kinds of modules, and many of each."""
    return next((scheme.name for scheme in SCHEMES if scheme.companions <= leaves and scheme.fits(weight)), None)


def _is_packed_weight(info: TensorInfo, method: str | None) -> bool:
    may_be = info.dtype in PACKABLE or (method is not None and info.dtype in FLOAT8)
    return may_be and _is_called_weight(info)


def _is_table(info: TensorInfo) -> bool:
    return info.dtype in NEVER_PACKED and _is_called_weight(info)


def _is_called_weight(info: TensorInfo) -> bool:
    return len(info.shape) >= 2 and re.search(r"(^|[._])weight$", info.name) is not None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _integers(info: TensorInfo) -> str:
    return (
        f"a tensor of integers ({_short(info.dtype)}) and no weight: "
        "leave it out, or save it in floating point where it is meant as one"
    )


def _reason(scheme: str) -> str:
    return (
        f"packed by {scheme}: dequantise first, "
        "e.g. load the model with transformers and save model.dequantize(), or give the unquantised weights"
    )

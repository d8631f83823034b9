"""ChatGLM 1 to 3 and GLM-4-9B as first released (Du et al. 2022, arXiv:2103.10360; GLM Team 2024,
arXiv:2406.12793). They share one model_type and little else.

ChatGLM-6B: layer norms, whose output times sqrt(2 L) is the residual; each head in two halves that turn with
two streams of positions; what comes before the start token is read in both directions. ChatGLM 2 and 3: Llama
with grouped heads, half of each rotated in interleaved pairs, and biases on q, k and v.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec

ARCHITECTURE = "ChatGLMForConditionalGeneration"
CLASSIFIER = None
CHECKPOINTS = (
    "THUDM/chatglm-6b",
    "THUDM/chatglm2-6b*",
    "THUDM/chatglm3-6b*",
    "THUDM/codegeex2-6b",
    "THUDM/glm-4-9b",
)
RULES = """
table later @=transformer.encoder.layers.{i} ~=transformer
drop rotary
[not first] ~.{embedding.word_embeddings,encoder.final_layernorm,output_layer} -> {embed,norm,head}
[not first] @.{input,post_attention}_layernorm -> {n1,n2}
[not first] @.self_attention.query_key_value -> mix.qkv : rope; [not first] @.self_attention.dense -> mix.o
[not first] @.mlp.dense_{h_to_4h,4h_to_h} -> ffn.{inp,out}
table first @=transformer.layers.{i} ~=transformer
[first] ~.{word_embeddings,final_layernorm} -> {embed,norm}; [first] lm_head -> head
[first] @.{input,post_attention}_layernorm -> {n1,n2}
[first] @.attention.query_key_value -> mix.qkv : grp rope; [first] @.attention.dense -> mix.o
[first] @.mlp.dense_{h_to_4h,4h_to_h} -> ffn.{inp,out}
"""


def guards(value: Spec) -> set[str]:
    """`first`: the layout of ChatGLM-6B."""
    return {"first"} if value.layers and value.layers[0].res_from_norm else set()


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec; only the first generation says `position_encoding_2d`. Raises UserError naming the
    key."""
    return _first(config) if "position_encoding_2d" in config else _later(config)


def _first(config: Mapping[str, Any]) -> Spec:
    keys.refuse(config, "position_encoding_2d", True)
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    width, count = keys.head_dim(d, heads, "num_attention_heads"), keys.size(config, "num_layers")
    if width % 4:
        raise keys.wrong("num_attention_heads", heads, "heads whose width is a multiple of 4")
    norm = Norm(kind="layer", eps=keys.real(config, "layernorm_epsilon", default=1e-5), bias=True)
    rope = Rope(dim=width, sections=(width // 4, width // 4), fp16_frequencies=True)
    attn = Attn(n_head=heads, n_kv=heads, head_dim=width, qkv_bias=True, o_bias=True, rope=rope)
    inner = keys.size(config, "inner_hidden_size", default=4 * d)
    ffn = FFN(kind="mlp", d_ff=inner, act="gelu_new", bias=True)
    layer = Layer(attn=attn, ffn=ffn, norm=norm, res_from_norm=True, alpha=(2 * count) ** 0.5)
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(layer,) * count,
        final_norm=norm,
        max_pos=keys.size(config, "max_sequence_length", default=2048),
        tie=False,
        prefix_token=keys.size(config, "bos_token_id"),
    )


def _later(config: Mapping[str, Any]) -> Spec:
    keys.refuse(config, "rmsnorm", True)
    keys.refuse(config, "post_layer_norm", True)
    keys.refuse(config, "apply_residual_connection_post_layernorm", False)
    keys.refuse(config, "add_bias_linear", False)
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    width = keys.size(config, "kv_channels", default=d // heads)
    grouped = keys.flag(config, "multi_query_attention", default=False)
    norm = Norm(eps=keys.real(config, "layernorm_epsilon", default=1e-5))
    theta = 1e4 * keys.real(config, "rope_ratio", default=1.0)
    rope = keys.even(Rope(dim=width // 2, theta=theta, interleaved=True, fp32=True), "kv_channels")
    attn = Attn(
        n_head=heads,
        n_kv=keys.size(config, "multi_query_group_num", default=1) if grouped else heads,
        head_dim=width,
        qkv_bias=keys.flag(config, "add_qkv_bias", default=False),
        rope=rope,
    )
    ffn = FFN(kind="glu", d_ff=keys.size(config, "ffn_hidden_size"), act="silu")
    return Spec(
        vocab=keys.size(config, "padded_vocab_size", "vocab_size"),
        d=d,
        layers=(Layer(attn=attn, ffn=ffn, norm=norm),) * keys.size(config, "num_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "seq_length", default=2048),
        tie=keys.flag(config, "tie_word_embeddings", default=False),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    layer = value.layers[0]
    attn = layer.attn
    result = {
        "hidden_size": value.d,
        "num_attention_heads": attn.n_head,
        "num_layers": len(value.layers),
        "layernorm_epsilon": layer.norm.eps,
    }
    if layer.res_from_norm:
        return {
            **result,
            "position_encoding_2d": True,
            "inner_hidden_size": layer.ffn.d_ff,
            "vocab_size": value.vocab,
            "max_sequence_length": value.max_pos,
            "bos_token_id": value.prefix_token,
        }
    return {
        **result,
        "kv_channels": attn.head_dim,
        "ffn_hidden_size": layer.ffn.d_ff,
        "multi_query_attention": True,
        "multi_query_group_num": attn.n_kv,
        "add_qkv_bias": attn.qkv_bias,
        "add_bias_linear": False,
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "rope_ratio": attn.rope.theta / 1e4,
        "padded_vocab_size": value.vocab,
        "seq_length": value.max_pos,
        "tie_word_embeddings": value.tie,
    }

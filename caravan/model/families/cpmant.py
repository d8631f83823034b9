"""CPM-Ant (OpenBMB 2022): model/encoders/cpm.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caravan.model import keys
from caravan.model.encoders.cpm import Ant, CpmSpec
from caravan.model.spec import FFN, Attn, Layer, Norm

ARCHITECTURE = "CpmAntForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("openbmb/cpm-ant-10b",)
MODULE = Ant

RULES = """
table @=cpmant.encoder.layers.{i} ~=cpmant
prefix? cpmant.
~.{input_embedding,segment_embedding,encoder.output_layernorm} -> {embed,seg,norm}; lm_head -> head
~.position_bias.relative_attention_bias -> rel
@.self_att.layernorm_before_attention -> n1; @.ffn.layernorm_before_ffn -> n2
@.self_att.self_attention.{project_q,project_k,project_v} -> mix.qkv : cat
@.self_att.self_attention.attention_out -> mix.o
@.ffn.ffn.w_in.{w_0,w_1} -> ffn.inp : cat; @.ffn.ffn.w_out -> ffn.out
"""


def spec(config: Mapping[str, Any]) -> CpmSpec:
    """config.json -> CpmSpec. The head is a matrix of its own although `tie_word_embeddings` may say true:
    the embedding has prompt rows besides the vocabulary. Texts are read both ways up to the first token
    `answer_token_id`, a key of ours."""
    made, types = common(config), keys.size(config, "segment_types", default=32)
    answer = keys.token(config, "answer_token_id", made["vocab"])
    return CpmSpec(
        **made,
        type_vocab=types,
        segments=types,
        prefix_token=-1 if answer is None else answer,
        max_pos=keys.size(config, "position_bias_max_distance", default=2048),
        buckets=keys.size(config, "position_bias_num_buckets", default=512),
        prompt=keys.size(config, "prompt_length", default=32),
        prompt_kinds=keys.size(config, "prompt_types", default=32),
        tie=False,
    )


def common(config: Mapping[str, Any]) -> dict[str, Any]:
    """What CPM-Ant and CPM-Bee share."""
    heads = keys.size(config, "num_attention_heads")
    norm = Norm(kind="rms", eps=keys.real(config, "eps", default=1e-6))
    layer = Layer(
        attn=Attn(n_head=heads, n_kv=heads, head_dim=keys.size(config, "dim_head")),
        ffn=FFN(kind="glu", d_ff=keys.size(config, "dim_ff"), act="gelu"),
        norm=norm,
    )
    return {
        "vocab": keys.size(config, "vocab_size"),
        "d": keys.size(config, "hidden_size"),
        "layers": (layer,) * keys.size(config, "num_hidden_layers"),
        "final_norm": norm,
    }


def config(value: CpmSpec) -> dict[str, Any]:
    """CpmSpec -> config.json."""
    answer = {} if value.prefix_token in (None, -1) else {"answer_token_id": value.prefix_token}
    return common_config(value) | {
        **answer,
        "segment_types": value.segments,
        "prompt_length": value.prompt,
        "prompt_types": value.prompt_kinds,
    }


def common_config(value: CpmSpec) -> dict[str, Any]:
    """What CPM-Ant and CPM-Bee share."""
    first = value.layers[0]
    assert first.attn is not None and first.ffn is not None
    return {
        "hidden_size": value.d,
        "num_attention_heads": first.attn.n_head,
        "dim_head": first.attn.head_dim,
        "dim_ff": first.ffn.d_ff,
        "num_hidden_layers": len(value.layers),
        "eps": first.norm.eps,
        "position_bias_num_buckets": value.buckets,
        "position_bias_max_distance": value.max_pos,
        "vocab_size": value.vocab,
    }

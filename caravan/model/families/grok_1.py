"""Grok-1 (xAI 2024): 8 experts of which 2 are chosen without renormalisation, norms before and after every
branch, scores capped at 30.

Written in the layout of the PyTorch port, which other engines open. The names of the original JAX program
are read as well (`opened`), with its 8-bit weights: matrices are stored [in, out] there, the experts of a
layer in one slab.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from caravan.model import keys
from caravan.model.families.mixtral import choices, experts_of
from caravan.model.spec import FFN, Attn, Layer, MoE, Norm, Rope, Spec
from caravan.types import UserError

ARCHITECTURE = "Grok1ModelForCausalLM"
CLASSIFIER = None
CHECKPOINTS = ("hpcai-tech/grok-1", "keyfan/grok-1-hf")
MODEL_TYPE = "grok-1"

RULES = r"""
table grok_1 @=model.layers.{i} ~=model
drop rotary_emb
~.embed_tokens -> embed; ~.norm.scale -> norm.weight; lm_head -> head
@.{pre_attn,post_attn,pre_moe,post_moe}_norm.scale -> {n1,p1,n2,p2}.weight
@.attn.{q,k,v}_proj -> mix.qkv : cat; @.attn.o_proj -> mix.o; @.moe_block.gate -> ffn.router
@.moe_block.experts.{e}.{linear,linear_v}.weight -> ffn.xin : cat
@.moe_block.experts.{e}.linear_1.weight -> ffn.xout
"""


def spec(config: Mapping[str, Any]) -> Spec:
    """config.json -> Spec. Raises UserError naming the key. Multipliers default to the release's."""
    d, heads = keys.size(config, "hidden_size"), keys.size(config, "num_attention_heads")
    groups = keys.groups(config, heads)
    width = keys.size(config, "head_dim", default=keys.head_dim(d, heads, "num_attention_heads"))
    norm = Norm(kind="rms", eps=keys.real(config, "rms_norm_eps", default=1e-5), gain_fp32=True)
    attn = Attn(
        n_head=heads,
        n_kv=groups,
        head_dim=width,
        scale=keys.real(config, "attn_output_multiplier", default=128**-0.5),
        softcap=keys.real(config, "max_attn_value", "attn_logit_softcapping", default=30.0),
        rope=Rope(dim=width, theta=keys.real(config, "rope_theta", default=1e4), fp32=True),
    )
    experts = keys.size(config, "num_experts", "num_local_experts", default=8)
    inner = keys.size(config, "intermediate_size")
    moe = MoE(
        n_expert=experts,
        top_k=choices(config, "num_experts_per_tok", experts, 2),
        d_ff=inner,
        renorm=False,
        aux_coef=keys.real(config, "router_aux_loss_coef", default=0.001),
    )
    # the port says nothing of the activation; the original is the tanh form of GELU
    ffn = FFN(kind="moe", d_ff=inner, act="gelu_new", moe=moe)
    return Spec(
        vocab=keys.size(config, "vocab_size"),
        d=d,
        layers=(Layer(attn=attn, ffn=ffn, norm=norm, post="out"),) * keys.size(config, "num_hidden_layers"),
        final_norm=norm,
        max_pos=keys.size(config, "max_position_embeddings", default=8192),
        embed_scale=keys.real(config, "embedding_multiplier_scale", default=6144**0.5),
        logit_scale=keys.real(config, "output_multiplier_scale", default=3**-0.5),
        tie=keys.flag(config, "tie_word_embeddings", default=True),
    )


def config(value: Spec) -> dict[str, Any]:
    """Spec -> config.json."""
    attn, moe = value.attns[0], experts_of(value)
    assert attn.rope is not None
    return {
        "hidden_size": value.d,
        "intermediate_size": moe.d_ff,
        "num_hidden_layers": len(value.layers),
        "num_attention_heads": attn.n_head,
        "num_key_value_heads": attn.n_kv,
        "head_dim": attn.head_dim,
        "attn_output_multiplier": attn.scale,
        "max_attn_value": attn.softcap,
        "rope_theta": attn.rope.theta,
        "rms_norm_eps": value.layers[0].norm.eps,
        "num_experts": moe.n_expert,
        "num_local_experts": moe.n_expert,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.aux_coef,
        "embedding_multiplier_scale": value.embed_scale,
        "output_multiplier_scale": value.logit_scale,
        "max_position_embeddings": value.max_pos,
        "vocab_size": value.vocab,
        "tie_word_embeddings": value.tie,
    }


# ----------------------------------------------------------------------------------- names of the original

EMBED = "language_model/in_out_embed/embeddings"
WHOLE = {EMBED: "model.embed_tokens.weight", "language_model/rms_norm/scale": "model.norm.scale"}
VECTORS = {"rms_norm/scale": "pre_attn_norm.scale", "rms_norm_1/scale": "post_attn_norm.scale",
           "rms_norm_2/scale": "pre_moe_norm.scale", "rms_norm_3/scale": "post_moe_norm.scale"}  # fmt: skip
MATRICES = {"multi_head_attention/query/w": "attn.q_proj", "multi_head_attention/key/w": "attn.k_proj",
            "multi_head_attention/value/w": "attn.v_proj", "multi_head_attention/linear/w": "attn.o_proj",
            "router/w": "moe_block.gate"}  # fmt: skip
SLABS = {"moe/linear/w": "linear", "moe/linear_v/w": "linear_v", "moe/linear_1/w": "linear_1"}


def scaled(weight: Tensor, scales: Tensor) -> Tensor:
    """An 8-bit weight times its scales. Each axis of the scales is as long as the weight's, or divides it:
    then it holds one row per shard that the weight was stored in."""
    if weight.dim() != scales.dim() or any(w % s for w, s in zip(weight.shape, scales.shape, strict=True)):
        raise UserError(f"scales of shape {tuple(scales.shape)} do not fit a weight {tuple(weight.shape)}")
    for axis, (long, short) in enumerate(zip(weight.shape, scales.shape, strict=True)):
        if short not in (1, long):
            scales = scales.repeat_interleave(long // short, axis)
    return weight.to(scales.dtype) * scales


class Renamed(Mapping[str, Tensor]):
    """Tensors under the original's names, seen under those of the port. An 8-bit matrix NAME is an integer
    tensor NAME (or NAME.weight) beside NAME.scales."""

    def __init__(self, source: Mapping[str, Tensor]) -> None:
        self.source = source
        self.where: dict[str, tuple[str, int | None]] = {}
        """Name in the port -> name in the source, and the expert for slabs."""
        self._last: tuple[str, Tensor] | None = None
        for name in dict.fromkeys(key.removesuffix(".scales").removesuffix(".weight") for key in source):
            self._place(name)

    def _place(self, name: str) -> None:
        found = re.fullmatch(r"transformer/decoder_layer_(\d+)/(.+)", name)
        if found is None:
            self.where[WHOLE.get(name, name)] = (name, None)
            return
        home, rest = f"model.layers.{found.group(1)}", found.group(2)
        if rest in SLABS:
            for expert in range(self.read(name).shape[0]):
                self.where[f"{home}.moe_block.experts.{expert}.{SLABS[rest]}.weight"] = (name, expert)
        elif rest in MATRICES:
            self.where[f"{home}.{MATRICES[rest]}.weight"] = (name, None)
        else:
            self.where[f"{home}.{VECTORS.get(rest, rest)}"] = (name, None)

    def read(self, name: str) -> Tensor:
        """A tensor under its original name, scales applied; the last one is kept for the next expert."""
        if self._last is None or self._last[0] != name:
            plain = name if name in self.source else f"{name}.weight"
            weight = self.source[plain]
            if f"{name}.scales" in self.source:
                weight = scaled(weight, self.source[f"{name}.scales"])
            elif not weight.is_floating_point():
                raise UserError(f"tensor '{plain}' is {weight.dtype} but '{name}.scales' is missing")
            self._last = (name, weight)
        return self._last[1]

    def __getitem__(self, key: str) -> Tensor:
        name, expert = self.where[key]
        tensor = self.read(name)
        if expert is not None:
            tensor = tensor[expert]
        turned = tensor.dim() == 2 and name != EMBED
        return tensor.T if turned else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def opened(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a folder under the names of RULES, whichever program wrote them."""
    return Renamed(tensors) if any(key.startswith(EMBED) for key in tensors) else tensors

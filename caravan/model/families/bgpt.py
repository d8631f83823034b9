"""bGPT (Wu et al. 2024, arXiv:2402.19155): model/encoders/bgpt.py.

The release has weights and a file of constants, no config.json; ours spells those constants as keys:
patch_size, patch_length, patch_num_layers, byte_num_layers, hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from caravan.model import keys
from caravan.model.encoders.bgpt import SYMBOLS, Bgpt, BgptSpec
from caravan.model.families import gpt2
from caravan.types import UserError

ARCHITECTURE = "bGPTLMHeadModel"
CLASSIFIER = None
CHECKPOINTS = ("sander-wood/bgpt",)
MODULE = Bgpt

RULES = r"""
table @=patch_level_decoder.base.h.{i} ~=patch_level_decoder => patch.blocks.{i}
drop \.attn\.bias$ \.attn\.masked_bias$ ^byte_level_decoder\.base\.lm_head\.weight$
~.patch_embedding -> inp; ~.base.{wte,wpe,ln_f} -> patch.{embed,pos,norm}; @.{ln_1,ln_2} -> {n1,n2}
@.attn.c_attn -> mix.qkv : T; @.attn.c_proj -> mix.o : T
@.mlp.c_fc -> ffn.inp : T; @.mlp.c_proj -> ffn.out : T
table @=byte_level_decoder.base.transformer.h.{i} ~=byte_level_decoder.base.transformer => byte.blocks.{i}
~.{wte,wpe,ln_f} -> byte.{embed,pos,norm}; @.{ln_1,ln_2} -> {n1,n2}
@.attn.c_attn -> mix.qkv : T; @.attn.c_proj -> mix.o : T
@.mlp.c_fc -> ffn.inp : T; @.mlp.c_proj -> ffn.out : T
"""

EMBED, HEAD = (f"byte_level_decoder.base.{name}.weight" for name in ("transformer.wte", "lm_head"))


def opened(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a folder. Raises UserError where the byte head, which files may hold as well, is not the
    embedding: no bGPT has such a head."""
    if HEAD in tensors and EMBED in tensors and not torch.equal(tensors[HEAD], tensors[EMBED]):
        raise UserError(
            f"'{HEAD}' differs from '{EMBED}'", "the byte head is the embedding: leave the former out"
        )
    return tensors


def spec(config: Mapping[str, Any]) -> BgptSpec:
    """config.json -> BgptSpec. Heads are 64 wide unless `num_attention_heads` says otherwise."""
    d, patch = keys.size(config, "hidden_size"), keys.size(config, "patch_size")
    shared = {
        **{k: config[k] for k in ("layer_norm_epsilon", "activation_function") if k in config},
        "n_embd": d,
        "n_head": keys.size(config, "num_attention_heads", default=max(1, d // 64)),
    }
    return BgptSpec(
        patch=gpt2.spec(
            shared
            | {
                "vocab_size": 1,
                "n_layer": keys.size(config, "patch_num_layers"),
                "n_positions": keys.size(config, "patch_length"),
            }
        ),
        byte=gpt2.spec(
            shared
            | {
                "vocab_size": SYMBOLS,
                "n_layer": keys.size(config, "byte_num_layers"),
                "n_positions": patch + 1,
            }
        ),
        patch_size=patch,
    )


def config(value: BgptSpec) -> dict[str, Any]:
    """BgptSpec -> config.json."""
    first = value.byte.layers[0]
    assert first.attn is not None and first.ffn is not None
    return {
        "hidden_size": value.d,
        "num_attention_heads": first.attn.n_head,
        "patch_size": value.patch_size,
        "patch_length": value.patch.max_pos,
        "patch_num_layers": len(value.patch.layers),
        "byte_num_layers": len(value.byte.layers),
        "activation_function": first.ffn.act,
        "layer_norm_epsilon": first.norm.eps,
        "vocab_size": value.vocab,
    }

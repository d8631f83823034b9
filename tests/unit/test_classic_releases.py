"""Released models of the GPT, NeoX, OPT, BLOOM, Falcon, MPT, Phi and StableLM lines: config.json in the words
of its release gives the number of parameters that was published."""

from __future__ import annotations

from typing import Any

import pytest

from caravan.model import families


def neo(d: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neo",
        "hidden_size": d,
        "num_heads": heads,
        "num_layers": layers,
        "attention_types": [[["global", "local"], layers // 2]],
        "intermediate_size": None,
        "vocab_size": 50257,
    }


def neox(d: int, heads: int, layers: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "hidden_size": d,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * d,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "vocab_size": vocab,
        **more,
    }


def opt(d: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": d,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "ffn_dim": 4 * d,
        "vocab_size": 50272,
        **more,
    }


def bloom(d: int, heads: int, layers: int) -> dict[str, Any]:
    config = {"n_embed": d, "num_attention_heads": heads, "n_layer": layers, "n_inner": None}
    return {"model_type": "bloom", "vocab_size": 250880, "seq_length": 2048, **config}


def falcon(d: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": d, "num_attention_heads": heads, "num_hidden_layers": layers}
    return {"model_type": "falcon", "vocab_size": 65024, **sizes, **more}


def phi(d: int, layers: int, share: float) -> dict[str, Any]:
    sizes = {"hidden_size": d, "num_attention_heads": 32, "num_hidden_layers": layers}
    rotary = {"partial_rotary_factor": share, "rope_theta": 10000.0, "rope_scaling": None}
    return {"model_type": "phi", "vocab_size": 51200, "intermediate_size": 4 * d, **sizes, **rotary}


def stablelm(d: int, inner: int, layers: int, vocab: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": d, "num_attention_heads": 32, "num_hidden_layers": layers}
    return {"model_type": "stablelm", "vocab_size": vocab, "intermediate_size": inner, **sizes, **more}


RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "vocab_size": 50304}
OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 512}
MPT = {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432}
MPT_ATTENTION = {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "clip_qkv": None, "qk_ln": False}
GPTJ = {"model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_layer": 28, "rotary_dim": 64}
STARCODER = {"model_type": "gpt_bigcode", "n_embd": 6144, "n_head": 48, "n_layer": 40, "n_positions": 8192}
GPT1 = {"model_type": "openai-gpt", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512}
XGLM = {"model_type": "xglm", "d_model": 1024, "attention_heads": 16, "num_layers": 24, "ffn_dim": 4096}

RELEASES: dict[str, tuple[dict[str, Any], int]] = {
    "gpt-neo-125m": (neo(768, 12, 12), 125_198_592),
    "gpt-neo-1.3B": (neo(2048, 16, 24), 1_315_575_808),
    "gpt-neo-2.7B": (neo(2560, 20, 32), 2_651_307_520),
    "gpt-j-6b": (GPTJ | {"vocab_size": 50400}, 6_050_882_784),
    "gpt-neox-20b": (neox(6144, 64, 44, 50432), 20_554_567_680),
    "pythia-70m": (neox(512, 8, 6, 50304), 70_426_624),
    "pythia-160m": (neox(768, 12, 12, 50304), 162_322_944),
    "pythia-6.9b": (neox(4096, 32, 32, 50432), 6_857_302_016),
    "pythia-12b": (neox(5120, 40, 36, 50688), 11_846_072_320),
    "opt-125m": (opt(768, 12, 12, word_embed_proj_dim=768), 125_239_296),
    "opt-350m": (opt(1024, 16, 24, **OPT_350M), 331_196_416),
    "opt-1.3b": (opt(2048, 32, 24, word_embed_proj_dim=2048), 1_315_758_080),
    "opt-6.7b": (opt(4096, 32, 32, word_embed_proj_dim=4096), 6_658_473_984),
    "bloom-560m": (bloom(1024, 16, 24), 559_214_592),
    "bloom-7b1": (bloom(4096, 32, 30), 7_069_016_064),
    "bloom": (bloom(14336, 112, 70), 176_247_271_424),
    "falcon-7b": (falcon(4544, 71, 32, multi_query=True), 6_921_720_704),
    "falcon-40b": (
        falcon(8192, 128, 60, num_kv_heads=8, new_decoder_architecture=True),
        41_303_293_952,
    ),
    "falcon-rw-1b": (falcon(2048, 32, 24, **RW), 1_311_625_216),
    "mpt-7b": (MPT | {"attn_config": MPT_ATTENTION, "learned_pos_emb": True}, 6_649_286_656),
    "phi-1_5": (phi(2048, 24, 0.5), 1_418_270_720),
    "phi-2": (phi(2560, 32, 0.4), 2_779_683_840),
    "stablelm-3b-4e1t": (stablelm(2560, 6912, 32, 50304), 2_795_443_200),
    "stablelm-2-1_6b": (stablelm(2048, 5632, 24, 100352, use_qkv_bias=True), 1_644_515_328),
    "starcoder": (STARCODER | {"n_inner": 24576, "vocab_size": 49152}, 15_517_456_384),
    "xglm-564M": (XGLM | {"vocab_size": 256008}, 564_463_616),
    "openai-gpt": (GPT1 | {"vocab_size": 40478, "afn": "gelu"}, 116_534_784),
}


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_has_its_published_size(release: str) -> None:
    config, parameters = RELEASES[release]
    spec = families.find(config["model_type"]).spec(config)
    assert spec.parameters == parameters

"""Families with experts: old keys, refusals, and what the parity cases cannot show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from caravan.kernels.attention import Segments
from caravan.model import checkpoint, families
from caravan.model.families import deepseek_v2, deepseek_v3, grok_1, mixtral, qwen2_moe
from caravan.types import UserError
from tests.families import LLAMA, causal
from tests.families import deepseek_v2 as v2
from tests.families import deepseek_v3 as v3
from tests.families import grok_1 as grok
from tests.families import mixtral as mixtral_cases

IDS = torch.randint(3, 101, (13,), generator=torch.Generator().manual_seed(4))


def saved(builder: Any, folder: Path) -> Any:
    model = builder()
    model.save_pretrained(folder)
    return model


# ------------------------------------------------------------------------------------------------- configs

V2 = v2.LATENT | {"model_type": "deepseek_v2"}
V3 = v3.THREE | {"model_type": "deepseek_v3"}
DBRX = {
    "d_model": 48, "n_heads": 6, "n_layers": 2, "vocab_size": 11,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip
REFUSED = {
    "scoring_func": ("deepseek_v2", V2 | {"scoring_func": "sigmoid"}),
    "norm_topk_prob": ("deepseek_v2", V2 | {"norm_topk_prob": True}),
    "topk_method": ("deepseek_v2", V2 | {"topk_method": "best"}),
    "moe_layer_freq": ("deepseek_v2", V2 | {"moe_layer_freq": 2}),
    "mlp_bias": ("deepseek_v2", V2 | {"mlp_bias": True}),
    "first_k_dense_replace": ("deepseek_v2", V2 | {"first_k_dense_replace": 5}),
    "n_group": ("deepseek_v2", V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "topk_group": ("deepseek_v3", V3 | {"topk_group": 1, "num_experts_per_tok": 3}),
    "num_key_value_heads": ("deepseek_v3", V3 | {"num_key_value_heads": 2}),
    "num_experts_per_tok": ("mixtral", LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 3}),
    "attention_bias": ("mixtral", LLAMA | {"attention_bias": True}),
    "layer_types": ("qwen2_moe", LLAMA | {"moe_intermediate_size": 8, "use_sliding_window": True}),
    "rope_type": ("dbrx", DBRX | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "kv_n_heads": ("dbrx", DBRX | {"attn_config": {"kv_n_heads": 4}}),
    "moe_normalize_expert_weights": (
        "dbrx", DBRX | {"ffn_config": DBRX["ffn_config"] | {"moe_normalize_expert_weights": 2.0}},  # type: ignore[operator]
    ),
    "hidden_size": ("grok_1", {k: v for k, v in grok.CONFIG.items() if k != "hidden_size"}),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_a_config_that_is_not_understood_names_the_key(key: str) -> None:
    family, config = REFUSED[key]
    with pytest.raises(UserError, match=key):
        families.find(family).spec(config)


def test_the_rotary_base_of_dbrx_is_read_where_the_release_has_it() -> None:
    spec = families.find("dbrx").spec(DBRX | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert {attn.rope.theta for attn in spec.attns if attn.rope} == {5e5}
    late = DBRX | {"attn_config": {"kv_n_heads": 2}, "rope_parameters": {"rope_theta": 7e3}}
    assert families.find("dbrx").spec(late).attns[0].rope.theta == 7e3  # type: ignore[union-attr]
    written = families.find("dbrx").config(spec)
    assert written["attn_config"]["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5


def test_yarn_warms_the_scores_of_deepseek() -> None:
    attn = deepseek_v2.spec(V2 | v2.YARN).attns[0]
    warmth = 0.1 * 0.707 * math.log(4.0) + 1
    assert attn.scale == pytest.approx(18**-0.5 * warmth**2)
    assert deepseek_v2.spec(V2).attns[0].scale == pytest.approx(18**-0.5)


def test_the_release_of_deepseek_v3_in_its_own_spelling() -> None:
    config = {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc",
        "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "moe_layer_freq": 1,
        "first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid", "rope_theta": 10000,
        "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 1,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
    }  # fmt: skip
    spec = deepseek_v3.spec(config)
    assert spec.parameters == 671_026_404_352  # 671 billion without the extra head
    assert deepseek_v3.spec(deepseek_v3.config(spec)) == spec


def test_dense_layers_of_qwen_moe() -> None:
    config = LLAMA | {
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    }
    spec = qwen2_moe.spec(config)
    assert [layer.ffn.kind for layer in spec.layers if layer.ffn] == ["glu", "moe", "glu", "glu"]
    assert qwen2_moe.config(spec)["mlp_only_layers"] == [0, 2, 3]


# ------------------------------------------------------------------------------------------------- weights


def test_gradients_of_experts_and_router_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = saved(causal("Mixtral", mixtral_cases.MIXTRAL), tmp_path)
    ours = checkpoint.load_model(tmp_path)
    want = theirs(IDS[None]).logits[0]
    got = ours.logits(ours(IDS, torch.arange(13), Segments((13,))))
    for said in (want, got):
        torch.nn.functional.cross_entropy(said[:-1], IDS[1:]).backward()
    for layer, block in zip(theirs.model.layers, ours.blocks, strict=True):
        mlp, ffn = layer.mlp, block.ffn
        pairs = ((mlp.experts.gate_up_proj, ffn.xin), (mlp.experts.down_proj, ffn.xout),
                 (mlp.gate.weight, ffn.router.weight))  # fmt: skip
        for a, b in pairs:
            assert float((a.grad - b.grad).abs().max() / a.grad.std()) < 1e-4


def test_the_balance_loss_of_a_whole_model_is_that_of_transformers(tmp_path: Path) -> None:
    from caravan.model.ffn.moe import balance_loss

    theirs = saved(causal("Mixtral", mixtral_cases.MIXTRAL | {"router_aux_loss_coef": 0.03}), tmp_path)
    ours = checkpoint.load_model(tmp_path)
    attend = Segments((9, 4))
    ours(IDS, torch.cat([torch.arange(9), torch.arange(4)]), attend)
    batch = torch.zeros(2, 9, dtype=torch.int64)
    batch[0], batch[1, :4] = IDS[:9], IDS[9:]
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    said = theirs(batch, attention_mask=mask, output_router_logits=True)
    assert balance_loss(attend.routed, ours.spec).item() == pytest.approx(
        0.03 * said.aux_loss.item(), rel=1e-5
    )


def test_the_choice_bias_stays_exact_and_untrained(tmp_path: Path) -> None:
    saved(causal("DeepseekV3", v3.THREE), tmp_path)
    model = checkpoint.load_model(tmp_path, torch.bfloat16)
    bias = model.blocks[2].ffn.router_bias
    key = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert bias.dtype == torch.float32 and not bias.requires_grad
    assert model.blocks[2].ffn.xin.dtype == torch.bfloat16 and model.blocks[2].ffn.xin.requires_grad
    stored = load_file(tmp_path / "model.safetensors")[key]
    assert torch.equal(checkpoint.export_tensors(model, torch.bfloat16)[key], stored)
    model.logits(model(IDS, torch.arange(13), Segments((13,)))).float().sum().backward()
    assert bias.grad is None


def test_extra_prediction_modules_are_left_out(tmp_path: Path) -> None:
    saved(causal("DeepseekV3", v3.THREE), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {
        "model.layers.61.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.61.mlp.gate.weight": torch.zeros(1),
    }
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert checkpoint.export_tensors(checkpoint.load_model(tmp_path)).keys() == tensors.keys()
    save_file(tensors | {"model.layers.60.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.60\.eh_proj\.weight"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("broken", ["missing", "shape"])
def test_a_broken_expert_is_named(broken: str, tmp_path: Path) -> None:
    saved(causal("Mixtral", mixtral_cases.MIXTRAL), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if broken == "missing":
        key = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
        del tensors[key]
    else:
        key = "model.layers.1.block_sparse_moe.gate.weight"
        tensors[key] = tensors[key][:3].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        checkpoint.load_model(tmp_path)


# ---------------------------------------------------------------------------------- names of the JAX program


def original(port: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as the JAX program names and turns them."""
    names = {"attn.q_proj": "multi_head_attention/query", "attn.k_proj": "multi_head_attention/key",
             "attn.v_proj": "multi_head_attention/value", "attn.o_proj": "multi_head_attention/linear",
             "moe_block.gate": "router"}  # fmt: skip
    norms = {
        "pre_attn": "rms_norm",
        "post_attn": "rms_norm_1",
        "pre_moe": "rms_norm_2",
        "post_moe": "rms_norm_3",
    }
    result = {
        "language_model/in_out_embed/embeddings": port["model.embed_tokens.weight"],
        "language_model/rms_norm/scale": port["model.norm.scale"],
    }
    for i in range(grok.LAYERS):
        old, new = f"model.layers.{i}", f"transformer/decoder_layer_{i}"
        for a, b in names.items():
            result[f"{new}/{b}/w"] = port[f"{old}.{a}.weight"].T.contiguous()
        for a, b in norms.items():
            result[f"{new}/{b}/scale"] = port[f"{old}.{a}_norm.scale"]
        for a in ("linear", "linear_v", "linear_1"):
            slabs = [port[f"{old}.moe_block.experts.{e}.{a}.weight"].T for e in range(grok.EXPERTS)]
            result[f"{new}/moe/{a}/w"] = torch.stack(slabs)
    return result


def written(tensors: dict[str, Tensor], folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(grok.CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_original_names_of_grok_are_read(tmp_path: Path) -> None:
    port = grok.tensors()
    model = checkpoint.load_model(written(original(port), tmp_path))
    exported = checkpoint.export_tensors(model)
    assert exported.keys() == port.keys() and all(torch.equal(exported[k], port[k]) for k in port)


def in_eight_bits(weight: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """int8 [.., in, out] and scales [.., blocks, out]: one scale per column and shard of rows."""
    rows = weight.unflatten(-2, (blocks, -1))
    scale = rows.abs().amax(-2) / 127
    return (rows / scale.unsqueeze(-2)).round().to(torch.int8).flatten(-3, -2), scale


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_eight_bit_weights_of_grok_are_scaled(suffix: str, tmp_path: Path) -> None:
    stored, rounded = {}, {}
    for name, tensor in original(grok.tensors()).items():
        if tensor.dim() < 2 or name == grok_1.EMBED or "router" in name:
            stored[name] = rounded[name] = tensor
            continue
        blocks = 8 if name.endswith("linear_1/w") else 1
        small, scale = in_eight_bits(tensor, blocks)
        stored |= {name + suffix: small, f"{name}.scales": scale}
        rounded[name] = small * scale.repeat_interleave(tensor.shape[-2] // blocks, -2)
    for folder in ("eight", "plain"):
        (tmp_path / folder).mkdir()
    ours = checkpoint.export_tensors(checkpoint.load_model(written(stored, tmp_path / "eight")))
    want = checkpoint.export_tensors(checkpoint.load_model(written(rounded, tmp_path / "plain")))
    assert all(torch.equal(ours[key], want[key]) for key in want)
    assert not torch.equal(
        want["model.layers.0.attn.q_proj.weight"], grok.tensors()["model.layers.0.attn.q_proj.weight"]
    )


def test_wrong_scales_of_grok_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(5, 4\)"):
        grok_1.scaled(torch.ones(6, 4, dtype=torch.int8), torch.ones(5, 4))
    broken = original(grok.tensors())
    name = "transformer/decoder_layer_1/multi_head_attention/key/w"
    broken[name] = broken[name].to(torch.int8)
    with pytest.raises(UserError, match="scales' is missing"):
        checkpoint.load_model(written(broken, tmp_path))


def test_the_first_mixture_tells_what_the_config_says() -> None:
    spec = mixtral.spec(LLAMA | {"num_local_experts": 4, "router_aux_loss_coef": 0.02})
    assert mixtral.experts_of(spec).aux_coef == 0.02
    assert mixtral.spec(mixtral.config(spec)) == spec

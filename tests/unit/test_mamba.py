"""Mamba, Mamba-2 and their families beyond parity: states, types, files, configs, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from caravan.kernels.attention import Segments
from caravan.model import checkpoint, sizes
from caravan.model.families import falcon_mamba, jamba, mamba, mamba2, rwkv
from caravan.model.mixers import knobs
from caravan.model.spec import FFN, Layer, Norm, Spec
from caravan.types import UserError
from tests.unit.recurrent import Pass, Stack, goes_on, stirred

D = 12
KNOBS: dict[str, Any] = {
    "mamba": knobs.Mamba(d_inner=18, d_state=5, dt_rank=3, dt_norm=Norm(eps=1e-5)),
    "mamba2": knobs.Mamba2(n_head=6, head_dim=4, d_state=5, n_group=2, bias=True, dt_limit=(0.01, 0.2)),
}
RECURRENT: dict[str, tuple[Any, str | None]] = {
    "mamba": (KNOBS["mamba"], None),
    "mamba2": (KNOBS["mamba2"], None),
    "rwkv4": (knobs.Rwkv4(d_att=D), "rwkv"),
    "rwkv5": (knobs.Rwkv5(n_head=3, head_dim=4), "rwkv"),
    "rwkv6": (knobs.Rwkv6(n_head=3, head_dim=4, mix_rank=3, decay_rank=5), "rwkv6"),
    "rwkv7": (
        knobs.Rwkv7(n_head=3, head_dim=4, decay_rank=5, rate_rank=3, value_rank=4, gate_rank=6),
        "rwkv7",
    ),
    "hyena": (knobs.Hyena(n_head=3, d_state=2), "glu"),
}
FAMILY = {"mamba": "mamba", "mamba2": "mamba2", "rwkv4": "rwkv"}


def layer(name: str) -> Layer:
    ssm, kind = RECURRENT[name]
    ffn = FFN(kind=kind, d_ff=20, act="silu" if kind == "glu" else "relu2") if kind else None
    return Layer(mixer=name, ssm=ssm, ffn=ffn, norm=Norm(eps=1e-5))


def spec(name: str) -> Spec:
    return Spec(vocab=17, d=D, layers=(layer(name),) * 2, final_norm=Norm(), max_pos=64, tie=False)


@pytest.mark.parametrize("name", KNOBS)
def test_a_pass_goes_on_where_the_last_one_stopped(name: str) -> None:
    goes_on(stirred(Stack(D, layer(name), 2)).double(), D)


@pytest.mark.parametrize("name", KNOBS)
def test_state_is_fp32_and_sound_in_a_bf16_model(name: str) -> None:
    model = stirred(Stack(D, layer(name), 2)).double()
    x = torch.randn(20, D, dtype=torch.float64)
    exact = model(x, Pass((20,))).detach()
    attend = Pass((20,))
    rough = model.bfloat16()(x.bfloat16(), attend).detach()
    assert rough.dtype == torch.bfloat16 and attend.after[0]["ssm"].dtype == torch.float32
    assert float((rough - exact).abs().max() / exact.std()) < 0.1


@pytest.mark.parametrize("name", RECURRENT)
def test_a_fresh_model_starts_even_and_learns_a_batch(name: str) -> None:
    model = sizes.fresh(spec(name), seed=2)
    ids = torch.randint(0, 17, (24,), generator=torch.Generator().manual_seed(1))
    pos = torch.cat([torch.arange(15), torch.arange(9)])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(25):
        logits = model.logits(model(ids, pos, Segments((15, 9))))
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - 2.83) < 0.2, "ln 17"
    assert losses[-1] < 1.0, losses[::8]


def test_fresh_speeds_and_time_steps_are_spread() -> None:
    one, two = (sizes.fresh(spec(name), seed=0).blocks[0].mix for name in KNOBS)
    assert torch.allclose(one.A_log.exp(), torch.arange(1.0, 6.0).expand(18, 5))
    assert torch.allclose(two.A_log.exp(), torch.arange(1.0, 7.0))
    for bias in (one.dt.bias, two.dt_bias):
        steps = torch.nn.functional.softplus(bias.detach())
        assert float(steps.min()) == pytest.approx(0.001, rel=1e-3)
        assert float(steps.max()) == pytest.approx(0.1, rel=1e-3)
    for conv in (one.conv, two.conv):
        assert float(conv.weight.detach().std()) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("name", RECURRENT)
def test_recomputing_activations_changes_no_gradient(name: str) -> None:
    model = sizes.fresh(spec(name), seed=2).double()
    ids, pos = torch.arange(16) % 7, torch.cat([torch.arange(11), torch.arange(5)])
    grads = []
    for every in (0, 1):
        model.zero_grad()
        model.checkpoint_every = every
        model(ids, pos, Segments((11, 5))).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("name", FAMILY)
def test_speeds_are_fp32_on_disk_and_in_memory_whatever_the_rest_is(name: str, tmp_path: Path) -> None:
    norm = Norm(kind="rms" if "mamba" in name else "layer", eps=1e-5, bias="mamba" not in name)
    ssm, kind = RECURRENT[name]
    if name == "mamba":
        ssm = knobs.Mamba(d_inner=24, d_state=5, dt_rank=3)
    if name == "mamba2":
        ssm = knobs.Mamba2(n_head=6, head_dim=4, d_state=5, n_group=2)
    ffn = FFN(kind=kind, d_ff=20, act="relu2") if kind else None
    made = Spec(
        vocab=17, d=D, layers=(Layer(mixer=name, ssm=ssm, ffn=ffn, norm=norm),), final_norm=norm, max_pos=64,
        embed_norm=norm if kind else None, residual_fp32=not kind, tie=False,
    )  # fmt: skip
    model = sizes.fresh(made, seed=0, family=FAMILY[name])
    checkpoint.save_model(model, tmp_path, dtype=torch.bfloat16)
    wide = {key for key, t in load_file(tmp_path / "model.safetensors").items() if t.dtype == torch.float32}
    ends = {
        "mamba": ("A_log", "D"),
        "mamba2": ("A_log", "D", "dt_bias"),
        "rwkv4": ("time_decay", "time_first"),
    }
    assert {key.rpartition(".")[2] for key in wide} == set(ends[name])
    again = checkpoint.load_model(tmp_path, dtype=torch.bfloat16)
    fp32 = {key for key, p in again.named_parameters() if p.dtype == torch.float32}
    assert len(fp32) == len(ends[name])
    assert again(torch.arange(9), torch.arange(9), Segments((9,))).dtype == torch.bfloat16


SMALL = {"vocab_size": 17, "hidden_size": 48, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        (mamba, {"hidden_act": "relu"}, "hidden_act"),
        (mamba, {"time_step_rank": 0}, "time_step_rank"),
        (falcon_mamba, {"mixer_rms_eps": "small"}, "mixer_rms_eps"),
        (mamba2, {"num_heads": 5, "head_dim": 16}, "n_groups"),
        (mamba2, {"num_heads": 8, "head_dim": 16}, "num_heads"),
        (mamba2, {"num_heads": 6, "head_dim": 16, "n_groups": 2, "time_step_limit": [1]}, "time_step_limit"),
        (jamba, {"num_attention_heads": 6, "attn_layer_offset": 9}, "attn_layer_offset"),
        (jamba, {"num_attention_heads": 6, "mamba_inner_layernorms": False}, "mamba_inner_layernorms"),
        (rwkv, {"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_what_we_do_not_have_is_named(family: Any, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        family.spec(SMALL | {"intermediate_size": 96} | change)


def test_the_width_on_record_overrules_the_factor() -> None:
    """Falcon-Mamba-7B says expand 16 beside an intermediate_size of twice the width, and means the latter."""
    spec = falcon_mamba.spec(SMALL | {"expand": 16, "intermediate_size": 96})
    assert spec.layers[0].ssm.d_inner == 96


@pytest.mark.parametrize("limit", [[0.0, {"__float__": "Infinity"}], [0.0, float("inf")], None])
def test_infinity_is_read_in_every_spelling(limit: Any) -> None:
    spec = mamba2.spec(SMALL | {"num_heads": 6, "head_dim": 16, "n_groups": 2, "time_step_limit": limit})
    assert spec.layers[0].ssm.dt_limit == (0.0, float("inf"))
    assert mamba2.spec(mamba2.config(spec)) == spec


def test_jambas_pattern_of_layers() -> None:
    config = SMALL | {"num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 96}
    spec = jamba.spec(config | {"num_key_value_heads": 2})
    assert [layer.mixer for layer in spec.layers] == ["mamba"] * 4 + ["attn"] + ["mamba"] * 3
    assert [layer.ffn.kind for layer in spec.layers if layer.ffn] == ["glu", "moe"] * 4
    assert jamba.spec(jamba.config(spec)) == spec

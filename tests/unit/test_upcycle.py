"""model.upcycle: experts made of a dense model compute what it computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from caravan.kernels.attention import Segments
from caravan.model import checkpoint, upcycle
from caravan.model.decoder import Decoder
from caravan.model.sizes import fresh
from caravan.model.spec import FFN, Attn, Layer, Norm, Rope, Spec
from caravan.types import UserError

IDS = torch.randint(0, 31, (14,), generator=torch.Generator().manual_seed(5))


def dense(family: str = "llama", act: str = "silu", d_ff: int = 12) -> Decoder:
    qk = Norm() if family == "qwen3" else None
    attn = Attn(n_head=2, n_kv=1, head_dim=4, rope=Rope(dim=4), qk_norm=qk)
    layer = Layer(attn=attn, ffn=FFN(kind="glu", d_ff=d_ff, act=act), norm=Norm())  # type: ignore[arg-type]
    spec = Spec(vocab=31, d=8, layers=(layer,) * 3, final_norm=Norm(), max_pos=32, tie=False)
    model = fresh(spec, 0, family).double()
    for p in model.parameters():
        p.data = p.data * 3 if p.dim() > 1 else p.data  # so that the FFNs matter
    return model


def hidden(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(IDS, torch.arange(len(IDS)), Segments((9, 5)))


@pytest.mark.parametrize("family", upcycle.FAMILIES)
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_split_with_all_experts_is_the_dense_model(family: str, act: str) -> None:
    model = dense(family, act)
    sparse = upcycle.split(model, 4, 4, router_std=0.0)
    assert torch.allclose(hidden(sparse), hidden(model), atol=1e-12)
    assert sparse.family == upcycle.FAMILIES[family]
    assert (
        sum(p.numel() for p in sparse.parameters()) == sum(p.numel() for p in model.parameters()) + 3 * 4 * 8
    )


def test_split_holds_every_neuron_once_and_matters() -> None:
    model = dense()
    sparse = upcycle.split(model, 3, 3, router_std=0.0, seed=1)
    for i, block in enumerate(sparse.blocks):
        ours = block.ffn.xin.transpose(0, 1).unflatten(0, (2, 4)).permute(0, 2, 1, 3).reshape(24, 8)
        theirs = model.blocks[i].ffn.inp.weight
        assert not torch.equal(ours, theirs)
        assert torch.equal(ours.sort(0)[0], theirs.sort(0)[0])
    few = upcycle.split(model, 3, 1, router_std=0.0)
    assert not torch.allclose(hidden(few), hidden(model), atol=1e-3)


def test_split_by_a_given_assignment() -> None:
    model = dense()
    given = [[n % 2 for n in range(12)]] * 3
    sparse = upcycle.split(model, 2, 2, assignments=given, router_std=0.0)
    old, new = model.blocks[1].ffn, sparse.blocks[1].ffn
    assert torch.equal(new.xin[1][:6], old.inp.weight[1:12:2])  # gates of the odd neurons
    assert torch.equal(new.xin[0][6:], old.inp.weight[12:24:2])  # ups of the even ones
    assert torch.equal(new.xout[0], 2 * old.out.weight[:, 0::2])
    assert torch.allclose(hidden(sparse), hidden(model), atol=1e-12)


def test_a_chosen_half_is_the_dense_output_in_the_mean() -> None:
    model = dense(d_ff=16)
    model.spec = replace(model.spec, layers=model.spec.layers[:1])
    model.blocks = model.blocks[:1]
    x = torch.randn(1, 8, dtype=torch.float64)
    want = model.blocks[0].ffn(x)
    ours = []
    for seed in range(100):
        ffn = upcycle.split(model, 4, 2, router_std=0.0, seed=seed).blocks[0].ffn
        ours.append(ffn(x, 0, Segments((1,))).detach())
    mean, spread = torch.stack(ours).mean(0), torch.stack(ours).std(0) / 10
    assert ((mean - want).abs() < 4 * spread + 1e-9).all()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copies_are_the_dense_model(top_k: int) -> None:
    model = dense()
    sparse = upcycle.copies(model, 4, top_k)
    assert torch.allclose(hidden(sparse), hidden(model), atol=1e-12)
    first, second = (upcycle.copies(model, 4, top_k, seed=s).blocks[0].ffn.router.weight for s in (0, 1))
    assert not torch.equal(first, second) and 0.01 < first.std().item() < 0.04
    sparse.blocks[0].ffn.xin.data[0] += 1
    assert not torch.equal(sparse.blocks[0].ffn.xin[0], sparse.blocks[0].ffn.xin[1])
    assert not torch.equal(sparse.blocks[0].ffn.xin[0], model.blocks[0].ffn.inp.weight)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_result_is_a_folder_that_opens_again(family: str, tmp_path: Path) -> None:
    sparse = upcycle.split(dense(family, d_ff=16).float(), 4, 2)  # transformers wants rows of 16 bytes
    checkpoint.save_model(sparse, tmp_path, dtype=torch.float32)
    again = checkpoint.load_model(tmp_path)
    assert again.spec == sparse.spec
    assert torch.equal(hidden(again), hidden(sparse))
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(IDS[None, :9]).logits[0]
        assert torch.allclose(again.logits(hidden(again))[:9], want, atol=1e-4)


def test_what_cannot_be_is_explained() -> None:
    model = dense()
    with pytest.raises(UserError, match="12 neurons"):
        upcycle.split(model, 5, 2)
    with pytest.raises(UserError, match="cannot be chosen"):
        upcycle.copies(model, 4, 5)
    with pytest.raises(UserError, match="one size"):
        upcycle.split(model, 2, 1, assignments=[[0] * 7 + [1] * 5] * 3)
    with pytest.raises(UserError, match="below 2"):
        upcycle.split(model, 2, 1, assignments=[[0] * 6 + [2] * 6] * 3)
    with pytest.raises(UserError, match="2 assignments"):
        upcycle.split(model, 2, 1, assignments=[[0] * 6 + [1] * 6] * 2)
    model.family = "gpt2"
    with pytest.raises(UserError, match="gpt2"):
        upcycle.copies(model, 2, 1)
    plain = dense()
    layers = tuple(replace(layer, ffn=FFN(kind="mlp", d_ff=12, act="silu")) for layer in plain.spec.layers)
    plain.spec = replace(plain.spec, layers=layers)
    with pytest.raises(UserError, match="gated"):
        upcycle.copies(plain, 2, 1)

"""model.mixers.mla: latent attention against loops over heads and tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from caravan.kernels.attention import Segments
from caravan.model.mixers import mla as module
from caravan.model.mixers.mla import LatentAttention
from caravan.model.spec import MLA, Attn, Layer, Norm, Rope

D, HEADS, NOPE, ROPE, V = 10, 3, 4, 6, 5


def mixer(
    q_rank: int | None = 7, bias: bool = False, fp32: bool = False, scale: float = 0.3
) -> LatentAttention:
    torch.manual_seed(2)
    mla = MLA(q_rank=q_rank, kv_rank=8, nope=NOPE, rope=ROPE, v=V)
    attn = Attn(
        n_head=HEADS, n_kv=HEADS, head_dim=NOPE + ROPE, scale=scale, mla=mla, qkv_bias=bias, o_bias=bias,
        rope=Rope(dim=ROPE, fp32=fp32),
    )  # fmt: skip
    made = module.make(D, Layer(mixer="mla", attn=attn, norm=Norm()), 0, 0)
    assert isinstance(made, LatentAttention)
    for p in made.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p)
    return made.double()


def angles(positions: list[int]) -> list[tuple[Tensor, Tensor]]:
    inverse = [10_000 ** (-2 * f / ROPE) for f in range(ROPE // 2)]
    table = torch.tensor([[p * w for w in inverse] for p in positions], dtype=torch.float64)
    return [(table.cos(), table.sin())]


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x / math.sqrt(float(x.square().mean()) + 1e-6)


def rotated(x: Tensor, position: int) -> Tensor:
    """Coordinate f turns with f + ROPE / 2."""
    out, half = x.clone(), ROPE // 2
    for f in range(half):
        angle = position * 10_000 ** (-2 * f / ROPE)
        out[f] = x[f] * math.cos(angle) - x[f + half] * math.sin(angle)
        out[f + half] = x[f + half] * math.cos(angle) + x[f] * math.sin(angle)
    return out


@torch.no_grad()
def oracle(m: Any, x_ND: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One head of one token at a time; scores are sums of a part without and a part with position."""
    answers = []
    for rows in x_ND.split(lengths):
        queries, keys, values, shared = [], [], [], []
        for t, x in enumerate(rows):
            q = m.q(x) if hasattr(m, "q") else m.qb(normed(m.qa(x), m.qn.weight))
            latent = m.kva(x)
            full = m.kvb(normed(latent[:8], m.kvn.weight)).view(HEADS, NOPE + V)
            queries.append(q.view(HEADS, NOPE + ROPE))
            keys.append(full[:, :NOPE])
            values.append(full[:, NOPE:])
            shared.append(rotated(latent[8:], t))
        for t in range(len(rows)):
            heads = []
            for h in range(HEADS):
                turned = rotated(queries[t][h, NOPE:], t)
                scores = [
                    0.3 * (queries[t][h, :NOPE] @ keys[s][h] + turned @ shared[s]) for s in range(t + 1)
                ]
                weights = torch.stack(scores).softmax(0)
                heads.append(sum(w * values[s][h] for s, w in enumerate(weights)))
            answers.append(m.o(torch.cat(heads)))
    return torch.stack(answers)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("q_rank", [7, None])
def test_it_is_the_loop_over_heads_and_tokens(q_rank: int | None, bias: bool) -> None:
    m = mixer(q_rank, bias)
    lengths = (6, 3)
    x = torch.randn(9, D, dtype=torch.float64)
    got = m(x, 0, angles([0, 1, 2, 3, 4, 5, 0, 1, 2]), Segments(lengths))
    assert torch.allclose(got, oracle(m, x, lengths), atol=1e-12)


def test_names_and_shapes_of_parameters() -> None:
    shapes = {name: tuple(p.shape) for name, p in mixer(bias=True).named_parameters()}
    assert shapes == {
        "qa.weight": (7, D), "qa.bias": (7,), "qn.weight": (7,), "qb.weight": (30, 7),
        "kva.weight": (14, D), "kva.bias": (14,), "kvn.weight": (8,), "kvb.weight": (27, 8),
        "o.weight": (D, 15), "o.bias": (D,),
    }  # fmt: skip
    assert {name for name, _ in mixer(None).named_parameters()} == {
        "q.weight", "kva.weight", "kvn.weight", "kvb.weight", "o.weight",
    }  # fmt: skip


def test_latent_norms_have_their_own_eps() -> None:
    m = mixer()
    x = torch.full((1, D), 1e-5, dtype=torch.float64)  # so small that eps decides
    got = m(x, 0, angles([0]), Segments((1,)))
    assert torch.allclose(got, oracle(m, x, (1,)), atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    m = mixer()
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    table, attend = angles([0, 1, 2, 0, 1]), Segments((3, 2))
    names, values = zip(*m.named_parameters(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(m, dict(zip(names, parameters, strict=True)), (x, 0, table, attend))

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)


@pytest.mark.parametrize("fp32", [False, True])
def test_bfloat16_comes_out_as_bfloat16(fp32: bool) -> None:
    exact, m = mixer(fp32=fp32), mixer(fp32=fp32).bfloat16()
    x = torch.randn(9, D).bfloat16()
    table = [(cos.float(), sin.float()) for cos, sin in angles(list(range(100, 109)))]
    got = m(x, 0, table, Segments((9,)))
    want = exact(x.double(), 0, angles(list(range(100, 109))), Segments((9,)))
    assert got.dtype == torch.bfloat16
    assert ((got - want).abs().max() / want.std()).item() < 0.15


class Kept(Segments):
    """An `attend` that keeps what it is given, as generation does."""

    whole = False


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("q_rank", [7, None])
def test_over_latents_it_is_the_same_loop(q_rank: int | None, bias: bool) -> None:
    m = mixer(q_rank, bias)
    x = torch.randn(9, D, dtype=torch.float64)
    got = m(x, 0, angles([0, 1, 2, 3, 4, 5, 0, 1, 2]), Kept((6, 3)))
    assert torch.allclose(got, oracle(m, x, (6, 3)), atol=1e-12)


@pytest.mark.parametrize("whole", [True, False])
def test_attend_gets_full_heads_or_what_they_are_made_from(whole: bool) -> None:
    seen: dict[str, Any] = {}

    class Attend(Segments):
        def __call__(self, index: int, q: Tensor, k: Tensor, v: Tensor, attn: Attn) -> Tensor:
            seen.update(index=index, shapes=[tuple(t.shape) for t in (q, k, v)], scale=attn.scale)
            return v.expand(-1, q.shape[1], -1)

    attend = Attend((2,))
    attend.whole = whole
    mixer()(torch.randn(2, D, dtype=torch.float64), 4, angles([0, 1]), attend)
    latent, rotary = 8, ROPE
    full = [(2, 3, NOPE + ROPE), (2, 3, NOPE + ROPE), (2, 3, V)]
    narrow = [(2, 3, latent + rotary), (2, 1, latent + rotary), (2, 1, latent)]
    assert seen == {"index": 4, "shapes": full if whole else narrow, "scale": 0.3}

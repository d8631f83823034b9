"""model.ffn.moe: routing and mixture against a loop over tokens, and the balance of experts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from caravan.model.ffn import moe as module
from caravan.model.ffn.moe import Mixture, Router, balance_loss, expert_counts, moved_bias
from caravan.model.spec import FFN, Attn, Layer, MoE, Norm, Spec


class Context:
    """The part of `attend` that experts use."""

    def __init__(self) -> None:
        self.routed: dict[int, tuple[Tensor, Tensor]] = {}


PLAIN = MoE(n_expert=6, top_k=2, d_ff=5)
KNOBS = {
    "mixtral": PLAIN,
    "qwen2_moe": replace(PLAIN, renorm=False, shared_ff=7, shared_gate=True, fp32_router=False),
    "deepseek_v2": replace(PLAIN, renorm=False, scale=1.7, n_group=3, topk_group=2, shared_ff=7),
    "deepseek_v3": replace(PLAIN, score="sigmoid", eps=1e-20, scale=2.5, n_group=3, topk_group=1,
                           group_score="top2", bias_correction=True, shared_ff=7),
    "sigmoid_plain": replace(PLAIN, score="sigmoid", renorm=False),
    "large_eps": replace(PLAIN, eps=0.5),
    "one_expert": replace(PLAIN, n_expert=1, top_k=1),
    "all_experts": replace(PLAIN, top_k=6),
}  # fmt: skip


def layer(knobs: MoE, act: str = "silu", dtype: torch.dtype = torch.float64) -> Mixture:
    torch.manual_seed(7)
    result = Mixture(4, FFN(kind="moe", d_ff=9, act=act, moe=knobs)).to(dtype)  # type: ignore[arg-type]
    if result.router_bias is not None:
        result.router_bias.data = torch.tensor([-0.06, 0.05, 0.02, -0.04, 0.03, -0.02], dtype=dtype)
    return result


def call(model: Mixture, x: Tensor) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    context = Context()
    return model(x, 3, context), context.routed


def oracle(model: Mixture, x_ND: Tensor) -> Tensor:
    """One token and one expert at a time, with plain numbers for the routing."""
    k = model.moe
    rows = []
    for x in x_ND:
        logits = [(w @ x).item() for w in model.router.weight]
        if k.score == "softmax":
            top = max(logits)
            total = sum(math.exp(v - top) for v in logits)
            scores = [math.exp(v - top) / total for v in logits]
        else:
            scores = [1 / (1 + math.exp(-v)) for v in logits]
        liking = [s + (model.router_bias[e].item() if model.router_bias is not None else 0.0)
                  for e, s in enumerate(scores)]  # fmt: skip
        size = k.n_expert // k.n_group
        members = [range(g * size, (g + 1) * size) for g in range(k.n_group)]
        rank = lambda g: sum(sorted(liking[e] for e in members[g])[-(1 if k.group_score == "max" else 2) :])  # noqa: E731, B023
        allowed = {e for g in sorted(range(k.n_group), key=rank)[-k.topk_group :] for e in members[g]}
        chosen = sorted(allowed, key=lambda e: -liking[e])[: k.top_k]
        weights = {e: scores[e] for e in chosen}
        if k.renorm:
            total = sum(weights.values()) + k.eps
            weights = {e: w / total for e, w in weights.items()}
        y = torch.zeros_like(x)
        for e, w in weights.items():
            gate, up = (model.xin[e] @ x).chunk(2)
            y = y + w * k.scale * (model.xout[e] @ (model.act(gate) * up))
        if model.shared is not None:
            gate, up = (model.shared.inp.weight @ x).chunk(2)
            dense = model.shared.out.weight @ (model.act(gate) * up)
            y = y + dense * (torch.sigmoid(model.shared_gate.weight @ x) if model.shared_gate else 1.0)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("act", ["silu", "gelu_new"])
@pytest.mark.parametrize("name", KNOBS)
def test_mixture_is_the_loop_over_tokens_and_experts(name: str, act: str) -> None:
    model = layer(KNOBS[name], act)
    x = torch.randn(23, 4, dtype=torch.float64)
    got, routed = call(model, x)
    assert torch.allclose(got, oracle(model, x), atol=1e-12)
    probability, chosen = routed[3]
    assert chosen.shape == (23, KNOBS[name].top_k)
    assert torch.allclose(probability.sum(-1), torch.ones(23, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_gradients_by_finite_differences(name: str) -> None:
    model = layer(KNOBS[name])
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    names, values = zip(*((n, p) for n, p in model.named_parameters() if n != "router_bias"), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        context = Context()
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, replaced, (x, 0, context))

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)


def test_the_choice_bias_moves_the_choice_and_nothing_else() -> None:
    knobs = KNOBS["deepseek_v3"]
    logits = torch.randn(40, 6, dtype=torch.float64)
    route = Router(replace(knobs, n_group=1, topk_group=1))
    plain, biased = route(logits), route(logits, torch.tensor([9.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    assert (biased[2] == 0).any(-1).all() and not (plain[2] == 0).any(-1).all()
    assert torch.equal(plain[0], biased[0])
    picked = logits.sigmoid().gather(1, biased[2])
    assert torch.allclose(biased[1], 2.5 * picked / picked.sum(-1, keepdim=True))


def test_a_tokens_result_depends_on_that_token_alone() -> None:
    model = layer(PLAIN, dtype=torch.float32)
    x = torch.randn(17, 4)
    whole, _ = call(model, x)
    assert torch.allclose(torch.cat([call(model, row[None])[0] for row in x]), whole, atol=1e-6)
    assert torch.equal(call(model, x)[0], whole)
    assert call(model, x[:0])[0].shape == (0, 4)


def test_router_runs_in_fp32_if_asked() -> None:
    wide = layer(replace(PLAIN, fp32_router=True), dtype=torch.bfloat16)
    x = torch.randn(64, 4).bfloat16()
    exact = (x.double() @ wide.router.weight.double().T).softmax(-1)
    narrow = layer(replace(PLAIN, fp32_router=False), dtype=torch.bfloat16)
    assert (call(wide, x)[1][3][0] - exact).abs().max() < 1e-6
    assert (call(narrow, x)[1][3][0] - exact).abs().max() > 1e-4
    assert call(wide, x)[0].dtype == torch.bfloat16


def test_impossible_knobs_are_refused() -> None:
    with pytest.raises(AssertionError, match="candidates"):
        Router(replace(PLAIN, n_group=3, topk_group=1, top_k=3))
    with pytest.raises(AssertionError, match="shared"):
        layer(replace(PLAIN, shared_gate=True))


def spec_of(*knobs: MoE | None) -> Spec:
    attn = Attn(n_head=1, n_kv=1, head_dim=4)
    ffns = [FFN(kind="moe" if k else "glu", d_ff=5, act="silu", moe=k) for k in knobs]
    layers = tuple(Layer(attn=attn, norm=Norm(), ffn=ffn) for ffn in ffns)
    return Spec(vocab=7, d=4, layers=layers, final_norm=Norm(), max_pos=8)


def routing(knobs: MoE, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits, probabilities, chosen"""
    logits = torch.randn(tokens, knobs.n_expert, generator=torch.Generator().manual_seed(seed))
    probability, _, chosen = Router(knobs)(logits)
    return logits, probability, chosen


def test_balance_loss_is_that_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    knobs = replace(PLAIN, aux_coef=0.02)
    spec = spec_of(knobs, None, knobs)
    parts = {0: routing(knobs, 11, 0), 2: routing(knobs, 11, 1)}
    routed = {i: part[1:] for i, part in parts.items()}
    gates = tuple(part[0] for part in parts.values())
    assert torch.allclose(balance_loss(routed, spec), 0.02 * load_balancing_loss_func(gates, 6, 2))
    mask = torch.tensor([[1] * 7 + [0] * 4])
    want = 0.02 * load_balancing_loss_func(gates, 6, 2, mask)
    assert torch.allclose(balance_loss(routed, spec, mask.flatten().float()), want)


def test_balance_loss_by_hand() -> None:
    knobs = replace(PLAIN, n_expert=2, top_k=1, aux_coef=0.5)
    probability = torch.tensor([[0.75, 0.25], [0.5, 0.5]], requires_grad=True)
    chosen = torch.tensor([[0], [0]])
    loss = balance_loss({0: (probability, chosen)}, spec_of(knobs))
    assert loss.item() == pytest.approx(0.5 * 2 * (1.0 * 0.625))
    loss.backward()
    assert probability.grad is not None and torch.allclose(
        probability.grad, torch.tensor([[0.5, 0], [0.5, 0]])
    )
    even = balance_loss({0: (torch.full((4, 2), 0.5), torch.tensor([[0], [1], [0], [1]]))}, spec_of(knobs))
    assert even.item() == pytest.approx(0.5)


def test_balance_loss_does_not_see_pads_order_or_packing() -> None:
    spec = spec_of(PLAIN)
    _, probability, chosen = routing(PLAIN, 9, 3)
    want = balance_loss({0: (probability, chosen)}, spec)
    _, pad_p, pad_c = routing(PLAIN, 4, 4)
    padded = {0: (torch.cat([pad_p, probability]), torch.cat([pad_c, chosen]))}
    weight = torch.cat([torch.zeros(4), torch.ones(9)])
    assert torch.allclose(balance_loss(padded, spec, weight), want)
    assert not torch.allclose(balance_loss(padded, spec), want)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(balance_loss({0: (probability[order], chosen[order])}, spec), want)


def test_balance_loss_without_experts_or_coefficient_is_zero() -> None:
    off = replace(PLAIN, aux_coef=0.0)
    assert balance_loss({}, spec_of(None)).item() == 0.0
    assert balance_loss({0: routing(off, 5, 0)[1:]}, spec_of(off)).item() == 0.0
    weight = torch.zeros(5)
    assert balance_loss({0: routing(PLAIN, 5, 0)[1:]}, spec_of(PLAIN), weight).item() == 0.0


def test_layers_with_other_knobs_are_pooled_apart() -> None:
    small, large = PLAIN, replace(PLAIN, n_expert=8)
    parts = {0: routing(small, 5, 0)[1:], 1: routing(large, 5, 1)[1:]}
    both = balance_loss(parts, spec_of(small, large))
    alone = balance_loss({0: parts[0]}, spec_of(small)) + balance_loss({0: parts[1]}, spec_of(large))
    assert torch.allclose(both, alone)


def test_bias_moves_towards_the_neglected() -> None:
    moved = moved_bias(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([5, 1, 3, 3]), 0.01)
    assert torch.allclose(moved, torch.tensor([0.09, 0.21, 0.3, 0.4]))


def test_bias_updates_even_out_a_lopsided_router() -> None:
    knobs = replace(KNOBS["deepseek_v3"], n_group=1, topk_group=1)
    logits = torch.randn(600, 6, generator=torch.Generator().manual_seed(2)) + torch.linspace(-1, 1, 6)
    bias, route = torch.zeros(6), Router(knobs)
    spread = lambda: float(expert_counts(route(logits, bias)[2], 6).std())  # noqa: E731
    before = spread()
    for _ in range(200):
        bias = moved_bias(bias, expert_counts(route(logits, bias)[2], 6), 0.005)
    assert spread() < before / 10


def test_counts_leave_out_tokens_without_weight() -> None:
    chosen = torch.tensor([[0, 2], [2, 3], [1, 2]])
    assert expert_counts(chosen, 5).tolist() == [1, 1, 3, 1, 0]
    assert expert_counts(chosen, 5, torch.tensor([1.0, 0.0, 1.0])).tolist() == [1, 1, 2, 0, 0]


def test_no_loop_over_experts() -> None:
    """The number of operators does not grow with the number of experts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.total += 1
            return func(*args, **(kwargs or {}))

    def operators(experts: int) -> int:
        model = layer(replace(PLAIN, n_expert=experts), dtype=torch.float32)
        model(torch.randn(40, 4), 0, Context()).sum().backward()  # self-tests run here
        with Count() as count:
            model(torch.randn(40, 4), 0, Context()).sum().backward()
        return count.total

    assert operators(3) == operators(24)


def test_activation_checkpointing_changes_nothing() -> None:
    from torch.utils.checkpoint import checkpoint

    model = layer(PLAIN)
    x = torch.randn(9, 4, dtype=torch.float64)
    gradients = []
    for again in (False, True):
        model.zero_grad()
        context = Context()
        y = checkpoint(model, x, 0, context, use_reentrant=False) if again else model(x, 0, context)
        (y.square().sum() + balance_loss(context.routed, spec_of(PLAIN))).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_compiles_without_a_graph_break(name: str) -> None:
    model = layer(KNOBS[name], dtype=torch.float32)
    x = torch.randn(12, 4)
    context, other = Context(), Context()
    got = torch.compile(model, fullgraph=True)(x, 0, context)
    assert torch.allclose(got, model(x, 0, other), atol=1e-5)
    assert torch.equal(context.routed[0][1], other.routed[0][1])


assert module.make  # the registry's entry

"""AdamW against torch's own, Muon against a slow one written from the paper."""

import math

import pytest
import torch

from caravan.algos.optim import OptimConfig, Optimiser, layout, orthogonalise

SHAPES = [
    ("embed.weight", (11, 6)), ("qkv.weight", (12, 6)), ("up.weight", (8, 6)), ("experts", (2, 8, 6)),
    ("conv.weight", (6, 1, 3)), ("norm.weight", (6,)),
]  # fmt: skip
MAPS = {"qkv.weight", "up.weight", "experts"}
ROWS = {"qkv.weight": (6, 3, 3), "experts": (4, 4)}


def start(config, **options):
    slots = layout(SHAPES, config.name, **options)
    g = torch.Generator().manual_seed(1)
    master = torch.randn(slots[-1].stop, generator=g)
    return Optimiser(config, slots, master), {s.name: s.of(master) for s in slots}, g


def test_layout_is_contiguous_and_sorted_by_kind():
    slots = layout(SHAPES, "muon", MAPS, ROWS)
    assert [(s.name, s.kind) for s in slots] == [
        ("qkv.weight", "muon"), ("up.weight", "muon"), ("experts", "muon"), ("embed.weight", "decay"),
        ("conv.weight", "decay"), ("norm.weight", "plain"),
    ]  # fmt: skip
    assert [s.start for s in slots[1:]] == [s.stop for s in slots[:-1]]
    assert slots[0].rows == (6, 3, 3)


def test_adamw_is_torchs(monkeypatch):
    monkeypatch.setattr("caravan.algos.optim._BLOCK", 50)  # blocks that cut through matrices
    config = OptimConfig(lr=0.01, weight_decay=0.1, beta2=0.97)
    ours, weights, g = start(config)
    theirs = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items()}
    groups = [
        {"params": [p for p in theirs.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.97), eps=1e-8)
    for _ in range(20):
        grad = torch.randn(ours.master.shape, generator=g)
        for slot in ours.slots:
            theirs[slot.name].grad = slot.of(grad).clone() * 0.5
        reference.step()
        ours.step(grad, 0.01, scale=0.5)
    for name, w in weights.items():
        torch.testing.assert_close(w, theirs[name].detach(), rtol=1e-6, atol=1e-6)


def slow_muon(weight, grads, rows, lr, mu, decay):
    """One matrix at a time, straight from the recipe."""
    momentum = torch.zeros_like(weight)
    for grad in grads:
        momentum = mu * momentum + grad
        update = grad + mu * momentum
        parts = []
        for part in update.split(rows):
            x = part.bfloat16() if part.shape[0] <= part.shape[1] else part.T.bfloat16()
            x = x / (x.float().norm() + 1e-7).bfloat16()
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = x if part.shape[0] <= part.shape[1] else x.T
            parts.append(x.float() * 0.2 * math.sqrt(max(part.shape)))
        weight = weight * (1 - lr * decay) - lr * torch.cat(parts)
    return weight


def test_muon_is_the_slow_one():
    config = OptimConfig(name="muon", lr=0.02, weight_decay=0.1, momentum=0.5)
    ours, weights, g = start(config, maps=MAPS, fused_rows=ROWS)
    before = {name: w.clone() for name, w in weights.items()}
    grads = [torch.randn(ours.master.shape, generator=g) for _ in range(4)]
    for grad in grads:
        ours.step(grad.clone(), 0.02)
    for slot in ours.slots[:3]:
        rows = (list(slot.rows) or [slot.shape[-2]]) * (slot.shape[0] if len(slot.shape) == 3 else 1)
        flat = [x.reshape(-1, slot.shape[-1]) for x in (before[slot.name], *(slot.of(x) for x in grads))]
        want = slow_muon(flat[0], flat[1:], rows, 0.02, 0.5, 0.1).view(slot.shape)
        torch.testing.assert_close(
            weights[slot.name], want, rtol=0, atol=2e-3
        )  # bf16 products in another order
        assert (weights[slot.name] - before[slot.name]).abs().max() > 0.02


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 8, 8)])
def test_orthogonalise_flattens_the_spectrum(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_restores_bit_for_bit_and_casts(name):
    config = OptimConfig(name=name)
    slots = layout(SHAPES, name)
    master = torch.randn(slots[-1].stop, generator=torch.Generator().manual_seed(2))
    one = Optimiser(config, slots, master.clone(), torch.empty(master.shape, dtype=torch.bfloat16))
    grads = [torch.randn(master.shape, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    for grad in grads[:2]:
        one.step(grad.clone(), 0.01)
    saved = {k: v.clone() for k, v in one.state().items()}
    two = Optimiser(config, slots, torch.zeros_like(master), torch.empty(master.shape, dtype=torch.bfloat16))
    two.load(saved, one.steps)
    assert torch.equal(two.compute, saved["master"].bfloat16())
    for grad in grads[2:]:
        one.step(grad.clone(), 0.01)
        two.step(grad.clone(), 0.01)
    assert torch.equal(one.master, two.master) and torch.equal(one.compute, two.compute)
    assert torch.equal(one.compute, one.master.bfloat16())


def test_what_is_named_plain_does_not_decay() -> None:
    shapes = [("mix.A_log", (6, 4)), ("mix.out.weight", (6, 4)), ("norm.weight", (6,))]
    for method in ("adamw", "muon"):
        kinds = {slot.name: slot.kind for slot in layout(shapes, method, plain={"mix.A_log"})}
        assert kinds["mix.A_log"] == kinds["norm.weight"] == "plain" and kinds["mix.out.weight"] != "plain"

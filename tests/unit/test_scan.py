"""kernels.chunks, kernels.scan, kernels.shortconv: fast forms against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from caravan.kernels import chunks, scan, shortconv
from tests.unit.recurrent import LENGTHS, agree

D, Z, H, P, G = 6, 5, 6, 4, 2
each_lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
each_start = pytest.mark.parametrize("begun", [False, True], ids=["fresh", "begun"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each_lengths
@pytest.mark.parametrize("size", [1, 4, 64])
def test_chunks_hold_every_token_once_and_nothing_else(lengths: tuple[int, ...], size: int) -> None:
    plan = chunks.plan(lengths, size, torch.device("cpu"))
    x_N = torch.arange(1.0, 1 + sum(lengths))
    cells = plan.spread(x_N)
    assert cells.shape == (plan.count, plan.size) and plan.size <= size
    assert sorted(cells[cells != 0].tolist()) == x_N.tolist()
    assert torch.equal(plan.collect(cells), x_N)
    assert torch.equal(plan.tokens(torch.float32), (cells != 0).float())
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    for row in plan.spread(segment + 1.0):
        assert len(set(row[row != 0].tolist())) == 1, "a chunk holds tokens of one segment"


@each_lengths
def test_a_state_is_carried_through_the_chunks_of_its_segment(lengths: tuple[int, ...]) -> None:
    plan = chunks.plan(lengths, 4, torch.device("cpu"))
    cells = plan.spread(torch.arange(1.0, 1 + sum(lengths)))
    start_S = 1000.0 * torch.arange(len(lengths))
    before, last = chunks.carry(plan, start_S, lambda state, part: state + cells[part].sum(1))
    sums = [part.sum() for part in torch.arange(1.0, 1 + sum(lengths)).split(list(lengths))]
    assert torch.equal(last, start_S + torch.stack(sums))
    assert torch.equal(before[: len(lengths)].sort().values, start_S)


def test_moving_tokens_has_an_exact_gradient() -> None:
    plan = chunks.plan((5, 1, 9), 4, torch.device("cpu"))
    x = draw(15, 2).requires_grad_()
    assert torch.autograd.gradcheck(plan.spread, (x,))
    assert torch.autograd.gradcheck(plan.collect, (draw(plan.count, plan.size, 2).requires_grad_(),))


@each_start
@each_lengths
def test_the_selective_scan_is_its_definition(lengths: tuple[int, ...], begun: bool) -> None:
    n = sum(lengths)
    inputs = [draw(n, D), F.softplus(2 * draw(n, D, seed=1)), -draw(D, Z, seed=2).exp(), draw(n, Z, seed=3)]
    inputs += [draw(n, Z, seed=4)] + ([draw(len(lengths), D, Z, seed=5)] if begun else [])
    agree(
        lambda *a: scan.reference_selective_scan(lengths, *a),
        lambda *a: scan.selective_scan(lengths, *a),
        inputs,
    )


@each_start
@each_lengths
def test_the_state_space_dual_is_its_definition(lengths: tuple[int, ...], begun: bool) -> None:
    n = sum(lengths)
    inputs = [draw(n, H, P), F.softplus(2 * draw(n, H, seed=1)), -(2 * draw(H, seed=2)).exp()]
    inputs += [draw(n, G, Z, seed=3), draw(n, G, Z, seed=4)]
    inputs += [draw(len(lengths), H, P, Z, seed=5)] if begun else []
    agree(lambda *a: scan.reference_ssd(lengths, *a), lambda *a: scan.ssd(lengths, *a), inputs)


@pytest.mark.parametrize("length", [1, 2, 4, 32])
def test_the_tree_scan_is_the_running_recurrence(length: int) -> None:
    decay, u = torch.rand(3, length, 2, dtype=torch.float64), draw(3, length, 2)
    state, want = torch.zeros(3, 2), []
    for t in range(length):
        state = decay[:, t] * state + u[:, t]
        want.append(state)
    assert torch.allclose(scan.associative_scan_(decay.clone(), u.clone()), torch.stack(want, 1), atol=1e-12)


def test_heads_that_forget_at_once_do_not_overflow() -> None:
    """exp(-1000) per token: a product of growing factors would be infinity times zero."""
    n = 70
    x, dt, B = torch.randn(n, H, P), torch.full((n, H), 50.0), torch.randn(n, G, Z)
    y, last = scan.ssd((n,), x, dt, torch.full((H,), -20.0), B, B)
    want, _ = scan.reference_ssd((n,), x, dt, torch.full((H,), -20.0), B, B)
    assert torch.isfinite(y).all() and torch.isfinite(last).all() and torch.allclose(y, want, rtol=1e-4)


def test_states_are_fp32_for_bf16_inputs() -> None:
    x, B = torch.randn(9, D).bfloat16(), torch.randn(9, Z).bfloat16()
    y, last = scan.selective_scan((9,), x, x.abs(), -torch.rand(D, Z).bfloat16(), B, B)
    assert y.dtype == last.dtype == torch.float32


@each_start
@each_lengths
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_the_short_convolution_is_its_definition(lengths: tuple[int, ...], begun: bool, taps: int) -> None:
    inputs = [draw(sum(lengths), D), draw(D, taps, seed=1), draw(D, seed=2)]
    inputs += [draw(len(lengths), D, taps - 1, seed=3)] if begun else []

    def with_state(function):  # type: ignore[no-untyped-def]
        return lambda x, w, b, *state: function(lengths, x, w, b, state[0] if state else None)

    agree(with_state(shortconv.reference_short_conv), with_state(shortconv.short_conv), inputs)


def test_the_token_before() -> None:
    x = torch.arange(1.0, 7.0)[:, None]
    before, last = shortconv.token_shift((3, 1, 2), x, None)
    assert before[:, 0].tolist() == [0, 1, 2, 0, 0, 5] and last[:, 0].tolist() == [3, 4, 6]
    before, _ = shortconv.token_shift((3, 1, 2), x, torch.tensor([[10.0], [20.0], [30.0]]))
    assert before[:, 0].tolist() == [10, 1, 2, 20, 30, 5]

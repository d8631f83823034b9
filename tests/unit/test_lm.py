"""The chunked cross-entropy against the plain one, numbers on paper, and finite differences."""

import math

import pytest
import torch

from caravan.algos.lm import cross_entropy, cross_entropy_reference


def problem(rows=23, width=8, vocab=31, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=g)
    weights = torch.rand(rows, generator=g)
    weights[torch.rand(rows, generator=g) < 0.4] = 0
    return hidden, weight, targets, weights


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.7, 1.5)])
def test_equals_the_reference_in_value_and_gradient(chunk, z_loss, scale, softcap):
    hidden, weight, targets, weights = problem()
    bias = torch.linspace(-1, 1, 31, dtype=torch.float64, requires_grad=True)
    ours = cross_entropy(hidden, weight, targets, weights, 5.0, chunk, z_loss, bias, scale, softcap)
    mine = torch.autograd.grad(ours.value * 3, (hidden, weight, bias))
    plain = cross_entropy_reference(hidden, weight, targets, weights, 5.0, z_loss, bias, scale, softcap)
    theirs = torch.autograd.grad(plain * 3, (hidden, weight, bias))
    torch.testing.assert_close(ours.value, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_finite_differences():
    hidden, weight, targets, weights = problem(rows=6, width=3, vocab=5)

    def value(h, w):
        return cross_entropy(h, w, targets, weights, 2.0, 4, 0.1).value

    for tensor, grad in zip(
        (hidden, weight), torch.autograd.grad(value(hidden, weight), (hidden, weight)), strict=True
    ):
        for i in range(tensor.numel()):
            with torch.no_grad():
                flat = tensor.view(-1)
                flat[i] += 1e-5
                high = value(hidden, weight)
                flat[i] -= 2e-5
                low = value(hidden, weight)
                flat[i] += 1e-5
            assert ((high - low) / 2e-5 - grad.view(-1)[i]).abs() < 1e-9


def test_uniform_logits_cost_ln_vocab():
    loss = cross_entropy(torch.zeros(4, 2), torch.randn(7, 2), torch.arange(4), torch.ones(4), 4.0)
    assert loss.value.item() == pytest.approx(math.log(7), abs=1e-6)
    assert loss.stats["tokens"].item() == 4
    assert loss.stats["nll"].item() == pytest.approx(4 * math.log(7), abs=1e-5)


def test_correct_counts_weighted_hits():
    hidden, weight = torch.eye(3), torch.eye(3) * 5
    loss = cross_entropy(hidden, weight, torch.tensor([0, 1, 0]), torch.tensor([1.0, 0.5, 1.0]), 1.0)
    assert loss.stats["correct"].item() == 1.5


def test_values_of_micro_batches_add_up():
    hidden, weight, targets, weights = problem()
    whole = cross_entropy(hidden, weight, targets, weights, 3.0).value
    halves = [
        cross_entropy(hidden[s], weight, targets[s], weights[s], 3.0).value
        for s in (slice(9), slice(9, None))
    ]
    torch.testing.assert_close(sum(halves), whole)


def test_bf16_is_near_the_exact_answer():
    hidden, weight, targets, weights = problem(rows=300, width=64, vocab=200)
    exact = cross_entropy_reference(hidden / 8, weight, targets, weights, 100.0)
    grads = torch.autograd.grad(exact, (hidden, weight))
    h, w = (hidden / 8).detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    loss = cross_entropy(h, w, targets, weights, 100.0, 64)
    loss.value.backward()
    assert loss.value.dtype == torch.float32
    assert loss.value.item() == pytest.approx(exact.item(), rel=1e-3)
    for got, want in ((h.grad.double() / 8, grads[0]), (w.grad.double(), grads[1])):
        assert (got - want).norm() < 0.02 * want.norm()


def test_no_gradient_without_need():
    hidden, weight, targets, weights = problem()
    with torch.no_grad():
        assert not cross_entropy(hidden, weight, targets, weights, 1.0).value.requires_grad
    frozen = cross_entropy(hidden, weight.detach(), targets, weights, 1.0).value
    (grad,) = torch.autograd.grad(frozen, (hidden,))
    assert grad.abs().sum() > 0


def test_backward_twice_is_refused():
    hidden, weight, targets, weights = problem()
    value = cross_entropy(hidden, weight, targets, weights, 1.0).value
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        value.backward()

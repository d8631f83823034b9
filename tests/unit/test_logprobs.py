"""token_logprobs against its definition, its gradient against finite differences, and what it must not
hold."""

import pytest
import torch

from caravan.algos.logprobs import segment_sums, token_logprobs, token_logprobs_reference


def _case(n: int = 13, d: int = 5, v: int = 11, dtype: torch.dtype = torch.float64, bias: bool = True):
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, d, generator=g, dtype=dtype)
    weight = torch.randn(v, d, generator=g, dtype=dtype)
    targets = torch.randint(0, v, (n,), generator=g)
    return hidden, weight, targets, torch.randn(v, generator=g, dtype=dtype) if bias else None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 4, 1])
@pytest.mark.parametrize("shape", [{}, {"scale": 0.3}, {"scale": 1.7, "softcap": 1.5}])
def test_equals_log_softmax(temperature: float, chunk: int | None, shape: dict[str, float]) -> None:
    hidden, weight, targets, bias = _case()
    logp, entropy = token_logprobs(
        hidden, weight, targets, temperature, entropy=True, bias_V=bias, chunk=chunk, **shape
    )
    want, want_entropy = token_logprobs_reference(hidden, weight, targets, temperature, bias_V=bias, **shape)
    torch.testing.assert_close(logp, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-12)
    alone = token_logprobs(hidden, weight, targets, temperature, bias_V=bias, chunk=chunk, **shape)
    assert torch.equal(alone, logp)


@pytest.mark.parametrize("shape", [{}, {"scale": 1.7, "softcap": 1.5}])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias: bool, shape: dict[str, float]) -> None:
    hidden, weight, targets, bias = _case(5, 3, 4, bias=with_bias)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]

    def both(h, w, b=None):
        return token_logprobs(h, w, targets, 0.7, entropy=True, bias_V=b, chunk=2, **shape)

    def only(h, w, b=None):
        return token_logprobs(h, w, targets, 0.7, bias_V=b, chunk=2, **shape)

    def entropy_alone(h, w, b=None):
        return both(h, w, b)[1]

    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradcheck(entropy_alone, leaves)
    assert torch.autograd.gradcheck(only, leaves)


def test_bf16_is_scored_in_float32() -> None:
    """Same bf16 inputs: the result is that of float32 arithmetic, not of rounded logits."""
    hidden, weight, targets, _ = _case(64, 32, 97, torch.float32, bias=False)
    low_h, low_w = hidden.bfloat16(), weight.bfloat16()
    logp = token_logprobs(low_h, low_w, targets)
    assert logp.dtype == torch.float32
    want, _ = token_logprobs_reference(low_h.double(), low_w.double(), targets)
    assert float((logp - want).abs().max()) < 1e-4
    rounded = torch.log_softmax((low_h @ low_w.T).float(), 1).gather(1, targets[:, None]).squeeze(1)
    assert float((rounded - want).abs().max()) > 1e-2  # what the rule protects from

    low_h.requires_grad_()
    token_logprobs(low_h, low_w, targets).sum().backward()
    exact = hidden.bfloat16().double().requires_grad_()
    token_logprobs(exact, low_w.double(), targets).sum().backward()
    torch.testing.assert_close(low_h.grad.double(), exact.grad, rtol=0.02, atol=0.02)


def test_large_logits_stay_finite_and_empty_input_works() -> None:
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    weight = torch.eye(2)
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([0, 0]), entropy=True)
    assert torch.isfinite(logp).all() and torch.isfinite(entropy).all()
    logp.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert token_logprobs(torch.zeros(0, 2), weight, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_backward_is_repeatable() -> None:
    hidden, weight, targets, _ = _case(dtype=torch.float32)
    grads = []
    for _ in range(2):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        token_logprobs(h, w, targets, chunk=4).sum().backward()
        grads.append((h.grad, w.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_segment_sums() -> None:
    x = torch.arange(6.0)
    assert segment_sums(x, (2, 0, 3, 1)).tolist() == [1.0, 0.0, 9.0, 5.0]

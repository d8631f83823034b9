"""KL estimators: value and gradient by enumeration over three tokens; the adaptive controller by hand."""

import math

import pytest
import torch

from caravan.algos.kl import Adaptive, Fixed, controller, k1, k2, k3

P, Q = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
TRUE_GRADIENT = (0.346243, -0.220389, -0.125854)


def _logs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(P, dtype=torch.float64).log(), torch.tensor(Q, dtype=torch.float64).log()


def test_values_and_variances() -> None:
    logp, logq = _logs()
    p = logp.exp()
    mean = lambda x: float((p * x).sum())  # noqa: E731
    assert mean(k1(logp, logq)) == pytest.approx(0.223805, abs=1e-6)
    assert mean(k3(logp, logq)) == pytest.approx(mean(k1(logp, logq)), abs=1e-12)
    assert mean(k2(logp, logq)) == pytest.approx(0.265479, abs=1e-6)
    assert mean(k3(logq, logp)) == pytest.approx(0.339529, abs=1e-6)  # the wrong sign
    variance = lambda x: mean(x**2) - mean(x) ** 2  # noqa: E731
    assert variance(k1(logp, logq)) == pytest.approx(0.480869, abs=1e-6)
    assert variance(k3(logp, logq)) == pytest.approx(0.009005, abs=1e-6)


def _gradient(weight, in_loss) -> torch.Tensor:
    """sum_a p_a [in_loss(a) + weight(a) log p_a] differentiated through log p_a only, as a sampler's loss
    is."""
    z = torch.tensor(P, dtype=torch.float64).log().requires_grad_()
    logp = torch.log_softmax(z, 0)
    p = logp.detach().exp()
    _, logq = _logs()
    (p * (weight(logp.detach(), logq) * logp + in_loss(logp, logq))).sum().backward()
    return z.grad


def _nothing(logp, logq):
    return torch.zeros_like(logp)


@pytest.mark.parametrize(
    ("weight", "in_loss", "want"),
    [
        (_nothing, k2, TRUE_GRADIENT),
        (k1, _nothing, TRUE_GRADIENT),
        (_nothing, k1, (0.0, 0.0, 0.0)),
        (_nothing, k3, (0.3, -0.2, -0.1)),
        (k3, _nothing, (0.046243, -0.020389, -0.025854)),
        (k3, k3, TRUE_GRADIENT),
    ],
    ids=["k2 in loss", "k1 in reward", "k1 in loss", "k3 in loss", "k3 in reward", "ratio times k3"],
)
def test_gradients(weight, in_loss, want: tuple[float, ...]) -> None:
    torch.testing.assert_close(
        _gradient(weight, in_loss), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_extreme_ratio_is_finite() -> None:
    assert torch.isfinite(k3(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]))).all()


def test_adaptive_controller() -> None:
    start = Adaptive(value=1.0, target=6.0, horizon=10_000)
    assert start.update(12.0, 512).value == pytest.approx(1.01024)
    assert start.update(6.0, 512).value == 1.0
    assert start.update(0.0, 512).value == pytest.approx(0.98976)
    assert start.update(math.inf, 512).value == pytest.approx(1.01024)
    assert Fixed(value=0.3).update(100.0, 512).value == 0.3
    assert isinstance(controller(0.1, 0.0, 10), Fixed) and isinstance(controller(0.1, 6.0, 10), Adaptive)

"""KL(p || q) from samples of p, and the two ways to weigh it.

For a token drawn from p, with x = log p - log q (Schulman, "Approximating KL divergence", 2020):

    k1 = x            unbiased, high variance, may be negative
    k2 = x^2 / 2      biased, low variance
    k3 = e^-x - 1 + x unbiased, low variance, never negative

Which one where is not a matter of taste. As a *value* to log: k1 or k3. Inside the *reward*: only k1 gives
the gradient of KL(p || q). Inside the *loss*: only k2 does; k1 gives a gradient of zero, k3 that of KL(q ||
p).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CLAMP = 20.0
"""Log-ratio beyond which exp overflows or underflows to nothing: inf * 0 is NaN even under a mask."""


def k1(logp: Tensor, logq: Tensor) -> Tensor:
    """log p - log q, per token. The only estimator that belongs in a reward."""
    return logp - logq


def k2(logp: Tensor, logq: Tensor) -> Tensor:
    """(log p - log q)^2 / 2, per token. The only estimator that belongs in a loss."""
    return 0.5 * (logp - logq).square()


def k3(logp: Tensor, logq: Tensor) -> Tensor:
    """q/p - 1 - log(q/p), per token: note the sign in the exponent. Log this one."""
    x = torch.clamp(logp - logq, -_CLAMP, _CLAMP)
    return torch.expm1(-x) + x


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A constant KL coefficient."""

    value: float

    def update(self, kl: float, episodes: int) -> Fixed:
        return self


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Proportional controller (Ziegler et al. 2019, section 2.2): steers the KL of a response towards
    `target`.

    value *= 1 + clip(kl / target - 1, +-0.2) * episodes / horizon
    """

    value: float
    target: float
    """Nats, summed over a response."""
    horizon: int = 10_000
    """Episodes (responses) after which a constant error of 20 % has moved the coefficient by 20 %."""

    def update(self, kl: float, episodes: int) -> Adaptive:
        """`kl`: mean over responses of the KL *summed* over the response; `episodes`: responses in the
        rollout."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, value=self.value * (1.0 + error * episodes / self.horizon))


def controller(coefficient: float, target: float, horizon: int) -> Fixed | Adaptive:
    """`target` 0 keeps the coefficient fixed."""
    return (
        Adaptive(value=coefficient, target=target, horizon=horizon)
        if target > 0
        else Fixed(value=coefficient)
    )

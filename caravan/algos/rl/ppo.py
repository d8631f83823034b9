"""Proximal policy optimisation for text (Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022,
2203.02155).

One episode is one response; its actions are the tokens, the end-of-turn token among them. The reward of an
action is

    r_t = -beta (log pi_old(a_t) - log pi_ref(a_t))        k1 in the reward, from sampling time, no gradient
    r_T += score                                           once, on the last action

and the state after the last action is worth nothing. The losses are sums over response tokens divided by an
explicit `normaliser`, the number of tokens of the whole minibatch over all ranks and micro batches: how a
minibatch is cut then changes rounding only, and an enumeration of all episodes can be passed through this
very code.

Left out: reward whitening (with a mean shift it pays for length), a value head on the policy's trunk.

Shapes: R response tokens of all episodes end to end, S episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caravan.types import Loss

VERSION = 1
NEEDS = ("critic", "reference", "reward")

_LOG_RATIO_CLAMP = 20.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of the method itself."""

    clip: float = 0.2
    """Policy ratio is clipped to 1 +- this."""
    dual_clip: float = 0.0
    """Ceiling factor of the loss where the advantage is negative (3 is usual); 0 switches it off."""
    value_clip: float = 0.5
    """New values are clipped to the old ones +- this, in units of the score (0.2 is for scores of variance
    1); 0 switches it off."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE lambda: 1 is return minus value, 0 the one-step error."""
    entropy: float = 0.0
    """Weight of an entropy bonus, per token."""

    def __post_init__(self) -> None:
        for name, low, high in (("clip", 0, 1), ("gamma", 0, 1), ("lam", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"ppo.{name} is {getattr(self, name)}; it must lie between {low} and {high}")


def no_end_score(score_S: Tensor, done_S: Tensor, replacement: float) -> Tensor:
    """Scores where a response that never ended gets `replacement` *instead of* its score (the EOS trick:
    without it length creeps up to the limit). Stiennon et al. 2020; not a penalty to subtract."""
    return torch.where(done_S, score_S, torch.full_like(score_S, replacement))


def shape_rewards(
    score_S: Tensor, logp_R: Tensor, ref_logp_R: Tensor, lengths: Sequence[int], kl_coefficient: float
) -> Tensor:
    """reward_R: -beta k1 on every action, plus the score once, on the last. Sum per episode = score - beta
    sum k1."""
    assert min(lengths, default=1) > 0, "an episode has at least one action"
    reward_R = -kl_coefficient * (logp_R - ref_logp_R)
    last_S = torch.tensor(lengths, dtype=torch.int64, device=reward_R.device).cumsum(0) - 1
    return reward_R.index_add(0, last_S, score_S.to(reward_R.dtype))


def policy_loss(
    logp_R: Tensor,
    old_logp_R: Tensor,
    adv_R: Tensor,
    normaliser: float,
    cfg: Config,
    entropy_R: Tensor | None = None,
) -> Loss:
    """Clipped surrogate, eq. 7: sum max(-A ratio, -A clip(ratio, 1 +- eps)) / normaliser, [R] inputs ->
    scalar.

    Stats (already divided by the normaliser, so micro batches add up): approxkl = mean k3 of old against new,
    """
    log_ratio_R = torch.clamp(logp_R - old_logp_R, -_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP)
    ratio_R = torch.exp(log_ratio_R)
    plain_R = -adv_R * ratio_R
    clipped_R = -adv_R * torch.clamp(ratio_R, 1.0 - cfg.clip, 1.0 + cfg.clip)
    loss_R = torch.maximum(plain_R, clipped_R)
    if cfg.dual_clip > 0:
        loss_R = torch.where(adv_R < 0, torch.minimum(loss_R, -cfg.dual_clip * adv_R), loss_R)
    value = loss_R.sum() / normaliser
    with torch.no_grad():
        stats = {
            "policy_loss": value.detach(),
            "approxkl": (torch.expm1(log_ratio_R) - log_ratio_R).sum() / normaliser,
            "clipfrac": (clipped_R > plain_R).sum() / normaliser,
        }
    if entropy_R is not None:
        stats["entropy"] = entropy_R.detach().sum() / normaliser
        if cfg.entropy:
            value = value - cfg.entropy * entropy_R.sum() / normaliser
    return Loss(value, stats)


def value_loss(
    value_R: Tensor, old_value_R: Tensor, return_R: Tensor, normaliser: float, cfg: Config
) -> Loss:
    """Half the worse of the squared errors of V and of V clipped to the old value +- value_clip."""
    error_R = (value_R - return_R).square()
    stats: dict[str, Tensor] = {}
    if cfg.value_clip > 0:
        near_R = old_value_R + torch.clamp(value_R - old_value_R, -cfg.value_clip, cfg.value_clip)
        near_error_R = (near_R - return_R).square()
        with torch.no_grad():
            stats["value_clipfrac"] = (near_error_R > error_R).sum() / normaliser
        error_R = torch.maximum(error_R, near_error_R)
    value = 0.5 * error_R.sum() / normaliser
    return Loss(value, {"value_loss": value.detach(), **stats})


def ratio_error(logp_R: Tensor, old_logp_R: Tensor) -> float:
    """max |ratio - 1|: exactly 0 on the first minibatch of a rollout, or training and sampling-time policies
    differ."""
    if logp_R.numel() == 0:
        return 0.0
    return float(torch.expm1(logp_R.detach() - old_logp_R).abs().max())

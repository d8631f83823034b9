"""From token rewards to advantages: generalised advantage estimation and whitening.

Schulman et al. 2015 (arXiv 1506.02438), eq. 16, for episodes that end:

    delta_t = r_t + gamma V_{t+1} - V_t,        V after the last action = 0
    A_t     = delta_t + gamma lambda A_{t+1},   return_t = A_t + V_t

Everything is flat and ragged, with explicit lengths: nothing after the end of a response exists, so nothing
from there can leak back.

Shapes: R response tokens of all episodes end to end, S episodes, T longest episode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gae(
    reward_R: Tensor, value_R: Tensor, lengths: Sequence[int], *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(advantage_R, return_R). `value_R[t]` is the value of the state *before* action t; the state after the
    last action is worth 0. Returns are made from the raw advantages: whiten afterwards."""
    assert reward_R.shape == value_R.shape and sum(lengths) == reward_R.shape[0], (
        "rewards, values, lengths disagree"
    )
    size_S = torch.tensor(lengths, dtype=torch.int64, device=reward_R.device)
    steps = max(lengths, default=0)
    inside_ST = torch.arange(steps, device=reward_R.device)[None, :] < size_S[:, None]
    reward_ST = reward_R.new_zeros(inside_ST.shape).masked_scatter(inside_ST, reward_R)
    value_ST = value_R.new_zeros(inside_ST.shape).masked_scatter(inside_ST, value_R)
    adv_ST = torch.zeros_like(reward_ST)
    # Beyond its end an episode has reward 0 and value 0, so the recursion starts from 0 at its own last
    # action.
    next_adv_S = next_value_S = reward_R.new_zeros(len(lengths))
    for t in reversed(range(steps)):
        delta_S = reward_ST[:, t] + gamma * next_value_S - value_ST[:, t]
        next_adv_S = delta_S + gamma * lam * next_adv_S
        next_value_S = value_ST[:, t]
        adv_ST[:, t] = next_adv_S
    adv_R = adv_ST[inside_ST]
    return adv_R, adv_R + value_R


def whiten(
    x_R: Tensor,
    mask_R: Tensor | None = None,
    *,
    shift_mean: bool = True,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(x - mean) / sqrt(population variance + 1e-8) over the entries of `mask_R` (all by default); 0
    elsewhere.

    `total` sums a tensor over all ranks, so that the moments are those of the whole rollout: whitening a
    minibatch by its own moments would change the objective from one minibatch to the next. Without
    `shift_mean` the mean stays where it was (a shift of rewards would pay every token a constant: reward for
    length).
    """
    mask = torch.ones_like(x_R) if mask_R is None else mask_R.to(x_R.dtype)
    add = total or (lambda t: t)
    count, first = add(torch.stack([mask.sum(), (x_R * mask).sum()])).unbind()
    count = count.clamp(min=1.0)
    mean = first / count
    variance = add(((x_R - mean).square() * mask).sum()) / count
    white = (x_R - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * mask


def explained_variance(value_R: Tensor, return_R: Tensor) -> Tensor:
    """1 - Var(return - value) / Var(return): 1 is a perfect critic, 0 one as good as a constant, below 0
    worse."""
    return 1.0 - (return_R - value_R).var(correction=0) / return_R.var(correction=0).clamp(min=1e-8)

"""What trained models say about given tokens: log-probs, rewards, values. The counterpart of generation.

Old, new and reference log-probs, for PPO and DPO alike, come from `logprobs`: one packed forward, the head on
the supervised positions only, one temperature. Called twice with the same batch and weights it gives the same
bits, which is what makes a PPO ratio exactly 1 on the first minibatch and a DPO loss exactly ln 2 on the
first step.

Shapes: N flat tokens, S segments, R positions with weight (response tokens), D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from caravan.algos.logprobs import token_logprobs
from caravan.model.decoder import Decoder
from caravan.model.flat import hidden_states
from caravan.model.heads import RewardModel
from caravan.types import Batch

M = TypeVar("M", bound=nn.Module)


def supervised(batch: Batch) -> tuple[Tensor, tuple[int, ...]]:
    """Index [R] of the positions with weight, and how many of them each segment has."""
    index_R = batch.weight_N.nonzero().squeeze(1)
    per_segment = [int((part > 0).sum()) for part in batch.weight_N.cpu().split(list(batch.lengths))]
    return index_R, tuple(per_segment)


def logprobs(
    model: Decoder, batch: Batch, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(logp_R, entropy_R or None) of the targets that carry weight, in order, float32, differentiable.

    The log-prob of the token at position t is read at position t - 1, which is where the batch's targets put
    it.
    """
    index_R = batch.weight_N.nonzero().squeeze(1)
    hidden_ND, _ = hidden_states(model, batch)
    out = token_logprobs(
        hidden_ND.index_select(0, index_R),
        model.head_weight(),
        batch.targets_N.index_select(0, index_R),
        temperature,
        entropy=entropy,  # type: ignore[call-overload]
        **model.head_terms,
    )
    return out if entropy else (out, None)


def values(model: RewardModel, batch: Batch) -> Tensor:
    """value_R: the critic's value of the state before each response token, float32, differentiable."""
    return model.values(batch).index_select(0, batch.weight_N.nonzero().squeeze(1))


def rewards(model: RewardModel, batch: Batch) -> Tensor:
    """score_S at the last token of each segment, which for a finished answer is its end-of-turn token."""
    return model.scores(batch)


def frozen(model: M, dtype: torch.dtype, device: torch.device) -> M:
    """A model that is only asked: no gradients, evaluation mode, weights in `dtype`; score heads, and
    what a module lists in FP32, stay float32."""
    model = model.to(device).requires_grad_(False).eval()
    for name, module in model.named_modules():
        if not isinstance(model, RewardModel) or not name.startswith("score"):
            for leaf, parameter in module.named_parameters(recurse=False):
                if leaf not in getattr(module, "FP32", ()):
                    parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def asked(*models: nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode for a while: dropout in one of two forwards would make their ratio
    differ."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)

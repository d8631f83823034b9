"""Heads on hidden states: rewards of whole answers, values of single tokens, labels of sequences.

N flat tokens, S segments, D width, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from caravan.model.activations import ACTIVATIONS
from caravan.model.decoder import Attend
from caravan.model.flat import hidden_states
from caravan.types import Batch, UserError


class ScoreHead(nn.Module):
    """score = w . h - bias, in fp32 whatever the decoder computes in.

    `bias` is a buffer, not trained: it centres scores on references after training (Ouyang et al. 2022,
    arXiv:2203.02155, normalise so that demonstrations score 0). w starts with std 1 / sqrt(D + 1) (Stiennon
    et al. 2020, arXiv:2009.01325).
    """

    weight: nn.Parameter
    bias: Tensor

    def __init__(self, d: int, bias: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, d, generator=generator) * (d + 1) ** -0.5)
        self.register_buffer("bias", torch.tensor(bias, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [...] fp32."""
        return (hidden.float() @ self.weight.float().squeeze(0)) - self.bias


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """How an encoder's states become one vector per sequence."""

    act: Literal["tanh", "gelu"] | None
    """Activation behind a matrix of their own; None: there is no such matrix."""
    reads: Literal["first", "last"]
    """The token that stands for its sequence."""


class PooledHead(nn.Module):
    """labels = W act(P h) + b, in fp32 whatever the encoder computes in; a reward is the one label - bias.

    `bias` is a buffer, as in `ScoreHead`. Fresh weights: P normal with std 0.02 (BERT's), W as `ScoreHead`'s,
    offsets 0.
    """

    bias: Tensor

    def __init__(
        self, d: int, pool: Pool, labels: int = 1, bias: float = 0.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.reads, self.count = pool.reads, labels
        self.pool = nn.Linear(d, d) if pool.act else None
        self.act = ACTIVATIONS[pool.act] if pool.act else None
        self.score = nn.Linear(d, labels)
        with torch.no_grad():
            for linear, std in ((self.pool, 0.02), (self.score, (d + 1) ** -0.5)):
                if linear is not None:
                    linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * std)
                    linear.bias.zero_()
        self.register_buffer("bias", torch.tensor(bias, dtype=torch.float32))

    def labels(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., L] fp32."""
        hidden = hidden.float()
        if self.pool is not None and self.act is not None:
            hidden = self.act(self.pool(hidden))
        return self.score(hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [...] fp32; one label only."""
        return self.labels(hidden).squeeze(-1) - self.bias


class RewardModel(nn.Module):
    """A decoder with a scalar head instead of the vocabulary: reward model and critic alike. Or an encoder
    with a pooled head, which reads its whole input and can be a reward model or classifier, but no critic."""

    def __init__(self, decoder: Any, score: ScoreHead | PooledHead | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self.score = score if score is not None else ScoreHead(decoder.spec.out_dim)

    @property
    def spec(self) -> Any:
        """The decoder's (or encoder's) Spec."""
        return self.decoder.spec

    def forward(self, ids_N: Tensor, pos_N: Tensor, attend: Attend) -> Tensor:
        """Flat tokens -> [N, D] hidden states."""
        return self.decoder(ids_N, pos_N, attend)

    def values(self, batch: Batch) -> Tensor:
        """[N] fp32: the head at every token. Raises UserError for an encoder."""
        if isinstance(self.score, PooledHead):
            raise UserError(
                "an encoder reads the whole answer before it judges the first token: it cannot be the critic",
                "train the reward model on a decoder, for example on the policy's own base",
            )
        return self.score(hidden_states(self, batch)[0])

    def scores(self, batch: Batch) -> Tensor:
        """[S] fp32: the head at the last token of every segment; an encoder's, at the token it pools."""
        return self.score(self._read(batch))

    def labels(self, batch: Batch) -> Tensor:
        """[S, L] fp32: every label of a classifier, without the bias of a reward."""
        assert isinstance(self.score, PooledHead), "a decoder's scalar head has no labels"
        return self.score.labels(self._read(batch))

    def _read(self, batch: Batch) -> Tensor:
        """[S, D] hidden state of the token that stands for each segment."""
        first = isinstance(self.score, PooledHead) and self.score.reads == "first"
        at_S = torch.tensor(_tokens(batch.lengths, first), device=batch.ids_N.device)
        return hidden_states(self, batch)[0][at_S]


def _tokens(lengths: Sequence[int], first: bool) -> list[int]:
    """Index of the first or last token of every segment."""
    found, start = [], 0
    for length in lengths:
        found.append(start if first else start + length - 1)
        start += length
    return found

"""Scalar heads: rewards of whole answers and values of single tokens.

N flat tokens, S segments, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from caravan.kernels.attention import Segments
from caravan.model.decoder import Attend, Decoder
from caravan.types import Batch


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


class RewardModel(nn.Module):
    """A decoder with a scalar head instead of the vocabulary: reward model and critic alike."""

    def __init__(self, decoder: Decoder, score: ScoreHead | None = None) -> None:
        super().__init__()
        self.decoder = decoder
        self.score = score if score is not None else ScoreHead(decoder.spec.d)

    def forward(self, ids_N: Tensor, pos_N: Tensor, attend: Attend) -> Tensor:
        """Flat tokens -> [N, D] hidden states."""
        return self.decoder(ids_N, pos_N, attend)

    def values(self, batch: Batch) -> Tensor:
        """[N] fp32: the head at every token."""
        attend = Segments(batch.lengths, batch.ids_N.device)
        return self.score(self(batch.ids_N, batch.pos_N, attend))

    def scores(self, batch: Batch) -> Tensor:
        """[S] fp32: the head at the last token of every segment."""
        attend = Segments(batch.lengths, batch.ids_N.device)
        last_S = torch.tensor(batch.lengths, device=batch.ids_N.device).cumsum(0) - 1
        return self.score(self(batch.ids_N, batch.pos_N, attend)[last_S])

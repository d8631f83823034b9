"""Where a token is, as numbers: rotary angles and sinusoidal tables.

N flat tokens, S segments, F rotary frequencies, P streams of positions.

Frequencies are functions of a frozen Rope, in fp32, and never buffers of a module: `.to(bfloat16)` must not
hit them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from caravan.model.spec import Rope, RopeScaling

Angles = list[tuple[Tensor, ...]]
"""cos and sin, each [N, F] in fp32, of every distinct Rope of a model; with `log_from` also the [N, 1, 1]
factors of its queries."""


def inverse_frequencies(rope: Rope) -> tuple[Tensor, float]:
    """[F] angles per position in fp32, and the factor on cos and sin; of a Rope that depends on the length
    those of a short sequence.

    linear: Chen et al. 2023 (arXiv:2306.15595); llama3: Llama 3 release; yarn: Peng et al. 2023
    (arXiv:2309.00071); dynamic, powers, longrope: see `by_length`.
    """
    if rope.sections:
        parts = [_plain(2 * count, rope.theta) for count in rope.sections]
        assert rope.scaling is None and 2 * sum(rope.sections) == rope.dim, rope
        inv_F = torch.cat(parts)
        return inv_F.half().float() if rope.fp16_frequencies else inv_F, 1.0
    inv_F = _plain(rope.dim, rope.theta)
    scaling = rope.scaling
    if scaling is None or scaling.kind in ("dynamic", "powers"):
        return inv_F, 1.0
    if scaling.kind == "linear":
        return inv_F / scaling.factor, 1.0
    if scaling.kind == "llama3":
        turns_F = scaling.original_context * inv_F / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep_F = ((turns_F - low) / (high - low)).clamp(0, 1)
        return inv_F * (keep_F + (1 - keep_F) / scaling.factor), 1.0
    if scaling.kind == "longrope":
        return inv_F / torch.tensor(scaling.short_factor), _longrope_factor(scaling)
    return _yarn(rope, scaling, inv_F)


def _plain(dim: int, theta: float) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))


def _longrope_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_context))


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """0.1 m ln(factor) + 1: YaRN's correction of the softmax temperature."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(rope: Rope, scaling: RopeScaling, inv_F: Tensor) -> tuple[Tensor, float]:
    def dimension(turns: float) -> float:
        original = scaling.original_context / (turns * 2 * math.pi)
        return rope.dim * math.log(original) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    # an original context of a few tokens ends before it begins: transformers then stretches nothing
    ramp_F = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    stretch_F = ramp_F.clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = yarn_scale(scaling.factor)
        if scaling.mscale and scaling.mscale_all_dim:
            factor = yarn_scale(scaling.factor, scaling.mscale) / yarn_scale(
                scaling.factor, scaling.mscale_all_dim
            )
    return inv_F * (1 - stretch_F) + inv_F / scaling.factor * stretch_F, factor


def by_length(rope: Rope, pos_N: Tensor, lengths: Sequence[int]) -> tuple[Tensor, float]:
    """[N, F] angles per position of a Rope whose frequencies depend on the sequence's length L, which is the
    last position of each segment plus one. dynamic (NTK-aware scaling with the current length): base times
    (s L / C - (s - 1))^(d / (d - 2)) beyond the original context C; powers (Bai et al. 2023,
    arXiv:2309.16609): (2^(k + 1) - 1)^(d / (d - 2)) with 2^k C the least such length that holds L; longrope
    (Ding et al. 2024, arXiv:2402.13753): other divisors beyond it.

    A sequence that grows past C is rotated by other numbers than its shorter beginnings were: such models are
    not causally consistent, by design.
    """
    scaling = rope.scaling
    assert scaling is not None
    ends = torch.tensor(lengths).cumsum(0) - 1
    last_N = ends.repeat_interleave(torch.tensor(lengths), output_size=sum(lengths)).to(pos_N.device)
    length_N1 = (pos_N[last_N] + 1)[:, None].float()
    inv_F = _plain(rope.dim, rope.theta).to(pos_N.device)
    if scaling.kind == "longrope":
        short_F, long_F = (
            torch.tensor(x, device=pos_N.device) for x in (scaling.short_factor, scaling.long_factor)
        )
        divisors_NF = torch.where(length_N1 > scaling.original_context, long_F, short_F)
        return inv_F / divisors_NF, _longrope_factor(scaling)
    if scaling.kind == "powers":
        stretch_N1 = 2 * (length_N1 / scaling.original_context).ceil().log2().ceil().exp2() - 1
    else:
        over_N1 = (length_N1 / scaling.original_context).clamp(min=1.0)
        stretch_N1 = scaling.factor * over_N1 - (scaling.factor - 1)
    exponent_F = torch.arange(0, rope.dim, 2, device=pos_N.device) / (rope.dim - 2)
    return inv_F / stretch_N1**exponent_F, 1.0


def log_growth(pos_N: Tensor, log_from: int) -> Tensor:
    """[N, 1, 1] fp32 factors of queries: ln(p + 1) / ln(log_from) at positions p >= log_from, 1 before."""
    return ((pos_N + 1).clamp(min=log_from).float().log() / math.log(log_from))[:, None, None]


def two_streams(pos_N: Tensor, lengths: Sequence[int], prefix: Sequence[int]) -> Tensor:
    """[2, N] positions of a prefix model: min(pos, p - 1) and max(pos - p + 1, 0) (Du et al. 2022,
    arXiv:2103.10360, where the text to generate fills one blank at the end of its prompt)."""
    size = torch.tensor([*prefix], device=pos_N.device)
    which = torch.tensor([s for s, n in enumerate(lengths) for _ in range(n)], device=pos_N.device)
    p_N = size[which]
    return torch.stack([torch.minimum(pos_N, (p_N - 1).clamp(min=0)), (pos_N - p_N + 1).clamp(min=0)])


def sinusoid(pos_N: Tensor, d: int) -> Tensor:
    """[N, d] fp32: sines then cosines of geometrically spaced frequencies from 1 to 1e-4 (Vaswani et al.
    2017, arXiv:1706.03762, in fairseq's layout)."""
    half = d // 2
    inv_F = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10_000.0) / (half - 1)))
    angle_NF = pos_N[:, None].float() * inv_F.to(pos_N.device)
    table = torch.cat([angle_NF.sin(), angle_NF.cos()], 1)
    return table if d % 2 == 0 else torch.nn.functional.pad(table, (0, 1))

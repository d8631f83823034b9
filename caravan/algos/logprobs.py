"""Log-probabilities of given tokens: the one function behind old, new and reference log-probs, PPO and DPO
alike.

    log p(y | h) = z_y - logsumexp(z),      z = s (h W^T + b) / T,  or c tanh(s (h W^T + b) / c) / T

Always in float32 (float64 stays float64): rounding of a bf16 log-softmax is larger than the KL signal that is
read from it. The [N, V] logits are never held: a chunk of rows at a time is made, reduced and dropped, and
the backward pass makes it again. `token_logprobs_reference` is the same in three lines, with all the memory.

Every caller passes the temperature of its sampler; with another one the PPO ratio is not 1 at the first step
and the KL is that of another policy.

Shapes: N tokens, S segments, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from caravan.algos.lm import softcap_

_CHUNK_ELEMENTS = 1 << 22
"""Logits alive at once: 16 MiB in float32. A small vocabulary still gets rows enough for a fast product."""


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class _Shape:
    """What turns h W^T + b into the logits that are normalised."""

    temperature: float
    scale: float
    softcap: float | None

    @property
    def divisor(self) -> float:
        """Inverse of the constant part of dz / d(h W^T + b)."""
        return self.temperature / self.scale

    def logits(self, hidden: Tensor, weight: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """z in the dtype of `weight`, which is the accurate one, and the slope of the cap if there is one."""
        z = hidden.to(weight.dtype) @ weight.T
        if bias_V is not None:
            z += bias_V.to(z.dtype)
        if self.softcap is None:
            return (z.div_(self.divisor) if self.divisor != 1.0 else z), None
        slope = softcap_(z.mul_(self.scale), self.softcap)
        return z.div_(self.temperature), slope


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps logsumexp and entropy per row (2 N numbers); backward rebuilds the logits chunk by
    chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        shape: _Shape,
        chunk: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = _accurate(hidden_ND.dtype)
        weight = weight_VD.to(dtype)
        n = hidden_ND.shape[0]
        logp_N = hidden_ND.new_empty(n, dtype=dtype)
        lse_N = torch.empty_like(logp_N)
        entropy_N = torch.zeros_like(logp_N)
        for a in range(0, n, chunk):
            b = min(a + chunk, n)
            z, _ = shape.logits(hidden_ND[a:b], weight, bias_V)
            torch.logsumexp(z, dim=1, out=lse_N[a:b])
            logp_N[a:b] = z.gather(1, targets_N[a:b, None]).squeeze(1) - lse_N[a:b]
            if entropy:
                p = torch.exp(z - lse_N[a:b, None])
                entropy_N[a:b] = lse_N[a:b] - (p * z).sum(1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, lse_N, entropy_N)
        ctx.shape, ctx.chunk, ctx.entropy = shape, chunk, entropy
        ctx.set_materialize_grads(False)  # entropy is often only looked at: no gradient of zeros for it
        if not entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, g_logp_N: Tensor | None, g_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_ND, weight_VD, bias_V, targets_N, lse_N, entropy_N = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype, n = lse_N.dtype, hidden_ND.shape[0]
        if g_logp_N is None:
            g_logp_N = torch.zeros_like(lse_N)
        weight = weight_VD.to(dtype)
        g_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        g_weight = torch.zeros_like(weight) if need_weight else None
        g_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if need_bias else None
        for a in range(0, n, ctx.chunk):
            b = min(a + ctx.chunk, n)
            z, slope = ctx.shape.logits(hidden_ND[a:b], weight, bias_V)
            g = g_logp_N[a:b, None]
            logp = z.sub_(lse_N[a:b, None])
            p = torch.exp(logp)
            if ctx.entropy and g_entropy_N is not None:  # dH/dz = -p (log p + H)
                gz = -p * (g + g_entropy_N[a:b, None] * (logp + entropy_N[a:b, None]))
            else:
                gz = p.mul_(-g)
            gz.scatter_add_(1, targets_N[a:b, None], g)
            if slope is not None:
                gz.mul_(slope)
            if ctx.shape.divisor != 1.0:
                gz.div_(ctx.shape.divisor)
            # The two products of the gradient run in the model's own dtype: they are averaged, not
            # exponentiated.
            low = gz.to(hidden_ND.dtype)
            if g_hidden is not None:
                torch.mm(low, weight_VD.to(low.dtype), out=g_hidden[a:b])
            if g_weight is not None:
                g_weight += low.T @ hidden_ND[a:b]
            if g_bias is not None:
                g_bias += gz.sum(0)
        return (
            g_hidden,
            None if g_weight is None else g_weight.to(weight_VD.dtype),
            None if g_bias is None else g_bias.to(bias_V.dtype),
            None,
            None,
            None,
            None,
        )


@overload
def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float = ...,
    entropy: Literal[False] = ...,
    *,
    bias_V: Tensor | None = ...,
    scale: float = ...,
    softcap: float | None = ...,
    chunk: int | None = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float = ...,
    *,
    entropy: Literal[True],
    bias_V: Tensor | None = ...,
    scale: float = ...,
    softcap: float | None = ...,
    chunk: int | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Natural log-probability of `targets_N` under softmax(z), differentiable.

    z = scale (hidden W^T + b) / temperature; a `softcap` c makes it c tanh(scale (hidden W^T + b) / c) /
    temperature.

    Returns logp_N float32 (float64 for float64 input); with `entropy` also entropy_N = lse - sum p z,
    differentiable too. `chunk` is rows at once (default: as many as fit 16 MiB). Pass only the rows you need:
    a response, not a row of the batch.
    """
    assert temperature > 0, "a log-probability needs a temperature above zero"
    assert hidden_ND.ndim == 2 and targets_N.shape == hidden_ND.shape[:1], "one target per row of hidden"
    rows = chunk or max(128, _CHUNK_ELEMENTS // weight_VD.shape[0])
    logp_N, entropy_N = _TokenLogprobs.apply(
        hidden_ND,
        weight_VD,
        bias_V,
        targets_N,
        _Shape(float(temperature), scale, softcap),
        rows,
        entropy,
    )
    return (logp_N, entropy_N) if entropy else logp_N


def token_logprobs_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(logp_N, entropy_N) by log_softmax over whole [N, V] logits: the definition, to test the fast one
    against."""
    dtype = _accurate(hidden_ND.dtype)
    z_NV = hidden_ND.to(dtype) @ weight_VD.to(dtype).T
    z_NV = scale * (z_NV if bias_V is None else z_NV + bias_V.to(dtype))
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    z_NV = z_NV / temperature
    logp_NV = torch.log_softmax(z_NV, dim=1)
    return logp_NV.gather(1, targets_N[:, None]).squeeze(1), -(logp_NV.exp() * logp_NV).sum(1)


def segment_sums(x_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum of each segment: x_N laid out as segments of `lengths` -> [S]. A segment of length 0 sums to 0."""
    assert sum(lengths) == x_N.shape[0], "lengths must cover x"
    size = torch.tensor(lengths, dtype=torch.int64, device=x_N.device)
    index_N = torch.repeat_interleave(
        torch.arange(len(lengths), device=x_N.device), size, output_size=x_N.shape[0]
    )
    return x_N.new_zeros(len(lengths)).index_add(0, index_N, x_N)

"""Next-token cross-entropy that never holds the logits.

    z = hidden @ weight^T + bias,   then z * scale, then cap * tanh(z / cap) where a model has these,
    lse = logsumexp(z),
    loss = sum_n w_n * (lse_n - z_n[target_n] + z_loss * lse_n^2) / normaliser

Rows without weight are dropped first (in supervised fine-tuning most tokens are prompt). The rest goes
through the head in chunks; each chunk's gradient, w/normaliser * (softmax(z) * (1 + 2 z_loss lse) - onehot),
is turned into the gradients of `hidden` and `weight` at once, in the forward pass, so the backward pass only
scales them. Memory is one chunk of logits instead of [N, V]. (The idea: Hsu et al. 2024, arXiv 2410.10989;
z-loss: Chowdhery et al. 2022, arXiv 2204.02311, section 5.)

Shapes: N flat tokens, M supervised tokens, C tokens of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from caravan.types import Loss

_CHUNK_ELEMENTS = 1 << 21
"""Logits of one chunk: 8 MB in fp32, so the softmax passes run in the cache of a CPU."""
_CHUNK_BYTES_CUDA = 1 << 26


def cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weight_N: Tensor,
    normaliser: float,
    chunk: int | None = None,
    z_loss: float = 0.0,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Loss:
    """Weighted mean negative log-likelihood, in nats, of `targets_N` under the softmax of z.

    `normaliser` is the sum of weights of the WHOLE optimiser step, over all micro batches and ranks: the
    values of the micro batches then add up to the loss of the step however it was cut. `chunk` is tokens per
    chunk (None: chosen from V). Gradients flow to hidden, weight and bias. Stats (sums, to be added up):
    `nll`, `tokens` (sum of weights) and `correct` (weighted count of argmax hits), all float32 scalars.
    """
    index_M = weight_N.nonzero().squeeze(1)
    rows = weight_N.numel()
    w_M = weight_N.float()
    if index_M.numel() < rows:
        hidden_ND = hidden_ND.index_select(0, index_M)
        targets_N = targets_N.index_select(0, index_M)
        w_M = w_M.index_select(0, index_M)
    if chunk is None:
        elements = _CHUNK_ELEMENTS if hidden_ND.device.type == "cpu" else _CHUNK_BYTES_CUDA
        chunk = max(128, elements // weight_VD.shape[0])
    value, nll, correct = _LinearCrossEntropy.apply(
        hidden_ND,
        weight_VD,
        bias_V,
        targets_N,
        w_M,
        float(normaliser),
        chunk,
        z_loss,
        scale,
        softcap,
        torch.is_grad_enabled(),
    )
    return Loss(value, {"nll": nll, "tokens": w_M.sum(), "correct": correct})


def cross_entropy_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weight_N: Tensor,
    normaliser: float,
    z_loss: float = 0.0,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The same scalar from all logits at once: slow and large, for tests."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    logits_NV = (hidden_ND @ weight_VD.t()).to(dtype)
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(dtype)
    logits_NV = logits_NV * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    lse_N = torch.logsumexp(logits_NV, -1)
    nll_N = lse_N - logits_NV.gather(1, targets_N[:, None]).squeeze(1)
    return ((nll_N + z_loss * lse_N.square()) * weight_N.to(dtype)).sum() / normaliser


def softcap_(z: Tensor, cap: float | None) -> Tensor | None:
    """z becomes cap * tanh(z / cap) in place; returns the slope, 1 - tanh^2, or None where there is no cap
    (Gemma 2, arXiv:2408.00118)."""
    if cap is None:
        return None
    slope = 1.0 - z.div_(cap).tanh_().square()
    z.mul_(cap)
    return slope


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden_MD,
        weight_VD,
        bias_V,
        targets_M,
        w_M,
        normaliser,
        chunk,
        z_loss,
        scale,
        softcap,
        grad_enabled,
    ):
        dtype = torch.promote_types(hidden_MD.dtype, torch.float32)
        rows = hidden_MD.shape[0]
        need_h = grad_enabled and hidden_MD.requires_grad
        need_w = grad_enabled and weight_VD.requires_grad
        need_b = grad_enabled and bias_V is not None and bias_V.requires_grad
        grad_h = torch.empty_like(hidden_MD) if need_h else None
        grad_w = torch.zeros(weight_VD.shape, dtype=dtype, device=weight_VD.device) if need_w else None
        grad_b = torch.zeros(bias_V.shape, dtype=dtype, device=bias_V.device) if need_b else None
        value, nll, correct = (torch.zeros((), dtype=dtype, device=hidden_MD.device) for _ in range(3))
        for a in range(0, rows, chunk):
            b = min(a + chunk, rows)
            h_CD, t_C1, w_C = hidden_MD[a:b], targets_M[a:b, None], w_M[a:b].to(dtype)
            z_CV = (h_CD @ weight_VD.t()).to(dtype)
            if bias_V is not None:
                z_CV += bias_V
            if scale != 1.0:
                z_CV.mul_(scale)
            slope_CV = softcap_(z_CV, softcap)
            z_target_C = z_CV.gather(1, t_C1).squeeze(1)
            top_C = z_CV.amax(1)
            p_CV = z_CV.sub_(top_C[:, None]).exp_()
            sum_C = p_CV.sum(1)
            lse_C = sum_C.log() + top_C
            nll_C = (lse_C - z_target_C) * w_C
            nll += nll_C.sum()
            value += nll_C.sum() + (z_loss * lse_C.square() * w_C).sum() if z_loss else nll_C.sum()
            correct += ((z_target_C == top_C) * w_C).sum()
            if not (need_h or need_w or need_b):
                continue
            scale_C = w_C / normaliser
            factor_C = scale_C * (1.0 + 2.0 * z_loss * lse_C) if z_loss else scale_C
            p_CV.mul_((factor_C / sum_C)[:, None])
            p_CV.scatter_add_(1, t_C1, -scale_C[:, None])
            if slope_CV is not None:
                p_CV.mul_(slope_CV)
            if scale != 1.0:
                p_CV.mul_(scale)
            if grad_b is not None:
                grad_b += p_CV.sum(0)
            g_CV = p_CV.to(hidden_MD.dtype)
            if grad_h is not None:
                torch.mm(g_CV, weight_VD, out=grad_h[a:b])
            if grad_w is not None:
                grad_w += g_CV.t() @ h_CD
        ctx.grads = (grad_h, grad_w, grad_b)
        ctx.mark_non_differentiable(nll, correct)
        return value / normaliser, nll, correct

    @staticmethod
    def backward(ctx, grad_value, *_unused):  # type: ignore[no-untyped-def]
        if ctx.grads is None:
            raise RuntimeError(
                "cross_entropy: backward twice; the gradients are made once, in the forward pass"
            )
        (grad_h, grad_w, grad_b), ctx.grads = ctx.grads, None
        unit = grad_value.device.type == "cpu" and grad_value.item() == 1.0
        scaled = [g if g is None or unit else g.mul_(grad_value) for g in (grad_h, grad_w, grad_b)]
        return (*scaled, *[None] * 8)

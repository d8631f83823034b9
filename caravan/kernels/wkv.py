"""The recurrences of RWKV-4 to RWKV-7 ("wkv"), in chunks, beside the loops that define them.

N flat tokens, S segments, D channels, H heads, K key width (also that of receptance and decay), V value
width; M chunks of C tokens (kernels/chunks.py). Everything is computed in fp32 or wider.

RWKV-4 (Peng et al. 2023, arXiv:2305.13048, eq. 14-18): a running average of values, weights e^k that decay
by e^w per token, the current token with its own bonus u:
    y_t = (n_{t-1} + e^{u+k_t} v_t) / (d_{t-1} + e^{u+k_t}),   n_t = e^w n_{t-1} + e^{k_t} v_t,   d_t likewise
Keys are unbounded, so both sums are kept relative to the largest exponent so far.

RWKV-5 and 6 (Peng et al. 2024, arXiv:2404.05892, eq. 19): a matrix state that decays per key channel,
    y_t = r_t' (S_{t-1} + diag(u) k_t v_t'),   S_t = diag(w_t) S_{t-1} + k_t v_t'

RWKV-7 (Peng et al. 2025, arXiv:2503.14456, eq. 17): the state is corrected along a learned direction, too,
    S_t = S_{t-1} (diag(w_t) + a_t b_t') + v_t k_t',   y_t = S_t r_t
where S is [V, K], a = -kk and b = kk times the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from caravan.kernels.chunks import Chunks, carry, plan, wide

WKV_CHUNK = 32
NOTHING = -1e38
"""Exponent of a sum of nothing: finite, so that no difference of exponents is NaN."""


def empty_state(segments: int, like: Tensor) -> Tensor:
    """[S, 3, D] numerator, denominator and largest exponent of RWKV-4 before the first token."""
    return like.new_tensor([0.0, 0.0, NOTHING])[:, None].expand(segments, 3, like.shape[-1]).contiguous()


def reference_wkv4(
    lengths: Sequence[int], w_D: Tensor, u_D: Tensor, k_ND: Tensor, v_ND: Tensor, first_S3D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token -> outputs [N, D] and last states [S, 3, D]. `w_D` is the log-decay."""
    first_S3D = empty_state(len(lengths), k_ND) if first_S3D is None else first_S3D
    outputs, last, t = [], [], 0
    for s, length in enumerate(lengths):
        num, den, top = first_S3D[s].unbind(0)
        for k, v in zip(k_ND[t : t + length], v_ND[t : t + length], strict=True):
            peak = torch.maximum(top, u_D + k)
            old, new = torch.exp(top - peak), torch.exp(u_D + k - peak)
            outputs.append((old * num + new * v) / (old * den + new))
            peak = torch.maximum(top + w_D, k)
            old, new = torch.exp(top + w_D - peak), torch.exp(k - peak)
            num, den, top = old * num + new * v, old * den + new, peak
        t += length
        last.append(torch.stack([num, den, top]))
    return torch.stack(outputs), torch.stack(last)


def wkv4(
    lengths: tuple[int, ...],
    w_D: Tensor, u_D: Tensor, k_ND: Tensor, v_ND: Tensor,
    first_S3D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same as the reference, parallel within and among chunks; fp32 or wider."""
    chunks = plan(lengths, WKV_CHUNK, k_ND.device)
    k, v = wide(k_ND), wide(v_ND)
    first = empty_state(len(lengths), k) if first_S3D is None else first_S3D
    return _recomputed(_wkv4, chunks, wide(w_D), wide(u_D), k, v, first)


def _recomputed(function, chunks: Chunks, *inputs: Tensor):  # type: ignore[no-untyped-def]
    """Call a function of tensors that keeps nothing but its inputs for the backward pass."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return checkpoint(function, chunks, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(chunks, *inputs)


Sums = tuple[Tensor, Tensor, Tensor]
"""Numerator and denominator divided by e^top, and top. The exponent cancels in every result, so that no
gradient goes through it."""


def _join(old: Sums, decay: Tensor, new: Sums) -> Sums:
    """Sums of what lies further back, decayed by e^decay, and of what came since."""
    top = torch.maximum(old[2] + decay, new[2]).detach()
    left, right = torch.exp(old[2] + decay - top), torch.exp(new[2] - top)
    return left * old[0] + right * new[0], left * old[1] + right * new[1], top


def _wkv4(chunks: Chunks, w: Tensor, u: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    real = chunks.tokens(k.dtype).unsqueeze(-1)
    since = real.cumsum(1)  # [M, C, 1] tokens of the chunk so far: a place without a token does not decay
    key, value = chunks.spread(k) * real + NOTHING * (1 - real), chunks.spread(v)
    top = key.detach()
    weight = torch.exp(key - top)
    sums: Sums = weight * value, weight, top
    span = 1
    while span < chunks.size:
        old, new = (tuple(t[:, part] for t in sums) for part in (slice(None, -span), slice(span, None)))
        joined = _join(old, (since[:, span:] - since[:, :-span]) * w, new)  # type: ignore[arg-type]
        sums = tuple(torch.cat([t[:, :span], j], 1) for t, j in zip(sums, joined, strict=True))  # type: ignore[assignment]
        span *= 2

    def step(state: Tensor, part: slice) -> Tensor:
        alone: Sums = tuple(t[part, -1] for t in sums)  # type: ignore[assignment]
        return torch.stack(_join(state.unbind(1), since[part, -1] * w, alone), 1)  # type: ignore[arg-type]

    before, last = carry(chunks, first, step)
    none = torch.zeros_like(top[:, :1])
    shifted: Sums = tuple(
        torch.cat([fill, t[:, :-1]], 1) for fill, t in zip((none, none, none + NOTHING), sums, strict=True)
    )  # type: ignore[assignment]
    past = _join(before.unsqueeze(2).unbind(1), (since - real) * w, shifted)  # type: ignore[arg-type]
    # the current token comes with its bonus instead of its decay
    now = torch.exp(u + key - (u + key).detach())
    num, den, _ = _join(past, torch.zeros_like(w), (now * value, now, (u + key).detach()))
    return chunks.collect(num / den), last


def reference_wkv6(
    lengths: Sequence[int],
    r_NHK: Tensor, k_NHK: Tensor, v_NHV: Tensor, w_NHK: Tensor, u_HK: Tensor,
    first_SHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RWKV-5 and 6, token by token -> outputs [N, H, V], last states [S, H, K, V]. `w` is the log-decay."""
    outputs, last, t = [], [], 0
    for s, length in enumerate(lengths):
        S = k_NHK.new_zeros(*k_NHK.shape[1:], v_NHV.shape[-1]) if first_SHKV is None else first_SHKV[s]
        for i in range(t, t + length):
            kv = k_NHK[i, :, :, None] * v_NHV[i, :, None, :]
            outputs.append((r_NHK[i, :, :, None] * (S + u_HK[:, :, None] * kv)).sum(1))
            S = torch.exp(w_NHK[i])[:, :, None] * S + kv
        t += length
        last.append(S)
    return torch.stack(outputs), torch.stack(last)


def wkv6(
    lengths: tuple[int, ...],
    r_NHK: Tensor, k_NHK: Tensor, v_NHV: Tensor, w_NHK: Tensor, u_HK: Tensor,
    first_SHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same as the reference, parallel within and among chunks; fp32 or wider. `w` is the log-decay, <= 0."""
    chunks = plan(lengths, WKV_CHUNK, r_NHK.device)
    r, k, v, w = (wide(t) for t in (r_NHK, k_NHK, v_NHV, w_NHK))
    if first_SHKV is None:
        first_SHKV = k.new_zeros(len(lengths), *k.shape[1:], v.shape[-1])
    return _recomputed(_wkv6, chunks, r, k, v, w, wide(u_HK), first_SHKV)


def _wkv6(
    chunks: Chunks, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """A token of the right half of a block sees one of the left half through the decay from there to the
    block's middle and from the middle to here. Both are <= 0, so no exponential overflows, which one product
    e^(sum to here) e^-(sum to there) over a whole chunk would; blocks of 2, 4, ... C tokens meet all pairs.
    """
    r, k, v, w = (chunks.spread(t).transpose(1, 2) for t in (r, k, v, w))
    y = ((r * u[:, None] * k).sum(-1, keepdim=True)) * v
    # log-decay of a block from its start to before a token, from after a token to its end, and as a whole
    past, rest, total = torch.zeros_like(w), torch.zeros_like(w), w
    half = 1
    while half < chunks.size:
        (past0, past1), (rest0, rest1) = _halves(past, half), _halves(rest, half)
        scores = (_halves(r, half)[1] * past1.exp()) @ (_halves(k, half)[0] * rest0.exp()).transpose(-1, -2)
        seen = scores @ _halves(v, half)[0]
        y = y + torch.stack([torch.zeros_like(seen), seen], 3).flatten(2, 4)
        left, right = total[:, :, 0::2].unsqueeze(3), total[:, :, 1::2].unsqueeze(3)
        past = torch.stack([past0, past1 + left], 3).flatten(2, 4)
        rest = torch.stack([rest0 + right, rest1], 3).flatten(2, 4)
        total = total[:, :, 0::2] + total[:, :, 1::2]
        half *= 2
    gain = (k * rest.exp()).transpose(-1, -2) @ v
    kept = total.squeeze(2).exp().unsqueeze(-1)
    before, last = carry(chunks, first, lambda state, part: state * kept[part] + gain[part])
    y = y + (r * past.exp()) @ before
    return chunks.collect(y.transpose(1, 2)), last


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """[M, H, C, .] -> left and right halves of its blocks, [M, H, blocks, half, .] each."""
    x = x.unflatten(2, (-1, 2, half))
    return x[:, :, :, 0], x[:, :, :, 1]


def reference_wkv7(
    lengths: Sequence[int],
    r_NHK: Tensor, w_NHK: Tensor, k_NHK: Tensor, v_NHV: Tensor, a_NHK: Tensor, b_NHK: Tensor,
    first_SHVK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RWKV-7, token by token -> outputs [N, H, V], last states [S, H, V, K]. `w` is the log-decay."""
    outputs, last, t = [], [], 0
    for s, length in enumerate(lengths):
        heads, width = k_NHK.shape[1:]
        S = k_NHK.new_zeros(heads, v_NHV.shape[-1], width) if first_SHVK is None else first_SHVK[s]
        for i in range(t, t + length):
            moved = (S @ a_NHK[i].unsqueeze(-1)) * b_NHK[i].unsqueeze(1)
            S = S * torch.exp(w_NHK[i]).unsqueeze(1) + moved + v_NHV[i].unsqueeze(-1) * k_NHK[i].unsqueeze(1)
            outputs.append((S @ r_NHK[i].unsqueeze(-1)).squeeze(-1))
        t += length
        last.append(S)
    return torch.stack(outputs), torch.stack(last)


def wkv7(
    lengths: tuple[int, ...],
    r_NHK: Tensor, w_NHK: Tensor, k_NHK: Tensor, v_NHV: Tensor, a_NHK: Tensor, b_NHK: Tensor,
    first_SHVK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same as the reference, parallel within and among chunks; fp32 or wider.

    `w` is the log-decay, in [-1, 0] (RWKV-7 never goes below -e^-0.5): a chunk's decay is a quotient of two
    exponentials of at most 32 steps.
    """
    chunks = plan(lengths, WKV_CHUNK, r_NHK.device)
    r, w, k, v, a, b = (wide(t) for t in (r_NHK, w_NHK, k_NHK, v_NHV, a_NHK, b_NHK))
    if first_SHVK is None:
        first_SHVK = k.new_zeros(len(lengths), k.shape[1], v.shape[-1], k.shape[-1])
    return _recomputed(_wkv7, chunks, r, w, k, v, a, b, first_SHVK)


def _wkv7(
    chunks: Chunks, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """With p_t = S_{t-1} a_t, the state is a decayed sum of p_j b_j' and v_j k_j', and the p of a chunk solve
    (I - T) p = U v + a~ S_0' with T_tj = a_t.(decay j to t-1).b_j, U likewise with k: a triangular system.
    """
    r, w, k, v, a, b = (chunks.spread(t).transpose(1, 2) for t in (r, w, k, v, a, b))
    total = w.cumsum(2)
    half = total[:, :, -1:] / 2  # from the chunk's middle, the exponentials of both ends stay small
    into, back = (total - w - half).exp(), (half - total).exp()
    key, bend = k * back, b * back
    asked, read = a * into, r * (total - half).exp()
    below = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=r.device).tril(-1)
    T = (asked @ bend.transpose(-1, -2)).where(below, 0.0)
    U = (asked @ key.transpose(-1, -2)).where(below, 0.0)
    right = torch.cat([U @ v, a * (total - w).exp()], -1)
    unit = torch.eye(chunks.size, dtype=T.dtype, device=T.device)
    solved = torch.linalg.solve_triangular(unit - T, right, upper=False, unitriangular=True)
    own, turn = solved.split([v.shape[-1], k.shape[-1]], -1)  # p = own + turn S_0'
    end = (total[:, :, -1:] - total).exp()
    gain = own.transpose(-1, -2) @ (b * end) + v.transpose(-1, -2) @ (k * end)
    mix = torch.diag_embed(total[:, :, -1].exp()) + turn.transpose(-1, -2) @ (b * end)
    before, last = carry(chunks, first, lambda state, part: state @ mix[part] + gain[part])
    p = own + turn @ before.transpose(-1, -2)
    upto = below | unit.bool()
    y = (read @ bend.transpose(-1, -2)).where(upto, 0.0) @ p
    y = y + (read @ key.transpose(-1, -2)).where(upto, 0.0) @ v
    y = y + (r * total.exp()) @ before.transpose(-1, -2)
    return chunks.collect(y.transpose(1, 2)), last

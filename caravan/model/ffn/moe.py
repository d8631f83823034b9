"""A mixture of gated experts: a router gives every token to its best K of X experts (Shazeer et al. 2017,
arXiv:1701.06538; Mixtral, Jiang et al. 2024, arXiv:2401.04088; DeepSeek-V3, 2024, arXiv:2412.19437).

N flat tokens, D width, X experts, K experts per token, G groups of experts, M = N * K rows, F inner width of
an expert.

Tokens are sorted by expert and all experts run in two grouped products (kernels/grouped.py): there is no loop
over experts, no capacity and no dropped token, so a token's result depends on that token alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caravan.kernels.glu import swiglu
from caravan.kernels.grouped import combine, dispatch, group, grouped_linear
from caravan.model.activations import ACTIVATIONS
from caravan.model.ffn.glu import GLU
from caravan.model.spec import FFN, MoE, Spec

Routed = Mapping[int, tuple[Tensor, Tensor]]
"""By layer: router probabilities [N, X] in fp32 and chosen experts [N, K]."""


class Router:
    """From logits to the choice and its weights; which knobs there are is settled once.

    score s = softmax or sigmoid of the logits, in fp32. Chosen are the K largest s (+ bias), within the best
    groups if there are groups. Weights: s of the chosen / (their sum + eps) if renorm, times scale. The bias
    moves the choice alone.
    """

    def __init__(self, moe: MoE) -> None:
        assert moe.n_expert % moe.n_group == 0, moe
        assert moe.top_k <= moe.topk_group * (moe.n_expert // moe.n_group), "fewer candidates than choices"
        self.moe = moe
        self.score = _softmax if moe.score == "softmax" else torch.sigmoid
        self.probabilities = _as_is if moe.score == "softmax" else _share
        self.limit = self._grouped if moe.n_group > 1 else _as_is
        self.group_score = _best if moe.group_score == "max" else _best_two
        self.weigh = self._renormed if moe.renorm else self._plain

    def __call__(self, logits_NX: Tensor, bias_X: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[N, X] logits -> probabilities [N, X], weights [N, K], chosen experts [N, K] (int64)."""
        wide = torch.promote_types(logits_NX.dtype, torch.float32)
        score_NX = self.score(logits_NX.to(wide))
        choice_NX = score_NX.detach() if bias_X is None else score_NX.detach() + bias_X.detach()
        chosen_NK = self.limit(choice_NX).topk(self.moe.top_k, -1)[1]
        weight_NK = self.weigh(score_NX.gather(1, chosen_NK))
        return self.probabilities(score_NX), weight_NK, chosen_NK

    def _grouped(self, choice_NX: Tensor) -> Tensor:
        """Minus infinity for every expert outside the best groups."""
        choice_NGX = choice_NX.unflatten(1, (self.moe.n_group, -1))
        best_NG = self.group_score(choice_NGX).topk(self.moe.topk_group, -1)[1]
        out_NG = torch.ones_like(choice_NGX[..., 0], dtype=torch.bool).scatter(1, best_NG, False)
        return choice_NGX.masked_fill(out_NG[..., None], float("-inf")).flatten(1)

    def _plain(self, score_NK: Tensor) -> Tensor:
        return score_NK * self.moe.scale

    def _renormed(self, score_NK: Tensor) -> Tensor:
        return score_NK / (score_NK.sum(-1, keepdim=True) + self.moe.eps) * self.moe.scale


def _nothing(end_X: Tensor) -> None:
    """Choices that nobody asks for are not counted."""


def _as_is(x: Tensor) -> Tensor:
    return x


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _share(score_NX: Tensor) -> Tensor:
    return score_NX / score_NX.sum(-1, keepdim=True)


def _best(choice_NGX: Tensor) -> Tensor:
    return choice_NGX.amax(-1)


def _best_two(choice_NGX: Tensor) -> Tensor:
    return choice_NGX.topk(min(2, choice_NGX.shape[-1]), -1)[0].sum(-1)


class Mixture(nn.Module):
    """sum over the chosen of weight * expert(x), plus the shared expert if there is one.

    Parameters: `router` [X, D]; `router_bias` [X] (never trained by gradient: see `moved_bias`); `xin`
    [X, 2F, D] with gate over up; `xout` [X, D, F]; `shared`, a glu; `shared_gate` [1, D].
    """

    FP32 = ("router_bias",)
    """Parameters that stay fp32 in memory and on disk: it moves by thousandths."""

    def __init__(self, d: int, ffn: FFN) -> None:
        super().__init__()
        moe = ffn.moe
        assert moe is not None, "an FFN of kind moe needs its MoE"
        self.moe, self.route = moe, Router(moe)
        self.router = nn.Linear(d, moe.n_expert, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(moe.n_expert), False) if moe.bias_correction else None
        self.xin = nn.Parameter(torch.empty(moe.n_expert, 2 * moe.d_ff, d).normal_(std=d**-0.5))
        self.xout = nn.Parameter(torch.empty(moe.n_expert, d, moe.d_ff).normal_(std=moe.d_ff**-0.5))
        self.act = ACTIVATIONS[ffn.act]
        self.inner = swiglu if ffn.act == "silu" else self._inner
        self.logits = self._wide_logits if moe.fp32_router else self._logits
        dense = FFN(kind="glu", d_ff=moe.shared_ff, act=ffn.act)
        self.shared = GLU(d, dense) if moe.shared_ff else None
        self.shared_gate = nn.Linear(d, 1, bias=False) if moe.shared_gate else None
        assert moe.shared_ff or not moe.shared_gate, "a gate on a shared expert that does not exist"
        self.add_shared = self._adder()
        self.seen: Tensor | None = None
        self.count = _nothing if self.router_bias is None else self._count

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Rows of gate and up of every expert; what comes out is one map."""
        return {"xin": (self.moe.d_ff,) * 2, "xout": (self.xout.shape[1],)}

    def _adder(self) -> Any:
        if self.shared is None:
            return self._alone
        return self._with_shared if self.shared_gate is None else self._with_gated

    def _count(self, end_X: Tensor) -> None:
        """Remember how many choices fell on each expert, while training. Activations that are recomputed are
        counted twice, all experts of the layer alike."""
        if torch.is_grad_enabled():
            count_X = end_X.diff(prepend=torch.zeros_like(end_X[:1])).long()
            self.seen = count_X if self.seen is None else self.seen + count_X

    def taken(self) -> Tensor:
        """[X] int64 choices of each expert in passes with gradients since the last call."""
        seen, self.seen = self.seen, None
        if seen is None:
            return torch.zeros(self.moe.n_expert, dtype=torch.int64, device=self.router.weight.device)
        return seen

    def _inner(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, -1)
        return self.act(gate) * up

    def _logits(self, x_ND: Tensor) -> Tensor:
        return self.router(x_ND)

    def _wide_logits(self, x_ND: Tensor) -> Tensor:
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        return F.linear(x_ND.to(wide), self.router.weight.to(wide))

    def _alone(self, y_ND: Tensor, x_ND: Tensor) -> Tensor:
        return y_ND

    def _with_shared(self, y_ND: Tensor, x_ND: Tensor) -> Tensor:
        return y_ND + self.shared(x_ND)  # type: ignore[misc]

    def _with_gated(self, y_ND: Tensor, x_ND: Tensor) -> Tensor:
        return y_ND + torch.sigmoid(self.shared_gate(x_ND)) * self.shared(x_ND)  # type: ignore[misc]

    def experts(self, x_ND: Tensor, weight_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """sum_k weight[n, k] * expert chosen[n, k] of x[n]: [N, D]."""
        groups = group(chosen_NK, self.moe.n_expert)
        self.count(groups.end_X)
        inner_MF = self.inner(grouped_linear(dispatch(x_ND, groups), self.xin, groups.end_X))
        return combine(grouped_linear(inner_MF, self.xout, groups.end_X), weight_NK, groups)

    def forward(self, x_ND: Tensor, index: int, attend: Any) -> Tensor:
        probability_NX, weight_NK, chosen_NK = self.route(self.logits(x_ND), self.router_bias)
        attend.routed[index] = probability_NX, chosen_NK
        return self.add_shared(self.experts(x_ND, weight_NK, chosen_NK), x_ND)


def make(d: int, ffn: FFN) -> nn.Module:
    return Mixture(d, ffn)


def expert_counts(chosen_NK: Tensor, n_expert: int, weight_N: Tensor | None = None) -> Tensor:
    """[X] fp32: how many choices fell on each expert; tokens of weight 0 do not count."""
    if weight_N is None:
        return torch.bincount(chosen_NK.flatten(), minlength=n_expert).float()
    each_M = weight_N.float()[:, None].expand_as(chosen_NK).flatten()
    return torch.bincount(chosen_NK.flatten(), each_M, minlength=n_expert).float()


def balance_loss(routed: Routed, spec: Spec, weight_N: Tensor | None = None) -> Tensor:
    """aux_coef * X * sum_e f_e P_e, to be added to the loss: least (aux_coef * K) when experts share evenly.

    f_e is the number of choices of expert e per token, P_e its mean probability, both pooled over the tokens
    of all layers (Fedus et al. 2022, arXiv:2101.03961, eq. 4-6, in Mixtral's form; for sigmoid scores P is
    the share of the score, DeepSeek-V3 eq. 18). The gradient goes through P alone.

    weight_N [N] says how much each token counts (0: padding, or a token of another's sequence); None: all
    alike. Layers of another number of experts, choices or coefficient are pooled among themselves. Without
    routed layers, or where the coefficient is 0, the result is 0.
    """
    pools: dict[MoE, list[tuple[Tensor, Tensor]]] = {}
    for index, (probability_NX, chosen_NK) in sorted(routed.items()):
        ffn = spec.layers[index].ffn
        assert ffn is not None and ffn.moe is not None, f"layer {index} has no experts"
        if ffn.moe.aux_coef:
            pools.setdefault(ffn.moe, []).append((probability_NX, chosen_NK))
    total = torch.zeros((), device=next(iter(routed.values()))[0].device if routed else None)
    for moe, layers in pools.items():
        count_X = torch.stack([expert_counts(chosen, moe.n_expert, weight_N) for _, chosen in layers]).sum(0)
        rows = layers[0][0].shape[0]
        wide_N = layers[0][0].new_ones(rows) if weight_N is None else weight_N.to(layers[0][0].dtype)
        tokens = (wide_N.sum() * len(layers)).clamp(min=torch.finfo(wide_N.dtype).tiny)
        mass_X = torch.stack([wide_N @ probability for probability, _ in layers]).sum(0)
        total = total + moe.aux_coef * moe.n_expert * (count_X / tokens * (mass_X / tokens)).sum()
    return total


def moved_bias(bias_X: Tensor, count_X: Tensor, rate: float) -> Tensor:
    """The choice bias after a step: up by `rate` for experts chosen less than the mean, down for the others.

    Loss-free balancing (Wang et al. 2024, arXiv:2408.15664, alg. 1; DeepSeek-V3 uses rate 0.001). count_X are
    the choices of one whole optimiser step, summed over micro batches and ranks.
    """
    count_X = count_X.to(bias_X.dtype)
    return bias_X + rate * torch.sign(count_X.mean() - count_X)

"""A dense model made into one with experts, as the start of further training.

`split` divides the neurons of every gated FFN among the experts (LLaMA-MoE, Zhu et al. 2024,
arXiv:2406.16554): fewer computations per token, the same number of weights. `copies` gives every expert the
whole FFN (sparse up-cycling, Komatsuzaki et al. 2023, arXiv:2212.05055): more weights, and at first the same
function.

D width, F inner width of the dense FFN, X experts, f = F / X inner width of a split expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from caravan.model.blank import blank
from caravan.model.decoder import Decoder
from caravan.model.spec import FFN, MoE, Spec
from caravan.types import UserError

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""Dense family -> the one whose files hold its layers with experts."""

Assignment = Sequence[int] | Tensor
"""Expert of each of the F neurons of a layer."""

SPLIT_STD = 1e-3
"""A router close to zero weighs the chosen experts almost alike, which the scale of `split` counts on."""
COPIES_STD = 0.02


def split(
    model: Decoder,
    n_expert: int,
    top_k: int,
    *,
    assignments: Sequence[Assignment] | None = None,
    router_std: float = SPLIT_STD,
    aux_coef: float = 0.01,
    seed: int = 0,
) -> Decoder:
    """A new model whose experts share each FFN's neurons out, top_k of n_expert chosen per token.

    The output matrix is multiplied by n_expert: with weights that sum to 1, and are nearly 1 / top_k, the
    chosen experts together count n_expert / top_k times, so that a token gets the dense output in the mean
    over random partitions, and exactly the dense output when all experts are chosen and the router is zero
    (router_std 0). Neurons are dealt out at random from `seed`, or as `assignments` says, one per layer.

    Raises UserError when the model has no gated FFN, the width does not divide, or an assignment is uneven.
    """
    spec = _spec(model, n_expert, top_k, divided=True, aux_coef=aux_coef)
    draw = torch.Generator().manual_seed(seed)
    if assignments is not None and len(assignments) != len(spec.layers):
        raise UserError(f"{len(assignments)} assignments for {len(spec.layers)} layers", "give one per layer")

    def experts(index: int, inp: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        if assignments is None:
            order_F = torch.randperm(out.shape[1], generator=draw)
        else:
            order_F = neurons(assignments[index], out.shape[1], n_expert)
        return divided(inp, out, order_F.view(n_expert, -1).to(out.device))

    return _made(model, spec, experts, router_std, draw)


def copies(
    model: Decoder,
    n_expert: int,
    top_k: int,
    *,
    router_std: float = COPIES_STD,
    aux_coef: float = 0.01,
    seed: int = 0,
) -> Decoder:
    """A new model whose every expert is the dense FFN. Weights of the chosen sum to 1, so the function is the
    dense one until training sets the experts apart; the fresh router is drawn from `seed`.

    Raises UserError when the model has no gated FFN.
    """
    spec = _spec(model, n_expert, top_k, divided=False, aux_coef=aux_coef)

    def experts(index: int, inp: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        return inp.expand(n_expert, -1, -1), out.expand(n_expert, -1, -1)

    return _made(model, spec, experts, router_std, torch.Generator().manual_seed(seed))


def neurons(assignment: Assignment, width: int, n_expert: int) -> Tensor:
    """[F] neurons in the order of their experts, equally many for each. Raises UserError otherwise."""
    expert_F = torch.as_tensor(assignment).long().cpu()
    if expert_F.shape != (width,) or int(expert_F.min()) < 0 or int(expert_F.max()) >= n_expert:
        raise UserError(f"an assignment must give each of {width} neurons an expert below {n_expert}")
    count_X = torch.bincount(expert_F, minlength=n_expert)
    if (count_X != width // n_expert).any():
        raise UserError(
            f"experts of {count_X.tolist()} neurons are not of one size",
            f"give each expert {width // n_expert}",
        )
    return expert_F.argsort(stable=True)


def divided(inp: Tensor, out: Tensor, neuron_Xf: Tensor) -> tuple[Tensor, Tensor]:
    """[2F, D] (gate over up) and [D, F] -> [X, 2f, D] and [X, D, f], the latter times X."""
    gate_FD, up_FD = inp.chunk(2)
    xin = torch.cat([gate_FD[neuron_Xf], up_FD[neuron_Xf]], 1)
    return xin, out[:, neuron_Xf].transpose(0, 1) * neuron_Xf.shape[0]


def _spec(model: Decoder, n_expert: int, top_k: int, *, divided: bool, aux_coef: float) -> Spec:
    """The Spec with experts. Raises UserError when that cannot be."""
    if model.family not in FAMILIES:
        raise UserError(
            f"a '{model.family}' model cannot be given experts", f"possible: {', '.join(FAMILIES)}"
        )
    if not 1 <= top_k <= n_expert:
        raise UserError(f"{top_k} of {n_expert} experts cannot be chosen", "choose at least one, at most all")
    layers = []
    for index, layer in enumerate(model.spec.layers):
        ffn = layer.ffn
        if ffn is None or ffn.kind != "glu" or ffn.bias:
            raise UserError(f"layer {index} has no gated FFN without biases to make experts of")
        if divided and ffn.d_ff % n_expert:
            raise UserError(
                f"{ffn.d_ff} neurons cannot be shared out evenly among {n_expert} experts",
                "choose a number of experts that divides them",
            )
        width = ffn.d_ff // n_expert if divided else ffn.d_ff
        moe = MoE(n_expert=n_expert, top_k=top_k, d_ff=width, fp32_router=False, aux_coef=aux_coef)
        dense = width if FAMILIES[model.family] == "mixtral" else ffn.d_ff  # the width its config.json tells
        layers.append(replace(layer, ffn=FFN(kind="moe", d_ff=dense, act=ffn.act, moe=moe)))
    return replace(model.spec, layers=tuple(layers))


@torch.no_grad()
def _made(
    model: Decoder,
    spec: Spec,
    experts: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
    router_std: float,
    draw: torch.Generator,
) -> Decoder:
    """The new model: FFNs through `experts`, fresh routers, all other weights copied."""
    with blank():
        result = Decoder(spec, FAMILIES[model.family], model.config)
    old = {name: p.detach() for name, p in model.named_parameters()}
    new = {name: p.clone() for name, p in old.items() if ".ffn." not in name}
    for index in range(len(spec.layers)):
        at = f"blocks.{index}.ffn"
        inp, out = old[f"{at}.inp.weight"], old[f"{at}.out.weight"]
        xin, xout = experts(index, inp, out)
        new[f"{at}.xin"] = xin.clone(memory_format=torch.contiguous_format)
        new[f"{at}.xout"] = xout.clone(memory_format=torch.contiguous_format)
        shape = result.get_parameter(f"{at}.router.weight").shape
        new[f"{at}.router.weight"] = (torch.randn(shape, generator=draw) * router_std).to(inp)
    result.load_state_dict(new, strict=True, assign=True)
    result.bare, result.checkpoint_every = model.bare, model.checkpoint_every
    return result

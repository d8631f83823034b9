"""What a model takes in memory, worked out from its config.json alone: no weight is read, nothing allocated.

P weights, M of them updated by Muon, W the wide ones that stay in fp32 whatever the others are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from caravan.algos.optim import layout
from caravan.model.blank import blank
from caravan.model.checkpoint import wide_names
from caravan.model.decoder import Decoder
from caravan.model.encoders.bgpt import BgptSpec
from caravan.model.heads import RewardModel
from caravan.model.spec import Attn, Layer, Spec
from caravan.systems.train import fused_rows, linear_maps

TOWERS = ("decoder", "enc", "dec", "patch", "byte")
"""Where blocks may lie: in a reward model, T5's two stacks, bGPT's two."""
INSIDE = {"mix": "mixers", "a": "mixers", "x": "mixers", "ffn": "feed-forward"}
OUTSIDE = {"embed": "embeddings", "pos": "embeddings", "seg": "embeddings", "pin": "embeddings",
           "inp": "embeddings", "rel": "embeddings", "head": "output head", "tied_bias": "output head",
           "pout": "output head", "score": "score"}  # fmt: skip
"""What a parameter is for, by where it lies."""
LEFT = ("router", "shared_gate", "dt")
"""Small maps that are never made integers."""


@dataclass(frozen=True, slots=True)
class Item:
    """So many bytes, and how they come about."""

    bytes: int
    formula: str


def parts(model: nn.Module) -> dict[str, int]:
    """Weights by what they are for; a tied head is part of the embedding, and so is a table of distances."""
    found: dict[str, int] = {}
    for name, p in model.named_parameters():
        words = [word for word in name.split(".") if word not in TOWERS]
        if "blocks" in words:
            kind = INSIDE.get(words[words.index("blocks") + 2], "norms")
        else:
            kind = OUTSIDE.get(words[0], "norms" if "norm" in words[0] else "other")
        found[kind] = found.get(kind, 0) + p.numel()
    return found


def idle(spec: Spec) -> int:
    """Weights of experts that one token does not pass."""
    every = [layer.ffn.moe for layer in spec.layers if layer.ffn is not None and layer.ffn.moe is not None]
    return sum(3 * spec.d * moe.d_ff * (moe.n_expert - moe.top_k) for moe in every)


def weights(model: nn.Module) -> dict[str, Item]:
    """The weights alone, by precision. Integers: as `caravan quantize` writes them by default, in bf16."""
    count = sum(p.numel() for p in model.parameters())
    wide = wide_names(model)
    fixed = sum(p.numel() for name, p in model.named_parameters() if name in wide)
    more = f" + 2 x {fixed:,} wide ones" if fixed else ""
    found = {
        "fp32": Item(4 * count, f"4 x {count:,}"),
        "bf16": Item(2 * count + 2 * fixed, f"2 x {count:,}{more}"),
    }
    for bits, group in ((8, 0), (4, 64)):
        maps = [
            m
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and "blocks" in name and name.rpartition(".")[2] not in LEFT
        ]
        maps = [m for m in maps if m.in_features % (group or m.in_features) == 0]
        inner = sum(m.weight.numel() for m in maps)
        scales = sum(m.weight.numel() // (group or m.in_features) for m in maps)
        found[f"int{bits}"] = Item(
            inner * bits // 8 + 2 * scales + 2 * (count - inner + fixed),
            f"{bits}/8 x {inner:,} + 2 x {scales:,} scales + 2 x {count - inner:,} others",
        )
    return found


def cache(spec: Spec, tokens: int, width: int = 2) -> int:
    """Bytes of the keys and values of one sequence of so many tokens; a layer with a window keeps no more
    than that, and a model of patches one position for each. `width`: bytes of a number (2 bf16, 4 fp32, which
    the engine takes on CPUs)."""
    total = 0
    for attn in spec.cached:
        kept = min(tokens, attn.window) if attn.window else tokens
        total += kept * attn.kept * width
    return total // spec.patch_size


class _Probe:
    """The context of a pass over one token that only measures what layers want to keep."""

    def __init__(self, prefix: bool) -> None:
        self.lengths = (1,)
        self.prefix = (0,) if prefix else None
        self.routed: dict[int, tuple[Tensor, Tensor]] = {}
        self.bytes = 0

    def __call__(self, index: int, q_NHE: Tensor, k_NKE: Tensor, v_NKV: Tensor, attn: Attn) -> Tensor:
        return q_NHE.new_zeros(*q_NHE.shape[:2], v_NKV.shape[-1])

    def state(self, index: int) -> dict[str, Tensor] | None:
        return None

    def keep(self, index: int, state: Mapping[str, Tensor]) -> None:
        self.bytes += sum(t.numel() * t.element_size() for t in state.values())


def state(spec: Spec) -> int:
    """Bytes of the recurrent state of one sequence in bf16, however long; 0 for attention alone. One layer of
    each kind is run on one token to see. A model of patches keeps the unfinished one and a vector."""
    if isinstance(spec, BgptSpec):
        return 8 * spec.patch_size + 2 * spec.d
    total = 0
    kinds: dict[Layer, int] = {}
    for layer in spec.layers:
        kinds[layer] = kinds.get(layer, 0) + 1
    for layer, count in kinds.items():
        if layer.mixer in ("attn", "mla") and (layer.ffn is None or not layer.ffn.kind.startswith("rwkv")):
            continue
        small = replace(spec, vocab=2, layers=(layer,), tie=True, head=False, prefix_token=None)
        probe = _Probe(spec.prefix_token is not None)
        with torch.no_grad():
            model = Decoder(small).to(torch.bfloat16)
            wide = wide_names(model)
            for name, p in model.named_parameters():
                p.data = p.data.float() if name in wide else p.data
            model(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), probe)
        total += probe.bytes * count
    return total


def trainee(model: nn.Module, optimiser: str = "adamw", precision: str = "bf16") -> Item:
    """A model in training, without activations: `systems.train.Trainee` holds the weights to compute with,
    fp32 masters (in fp32 they are one), fp32 gradients, and two moments; Muon keeps one for its own."""
    slots = layout(
        ((name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad),
        optimiser,
        linear_maps(model),
        fused_rows(model),
        wide_names(model),
    )
    count = slots[-1].stop
    muon = max((slot.stop for slot in slots if slot.kind == "muon"), default=0)
    each = 18 if precision == "bf16" else 16
    formula = f"{each} x {count:,}" + (f" - 4 x {muon:,} by Muon" if muon else "")
    return Item(each * count - 4 * muon, formula)


def training(model: Decoder) -> dict[str, Item]:
    """Weights, gradients and optimiser in bf16 with fp32 masters, by method; activations come on top.

    pretrain and sft train one model; prefer too, which takes the reference's log-probs before it starts; rl
    trains a policy and a critic and holds a reference and a reward model, both in bf16.
    """
    found = {
        "pretrain, sft": trainee(model),
        "pretrain, sft by Muon": trainee(model, "muon"),
        "pretrain, sft in fp32": trainee(model, precision="fp32"),
    }
    found["prefer (DPO and kin)"] = trainee(model)
    with blank():
        critic = RewardModel(type(model)(replace(model.spec, head=False), model.family))
    policy, value = trainee(model), trainee(critic)
    frozen = weights(model)["bf16"].bytes, weights(critic)["bf16"].bytes
    found["reward"] = value
    found["rl (PPO)"] = Item(
        policy.bytes + value.bytes + sum(frozen),
        f"policy {policy.formula} + critic {value.formula} + reference {frozen[0]:,} + reward {frozen[1]:,}",
    )
    return found

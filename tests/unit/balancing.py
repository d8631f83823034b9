"""A tiny mixture of experts whose router prefers some of them, and its training; as a program, the training
under torchrun's environment: prints the biases."""

from __future__ import annotations

import json
from typing import Any

import torch

from caravan.algos.optim import OptimConfig
from caravan.model.decoder import Decoder
from caravan.model.sizes import fresh
from caravan.model.spec import FFN, Attn, Layer, MoE, Norm, Rope, Spec
from caravan.systems import parallel
from caravan.systems.train import Trainee, lm_loss, train_step
from caravan.types import Batch

EXPERTS, VOCAB, D = 8, 53, 16


def lopsided(seed: int = 0) -> Decoder:
    """Two layers of experts; every router adds a strong preference of its own."""
    moe = MoE(n_expert=EXPERTS, top_k=2, d_ff=8, score="sigmoid", bias_correction=True, aux_coef=0.0)
    layer = Layer(
        attn=Attn(n_head=2, n_kv=1, head_dim=8, rope=Rope(dim=8)),
        ffn=FFN(kind="moe", d_ff=8, act="silu", moe=moe),
        norm=Norm(),
    )
    spec = Spec(vocab=VOCAB, d=D, layers=(layer, layer), final_norm=Norm(), max_pos=64)
    model = fresh(spec, seed)
    liked = torch.linspace(-0.6, 0.6, EXPERTS)[:, None]
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            weight = block.ffn.router.weight
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
            block.n2.weight[0] = 2.0
            weight[:, 0] = 0.0
            weight[:, :1] += liked if i == 0 else liked.flip(0)
        model.embed.weight[:, 0] = model.embed.weight.std() * 3
    return model


def batches(step: int, count: int = 2) -> list[Batch]:
    """The micro batches of a step: 96 tokens in segments of different lengths each."""
    result = []
    for i in range(count):
        ids_N = torch.randint(0, VOCAB, (96,), generator=torch.Generator().manual_seed(100 * step + i))
        lengths = (40, 33, 23)
        pos_N = torch.cat([torch.arange(n) for n in lengths])
        result.append(Batch(ids_N, pos_N, lengths, ids_N.roll(-1), torch.ones(96)))
    return result


def trainee(rate: float = 0.02, **fields: Any) -> Trainee:
    return Trainee(lopsided(), OptimConfig(lr=1e-5, balance_rate=rate, **fields))


def train(subject: Trainee, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        mine = parallel.mine(batches(step))
        train_step(subject, mine, lambda b: lm_loss(subject.model, b, 192.0), 1e-5)


def biases(subject: Trainee) -> list[list[float]]:
    return [t.tolist() for t in subject.balance.tensors().values()]


def main() -> None:
    parallel.start(torch.device("cpu"))
    subject = trainee()
    train(subject, 5)
    print(json.dumps(biases(subject)))


if __name__ == "__main__":
    main()

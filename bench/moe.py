"""Mixture of experts, forward and backward: ours beside transformers' Mixtral, in one process and precision.

    python -m bench.moe [--threads 1] [--tokens 1024] [--rounds 5] [--dtype float32|bfloat16]

Prints one JSON object: seconds per pass of one layer with experts for each side, the median of the rounds,
taken in turns so that a slow minute hits all. `eager` is transformers' loop over experts, `grouped_mm` its
grouped product. All sides hold the same weights and their outputs are compared first. It must be run on a
quiet machine: figures taken under load mean nothing, and `load` is recorded to tell.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from caravan.kernels.attention import Segments
from caravan.model.ffn.moe import Mixture
from caravan.model.spec import FFN, MoE

WIDTH, INNER, EXPERTS, CHOSEN = 512, 1024, 8, 2


def theirs(implementation: str) -> nn.Module:
    """One Mixtral block with experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN
    )
    config._experts_implementation = implementation
    return MixtralSparseMoeBlock(config)


def ours() -> Mixture:
    """The same block here."""
    moe = MoE(n_expert=EXPERTS, top_k=CHOSEN, d_ff=INNER, fp32_router=False)
    return Mixture(WIDTH, FFN(kind="moe", d_ff=INNER, act="silu", moe=moe))


def passes(dtype: torch.dtype, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """By side: one forward and backward pass that returns the output."""
    torch.manual_seed(0)
    mine, sides = ours().to(dtype), {name: theirs(name) for name in ("eager", "grouped_mm")}
    x = torch.randn(tokens, WIDTH, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    attend = Segments((tokens,))
    runs: dict[str, Callable[[], Tensor]] = {"ours": _pass(lambda: mine(x, 0, attend), dy)}
    for name, block in sides.items():
        block = block.to(dtype)
        state = {"gate.weight": mine.router.weight, "experts.gate_up_proj": mine.xin,
                 "experts.down_proj": mine.xout}  # fmt: skip
        block.load_state_dict({key: p.detach() for key, p in state.items()})
        runs[name] = _pass(lambda block=block: block(x[None])[0], dy)
    return runs


def _pass(forward: Callable[[], Any], dy: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        y = forward()
        y.backward(dy)
        return y.detach()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    import transformers

    runs = passes(getattr(torch, args.dtype), args.tokens)
    want = runs["eager"]().float()
    off = {name: float((run().float() - want).abs().max() / want.std()) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        json.dumps(
            {
                "what": "one layer with experts, forward and backward",
                "shape": {
                    "tokens": args.tokens,
                    "d": WIDTH,
                    "d_ff": INNER,
                    "experts": EXPERTS,
                    "top_k": CHOSEN,
                },
                "dtype": args.dtype,
                "threads": args.threads,
                "seconds": {name: round(value, 5) for name, value in median.items()},
                "spread": {name: [round(min(t), 5), round(max(t), 5)] for name, t in seconds.items()},
                "times_as_fast_as_eager": round(median["eager"] / median["ours"], 3),
                "largest_difference_over_std": off,
                "load": os.getloadavg()[0],
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()

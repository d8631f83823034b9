"""Forward and backward of the bare decoder beside transformers' Llama in eager mode, in one run; prints JSON.

    python bench/decoder.py [--what 27m-bf16 27m-fp32 110m-bf16] [--steps 6] [--rounds 2] [--threads N]

Both sides see the same 2,048 tokens in rows of 512, weights in the same precision, and get the gradient of
the sum of the hidden states times a fixed vector: no head, no loss, no optimiser, which `bench/train.py`
measures. transformers runs with its `sdpa` attention, its fastest on a CPU. Contenders run in processes of
their own, `rounds` times over; the best round counts.
"""

from __future__ import annotations

from pathlib import Path

import race

ROW, ROWS, VOCAB = 512, 4, 4096
SHAPES = {
    "27m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "110m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
CONTENDERS = {f"{size}-{kind}": ["ours", "transformers"] for size in SHAPES for kind in ("bf16", "fp32")}


def write_inputs(folder: Path) -> None:
    """Nothing: weights and tokens are drawn."""


def contend(what: str, who: str, folder: Path, steps: int, threads: int) -> race.Result:
    """One contender, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    size, kind = what.split("-")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (ROWS, ROW))
    config = {
        **SHAPES[size],
        "vocab_size": VOCAB,
        "max_position_embeddings": ROW,
        "tie_word_embeddings": True,
    }
    direction = torch.randn(config["hidden_size"]).to(dtype)
    if who == "ours":
        from caravan.kernels.attention import Segments
        from caravan.model.decoder import Decoder
        from caravan.model.families import llama

        ours = Decoder(llama.spec(config)).to(dtype)
        attend, pos_N = Segments((ROW,) * ROWS), torch.arange(ROW).repeat(ROWS)

        def step() -> torch.Tensor:
            ours.zero_grad(set_to_none=True)
            return ours(ids.flatten(), pos_N, attend)
    else:
        theirs = LlamaModel(LlamaConfig(**config, attn_implementation="sdpa")).to(dtype)

        def step() -> torch.Tensor:
            theirs.zero_grad(set_to_none=True)
            return theirs(input_ids=ids, use_cache=False).last_hidden_state

    clock = race.Clock()
    for _ in range(steps):
        (step() @ direction).sum().backward()
        clock.tick()
    return clock.result(ROW * ROWS, "tokens/s")


if __name__ == "__main__":
    race.main(__file__, __doc__ or "", CONTENDERS, write_inputs, contend)

"""Training throughput of our stages and of peers, in one run on one machine; prints JSON.

    python bench/train.py [--what pretrain sft] [--steps 6] [--rounds 2] [--threads N] [--output FILE]

Shape: Llama, hidden 512, ffn 1408, 8 layers, 8 heads, vocabulary 4096 (27.8M parameters). Every contender
runs in a process of its own, one after another, `rounds` times over, so that a busy minute hits all alike;
the best round counts. The first step of each (warm-up, lazy initialisation) is not timed. All see the same
tokens per step.

pretrain, 4096 tokens a step
    ours        the whole stage: loader, loss, journal, checkpoint, progress
    bare        a hand-written loop on fixed 512-token rows: transformers' Llama, bf16 autocast, fused AdamW
    bare-bf16   the same with bf16 weights and no autocast (no fp32 masters: less exact than ours)
    trainer     transformers.Trainer, bf16
sft, real (unpadded) tokens per second on the same conversations
    ours        the whole stage, documents kept apart
    trl         SFTTrainer at its defaults but for bf16
    trl-packed  the same with best-fit packing, documents kept apart; a row of 1,024 tokens at a time, four a
                step (four rows at once become one of 4,096, over which attention takes several times as long)
    trl-wrapped packing that lets documents see each other
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

import race

ROW, STEP_TOKENS, VOCAB = 512, 4096, 4096
MICRO_TOKENS = {"pretrain": 4096, "sft": 2048}
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
FLOPS = 6 * 27_787_264 + 6 * 2 * 8 * 512 * ROW / 2
"""Per token: 6 multiplications per weight, and causal attention over rows of 512."""
CONTENDERS = {
    "pretrain": ["ours", "bare", "bare-bf16", "trainer"],
    "sft": ["ours", "trl", "trl-packed", "trl-wrapped"],
}
TRL: dict[str, dict[str, Any]] = {
    "trl": {"per_device_train_batch_size": 8},
    "trl-packed": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "trl-wrapped": {"packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 4},
}


def write_inputs(folder: Path) -> None:
    """Tokenizer, shards of the standard library's source, conversations, and a base model."""
    from caravan.data import shards, tokenizer
    from caravan.model.checkpoint import save_model
    from caravan.model.sizes import derive, fresh

    texts = race.stdlib_texts()
    tok = tokenizer.train(texts, VOCAB)
    tok.save(folder / "shards" / "tokenizer")
    encoded = list(shards.encode_documents(texts, tok))
    shards.write(folder / "shards", {"train": encoded[:-2], "heldout": encoded[-2:]}, tok.vocab_size)
    draw = random.Random(0)
    lines = [line.strip() for text in texts for line in text.splitlines() if len(line) > 20]

    def said(role: str, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(lines, k=draw.randint(1, most)))}

    for split, count in (("train", 2000), ("heldout", 8)):
        chats = []
        for _ in range(count):
            turns = draw.choice((1, 1, 2, 3))
            chats.append(
                {"messages": [m for _ in range(turns) for m in (said("user", 3), said("assistant", 8))]}
            )
        race.write_rows(folder / "conversations" / f"{split}.jsonl", chats)
    spec, _ = derive("small", None, VOCAB, 1024)
    save_model(fresh(spec, 0), folder / "model", folder / "shards" / "tokenizer")


def ours(what: str, folder: Path, steps: int, threads: int) -> race.Result:
    """The whole stage; tokens are those it trained on."""
    import importlib

    module = importlib.import_module(f"caravan.stages.{what}")
    common = {"steps": steps, "batch_tokens": STEP_TOKENS, "micro_tokens": MICRO_TOKENS[what]}
    if what == "pretrain":
        config = module.Config(size="small", context=ROW, eval_tokens=ROW, **common)
        roles = {"shards": "shards"}
    else:
        config = module.Config(eval_steps=steps, **common)
        roles = {"base": "model", "data": "conversations"}
    clock, timing = race.run_stage(what, config, folder, roles, threads)
    tokens = [line["tokens_per_second"] * line["seconds"] for line in timing[1:]]
    return finished(clock, sum(tokens) / len(tokens), what)


def finished(clock: race.Clock, tokens: float, what: str) -> race.Result:
    """Tokens a step; for pre-training the arithmetic too."""
    result = clock.result(tokens, "tokens/s")
    return result | ({"gflops": round(result["rate"] * FLOPS / 1e9, 1)} if what == "pretrain" else {})


def llama(dtype: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, vocab_size=VOCAB, max_position_embeddings=1024, tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(dtype)


def rows(folder: Path, steps: int) -> Any:
    """[steps * 8, 512] ids, the first rows of the shards."""
    import torch

    from caravan.data.shards import Shards

    count = steps * STEP_TOKENS
    return torch.from_numpy(Shards.open(folder / "shards").tokens[:count].astype("int64")).view(-1, ROW)


def bare(folder: Path, steps: int, weights_bf16: bool) -> race.Result:
    """The loop one would write in an afternoon."""
    import torch

    model = llama(torch.bfloat16 if weights_bf16 else torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    data, per_step, clock = rows(folder, steps), STEP_TOKENS // ROW, race.Clock()
    for step in range(steps):
        ids = data[step * per_step : (step + 1) * per_step]
        with torch.autocast("cpu", torch.bfloat16, enabled=not weights_bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        clock.tick()
    return finished(clock, STEP_TOKENS, "pretrain")


def trainer(folder: Path, steps: int) -> race.Result:
    import torch
    from transformers import Trainer, TrainingArguments

    data, clock = rows(folder, steps), race.Clock()
    items = [{"input_ids": row, "labels": row} for row in data]
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            work, max_steps=steps, per_device_train_batch_size=STEP_TOKENS // ROW, bf16=True, use_cpu=True,
            report_to="none", save_strategy="no", learning_rate=1e-3, weight_decay=0.1, logging_steps=1,
        )  # fmt: skip
        Trainer(llama(torch.float32), arguments, train_dataset=items, callbacks=[clock.callback()]).train()
    return finished(clock, STEP_TOKENS, "pretrain")


def trl(folder: Path, steps: int, who: str) -> race.Result:
    """SFTTrainer on the same conversations; tokens per second count real tokens only."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(race.read_rows(folder / "conversations" / "train.jsonl"))
    clock = race.Clock()
    with tempfile.TemporaryDirectory() as work:
        config = SFTConfig(
            output_dir=work, max_steps=steps, bf16=True, use_cpu=True, report_to="none", save_strategy="no",
            max_length=1024, logging_steps=1, **TRL[who],
        )  # fmt: skip
        tok = AutoTokenizer.from_pretrained(folder / "model")
        one = SFTTrainer(
            str(folder / "model"),
            config,
            train_dataset=data,
            processing_class=tok,
            callbacks=[clock.callback()],
        )
        one.train()
    seen = one.state.num_input_tokens_seen or next(
        (row["num_tokens"] for row in reversed(one.state.log_history) if "num_tokens" in row), 0
    )
    return finished(clock, seen / steps, "sft")


def contend(what: str, who: str, folder: Path, steps: int, threads: int) -> race.Result:
    """One contender, in this process."""
    if who == "ours":
        return ours(what, folder, steps, threads)
    if what == "pretrain":
        return trainer(folder, steps) if who == "trainer" else bare(folder, steps, who == "bare-bf16")
    return trl(folder, steps, who)


def about(threads: int) -> dict[str, Any]:
    """The shape, and bf16 GFLOP/s of a 2048 x 512 x 2816 product, the largest of the model."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 512).bfloat16(), torch.randn(512, 2816).bfloat16()
    best = 0.0
    for _ in range(60):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048 * 512 * 2816 / (time.perf_counter() - start))
    return {"shape": {**SHAPE, "vocabulary": VOCAB}, "gemm_peak_gflops": round(best / 1e9, 1)}


if __name__ == "__main__":
    race.main(__file__, __doc__ or "", CONTENDERS, write_inputs, contend, about)

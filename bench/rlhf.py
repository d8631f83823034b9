"""Reward pairs per second and seconds per PPO step, ours beside TRL, in one run on one machine; prints JSON.

    python bench/rlhf.py [--what reward ppo] [--steps 6] [--rounds 2] [--threads N] [--output FILE]

Shape: Llama, hidden 512, ffn 1408, 8 layers, 8 heads, vocabulary 4096 (27.8M parameters), bf16. Every
contender runs in a process of its own, one after another, `rounds` times over; the best round counts. The
first step of each (warm-up, lazy initialisation) is not timed.

reward, pairs per second on the same pairs, 16 a step
    ours        the whole stage: rendering, loader, loss, journal, checkpoint
    trl         RewardTrainer, bf16 autocast, no padding to a multiple, dropout off
ppo, seconds per step of 32 answers of 64 tokens (4 prompts x 8), nobody stops early
    ours        actor, critic, reference and reward model, one epoch, one minibatch
    grpo        GRPOTrainer at beta 0: no critic, no reference, no reward model (a function); bf16 autocast
    grpo-bf16   the same with bf16 weights
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import race

VOCAB, PAIRS, STEP_PAIRS, PROMPTS, SAMPLES, NEW = 4096, 1024, 16, 4, 8, 64
CONTENDERS = {"reward": ["ours", "trl"], "ppo": ["ours", "grpo", "grpo-bf16"]}


def write_inputs(folder: Path) -> None:
    """A tokenizer, pairs and prompts made of lines of the standard library, a policy and a reward model."""
    import torch

    from caravan.data import tokenizer
    from caravan.model.checkpoint import save_model, save_reward
    from caravan.model.sizes import derive, fresh
    from caravan.stages.reward import fresh as scalar

    texts = race.stdlib_texts()
    tokenizer.train(texts, VOCAB).save(folder / "tok")
    draw = random.Random(0)
    lines = [line.strip() for text in texts for line in text.splitlines() if len(line) > 20]

    def some(least: int, most: int) -> str:
        return " ".join(draw.choices(lines, k=draw.randint(least, most)))

    pairs = [{"prompt": [{"role": "user", "content": some(1, 6)}], "responses": [some(1, 10), some(1, 10)],
              "ranks": [0, 1], "id": str(i), "source": "bench"} for i in range(PAIRS)]  # fmt: skip
    chats = [{"messages": [{"role": "user", "content": some(1, 2)}, {"role": "assistant", "content": "ok"}],
              "id": str(i), "source": "bench"} for i in range(64)]  # fmt: skip
    race.write_rows(folder / "preferences" / "train.jsonl", pairs)
    race.write_rows(folder / "conversations" / "train.jsonl", chats)
    spec, _ = derive("small", None, VOCAB, 1024)
    save_model(fresh(spec, 0), folder / "model", folder / "tok", torch.bfloat16)
    save_reward(scalar(fresh(spec, 1), 1), folder / "reward", folder / "tok", torch.bfloat16)


def our_reward(folder: Path, steps: int, threads: int) -> race.Result:
    from caravan.data.loader import RankingLoader
    from caravan.data.rankings import load_rankings
    from caravan.data.tokenizer import Tokenizer
    from caravan.stages.reward import Config

    groups = load_rankings(
        folder / "preferences" / "train.jsonl", Tokenizer.load(folder / "model"), 1024
    ).groups
    tokens = sum(len(row) for group in groups for row in group)
    batch_tokens = round(tokens * STEP_PAIRS / len(groups))
    loader = RankingLoader(groups, batch_tokens, 0)
    config = Config(epochs=steps / loader.steps_per_epoch, batch_tokens=batch_tokens, precision="bf16")
    clock, _ = race.run_stage("reward", config, folder, {"base": "model", "data": "preferences"}, threads)
    counted = [loader.normaliser(step) for step in range(1, len(clock.marks))]
    per_pair = tokens / len(groups)
    return clock.result(sum(counted) / len(counted), "pairs/s", tokens_per_pair=per_pair)


def our_ppo(folder: Path, steps: int, threads: int) -> race.Result:
    from caravan.stages import _rl as parts
    from caravan.stages.rl import Config

    draw = parts.rollouts.sample  # nobody may stop early on either side: answers of a random model would
    parts.rollouts.sample = lambda *a, **k: draw(*a, **{**k, "stop_ids": frozenset()})
    config = Config(steps=steps, batch_prompts=PROMPTS, samples=SAMPLES, max_new_tokens=NEW,
                    precision="bf16")  # fmt: skip
    roles = {"policy": "model", "reward": "reward", "prompts": "conversations"}
    clock, _ = race.run_stage("rl", config, folder, roles, threads)
    return clock.result(1.0, "steps/s")


def trl_reward(folder: Path, steps: int) -> race.Result:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    data = Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "chosen": [{"role": "assistant", "content": row["responses"][0]}],
                "rejected": [{"role": "assistant", "content": row["responses"][1]}],
            }
            for row in race.read_rows(folder / "preferences" / "train.jsonl")
        ]
    )
    clock = race.Clock()
    tok = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "model", num_labels=1, dtype="float32"
    )
    model.config.pad_token_id = tok.pad_token_id
    with tempfile.TemporaryDirectory() as work:
        config = RewardConfig(
            output_dir=work, max_steps=steps, per_device_train_batch_size=STEP_PAIRS, bf16=True, use_cpu=True,
            gradient_checkpointing=False, max_length=1024, report_to="none", save_strategy="no",
            logging_steps=1,
        )  # fmt: skip
        RewardTrainer(
            model, config, train_dataset=data, processing_class=tok, callbacks=[clock.callback()]
        ).train()
    return clock.result(STEP_PAIRS, "pairs/s")


def grpo(folder: Path, steps: int, weights_bf16: bool) -> race.Result:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    data = Dataset.from_list(
        [{"prompt": row["messages"][:1]} for row in race.read_rows(folder / "conversations" / "train.jsonl")]
    )
    clock, draw = race.Clock(), random.Random(0)
    tok = AutoTokenizer.from_pretrained(folder / "model")
    dtype = "bfloat16" if weights_bf16 else "float32"
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    with tempfile.TemporaryDirectory() as work:
        config = GRPOConfig(
            output_dir=work, max_steps=steps, per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES, max_completion_length=NEW, bf16=True, use_cpu=True, beta=0.0,
            gradient_checkpointing=False, generation_kwargs={"min_new_tokens": NEW}, report_to="none",
            save_strategy="no", logging_steps=1,
        )  # fmt: skip
        GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [draw.random() for _ in completions],
            args=config,
            train_dataset=data,
            processing_class=tok,
            callbacks=[clock.callback()],
        ).train()
    return clock.result(1.0, "steps/s")


def contend(what: str, who: str, folder: Path, steps: int, threads: int) -> race.Result:
    """One contender, in this process."""
    if who == "ours":
        return {"reward": our_reward, "ppo": our_ppo}[what](folder, steps, threads)
    return trl_reward(folder, steps) if what == "reward" else grpo(folder, steps, who == "grpo-bf16")


if __name__ == "__main__":
    race.main(__file__, __doc__ or "", CONTENDERS, write_inputs, contend)

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

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VOCAB, PAIRS, STEP_PAIRS, PROMPTS, SAMPLES, NEW = 4096, 1024, 16, 4, 8, 64
CONTENDERS = {"reward": ["ours", "trl"], "ppo": ["ours", "grpo", "grpo-bf16"]}


class Clock:
    """Marks at the end of each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def tick(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.marks[-1] - self.marks[0]


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_inputs(folder: Path) -> None:
    """A tokenizer, pairs and prompts made of lines of the standard library, a policy and a reward model."""
    import sysconfig

    import torch

    from caravan.data import tokenizer
    from caravan.model.checkpoint import save_model, save_reward
    from caravan.model.sizes import derive, fresh
    from caravan.stages.reward import fresh as scalar

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    tokenizer.train(texts, VOCAB).save(folder / "tok")
    draw = random.Random(0)
    lines = [line.strip() for text in texts for line in text.splitlines() if len(line) > 20]

    def some(least: int, most: int) -> str:
        return " ".join(draw.choices(lines, k=draw.randint(least, most)))

    pairs = [{"prompt": [{"role": "user", "content": some(1, 6)}], "responses": [some(1, 10), some(1, 10)],
              "ranks": [0, 1], "id": str(i), "source": "bench"} for i in range(PAIRS)]  # fmt: skip
    chats = [{"messages": [{"role": "user", "content": some(1, 2)}, {"role": "assistant", "content": "ok"}],
              "id": str(i), "source": "bench"} for i in range(64)]  # fmt: skip
    for name, rows in (("preferences", pairs), ("conversations", chats)):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec, _ = derive("small", None, VOCAB, 1024)
    save_model(fresh(spec, 0), folder / "model", folder / "tok", torch.bfloat16)
    save_reward(scalar(fresh(spec, 1), 1), folder / "reward", folder / "tok", torch.bfloat16)


def run_stage(name: str, config: Any, folder: Path, roles: dict[str, str], threads: int) -> Clock:
    """Our stage as it is, its own checkpoints and journal included."""
    import importlib

    from caravan.stage import Runtime
    from caravan.store import Artefact

    clock = Clock()
    with tempfile.TemporaryDirectory() as work:
        rt = Runtime(work=Path(work), device="cpu", threads=threads, report=clock.tick)
        (Path(work) / "out").mkdir()
        inputs = {
            role: Artefact(folder / kind, {"kind": kind, "id": "0" * 16}) for role, kind in roles.items()
        }
        importlib.import_module(f"caravan.stages.{name}").run(config, inputs, Path(work) / "out", rt)
    return clock


def our_reward(folder: Path, steps: int, threads: int) -> dict[str, float]:
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
    clock = run_stage("reward", config, folder, {"base": "model", "data": "preferences"}, threads)
    pairs = sum(loader.normaliser(step) for step in range(1, len(clock.marks)))
    return {
        "rate": pairs / clock.seconds,
        "unit": "pairs/s",
        "peak_rss_mb": peak_mb(),
        "tokens_per_pair": tokens / len(groups),
    }


def our_ppo(folder: Path, steps: int, threads: int) -> dict[str, float]:
    from caravan.stages import _rl as parts
    from caravan.stages.rl import Config

    draw = parts.rollouts.sample  # nobody may stop early on either side: answers of a random model would
    parts.rollouts.sample = lambda *a, **k: draw(*a, **{**k, "stop_ids": frozenset()})
    config = Config(steps=steps, batch_prompts=PROMPTS, samples=SAMPLES, max_new_tokens=NEW,
                    micro_tokens=8192, precision="bf16")  # fmt: skip
    roles = {"policy": "model", "reward": "reward", "prompts": "conversations"}
    clock = run_stage("rl", config, folder, roles, threads)
    rate = (len(clock.marks) - 1) / clock.seconds
    return {"rate": rate, "unit": "steps/s", "seconds_per_step": 1 / rate, "peak_rss_mb": peak_mb()}


def ticking(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    return Tick()


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "train.jsonl").read_text().splitlines()]


def trl_reward(folder: Path, steps: int) -> dict[str, float]:
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
            for row in rows_of(folder, "preferences")
        ]
    )
    clock = Clock()
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
            model, config, train_dataset=data, processing_class=tok, callbacks=[ticking(clock)]
        ).train()
    rate = STEP_PAIRS * (len(clock.marks) - 1) / clock.seconds
    return {"rate": rate, "unit": "pairs/s", "peak_rss_mb": peak_mb()}


def grpo(folder: Path, steps: int, weights_bf16: bool) -> dict[str, float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    data = Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows_of(folder, "conversations")])
    clock, draw = Clock(), random.Random(0)
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
            callbacks=[ticking(clock)],
        ).train()
    rate = (len(clock.marks) - 1) / clock.seconds
    return {"rate": rate, "unit": "steps/s", "seconds_per_step": 1 / rate, "peak_rss_mb": peak_mb()}


def contend(what: str, who: str, folder: Path, steps: int, threads: int) -> dict[str, float]:
    """One contender, in this process."""
    import torch

    torch.set_num_threads(threads)
    if who == "ours":
        return {"reward": our_reward, "ppo": our_ppo}[what](folder, steps, threads)
    return trl_reward(folder, steps) if what == "reward" else grpo(folder, steps, who == "grpo-bf16")


def race(what: str, folder: Path, args: argparse.Namespace, env: dict[str, str]) -> dict[str, Any]:
    """Best round of every contender, and ours over theirs (a rate: above 1 is faster)."""
    best: dict[str, Any] = {}
    for _ in range(args.rounds):
        for who in [w for w in CONTENDERS[what] if not args.only or w in args.only]:
            command = [sys.executable, __file__, "--steps", str(args.steps), "--threads", str(args.threads)]
            done = subprocess.run(
                [*command, "--child", what, who, str(folder)],
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                best.setdefault(who, {"error": done.stderr.strip().splitlines()[-3:]})
                continue
            one = json.loads(found[-1])
            print(f"{what} {who}: {one['rate']:.3f} {one['unit']}", file=sys.stderr)
            if one["rate"] > best.get(who, {}).get("rate", 0.0):
                best[who] = one
    ours = best.get("ours", {}).get("rate", 0.0)
    return {
        "contenders": best,
        "ours_over": {who: round(ours / r["rate"], 3) for who, r in best.items() if "rate" in r},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", default=["reward", "ppo"], choices=sorted(CONTENDERS))
    parser.add_argument("--only", nargs="+", help="contenders to run")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.child:
        what, who, folder = args.child
        print("RESULT " + json.dumps(contend(what, who, Path(folder), args.steps, args.threads)))
        return
    from caravan import provenance

    report: dict[str, Any] = {
        "machine": provenance.machine(), "threads": args.threads, "versions": provenance.libraries(),
        "steps": args.steps, "rounds": args.rounds, "load_before": os.getloadavg(), "results": {},
    }  # fmt: skip
    # glibc hands freed arrays back to the system after every step otherwise; all contenders get the same.
    keep = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
    env = {**os.environ, **keep, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as temporary:
        write_inputs(Path(temporary))
        for what in args.what:
            report["results"][what] = race(what, Path(temporary), args, env)
    text = json.dumps(report, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

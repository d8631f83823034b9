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
    trl-packed  the same with packing
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
ROW, STEP_TOKENS, MICRO_TOKENS, VOCAB = 512, 4096, 4096, 4096
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
CONTENDERS = {"pretrain": ["ours", "bare", "bare-bf16", "trainer"], "sft": ["ours", "trl", "trl-packed"]}


class Clock:
    """Seconds and tokens from the end of the first step to the end of the last."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def tick(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def result(self, tokens_per_step: float) -> dict[str, float]:
        seconds = self.marks[-1] - self.marks[0]
        rate = tokens_per_step * (len(self.marks) - 1) / seconds
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"tokens_per_second": rate, "seconds": seconds, "peak_rss_mb": peak}


def write_inputs(folder: Path) -> None:
    """Tokenizer, shards of the standard library's source, conversations, and a base model."""
    import sysconfig

    from caravan.data import shards, tokenizer
    from caravan.model.checkpoint import save_model
    from caravan.model.sizes import derive, fresh

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files][:60]
    tok = tokenizer.train(texts, VOCAB)
    tok.save(folder / "shards" / "tokenizer")
    encoded = list(shards.encode_documents(texts, tok))
    shards.write(folder / "shards", {"train": encoded[:-2], "heldout": encoded[-2:]}, tok.vocab_size)
    draw = random.Random(0)
    lines = [line.strip() for text in texts for line in text.splitlines() if len(line) > 20]
    (folder / "conversations").mkdir()
    for split, count in (("train", 2000), ("heldout", 8)):
        rows = []
        for _ in range(count):
            messages = []
            for _ in range(draw.choice((1, 1, 2, 3))):
                messages.append(
                    {"role": "user", "content": " ".join(draw.choices(lines, k=draw.randint(1, 3)))}
                )
                messages.append(
                    {"role": "assistant", "content": " ".join(draw.choices(lines, k=draw.randint(1, 8)))}
                )
            rows.append(json.dumps({"messages": messages}) + "\n")
        (folder / "conversations" / f"{split}.jsonl").write_text("".join(rows))
    spec, _ = derive("small", None, VOCAB, 1024)
    save_model(fresh(spec, 0), folder / "model", folder / "shards" / "tokenizer")


def stage(
    name: str, folder: Path, config: dict[str, Any], roles: dict[str, str], threads: int
) -> dict[str, float]:
    """Our stage as it is, its own checkpoints and journal included."""
    import importlib

    from caravan.stage import Runtime
    from caravan.store import Artefact

    module = importlib.import_module(f"caravan.stages.{name}")
    inputs = {role: Artefact(folder / kind, {"kind": kind}) for role, kind in roles.items()}
    clock = Clock()
    with tempfile.TemporaryDirectory() as work:
        rt = Runtime(work=Path(work), device="cpu", threads=threads, report=clock.tick)
        (Path(work) / "out").mkdir()
        module.run(module.Config(**config), inputs, Path(work) / "out", rt)
        timing = [json.loads(line) for line in (Path(work) / "timing.jsonl").read_text().splitlines()]
    tokens = [line["tokens_per_second"] * line["seconds"] for line in timing[1:]]
    return clock.result(sum(tokens) / len(tokens))


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


def bare(folder: Path, steps: int, weights_bf16: bool) -> dict[str, float]:
    """The loop one would write in an afternoon."""
    import torch

    model = llama(torch.bfloat16 if weights_bf16 else torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    data, per_step, clock = rows(folder, steps), STEP_TOKENS // ROW, Clock()
    for step in range(steps):
        ids = data[step * per_step : (step + 1) * per_step]
        with torch.autocast("cpu", torch.bfloat16, enabled=not weights_bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        clock.tick()
    return clock.result(STEP_TOKENS)


def ticking(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    return Tick()


def trainer(folder: Path, steps: int) -> dict[str, float]:
    import torch
    from transformers import Trainer, TrainingArguments

    data, clock = rows(folder, steps), Clock()
    items = [{"input_ids": row, "labels": row} for row in data]
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(
            work, max_steps=steps, per_device_train_batch_size=STEP_TOKENS // ROW, bf16=True, use_cpu=True,
            report_to="none", save_strategy="no", learning_rate=1e-3, weight_decay=0.1, logging_steps=1,
        )  # fmt: skip
        Trainer(llama(torch.float32), arguments, train_dataset=items, callbacks=[ticking(clock)]).train()
    return clock.result(STEP_TOKENS)


def trl(folder: Path, steps: int, packed: bool) -> dict[str, float]:
    """SFTTrainer on the same conversations; tokens per second count real tokens only."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    lines = (folder / "conversations" / "train.jsonl").read_text().splitlines()
    data = Dataset.from_list([json.loads(line) for line in lines])
    clock = Clock()
    with tempfile.TemporaryDirectory() as work:
        config = SFTConfig(
            output_dir=work, max_steps=steps, bf16=True, use_cpu=True, report_to="none", save_strategy="no",
            max_length=1024, packing=packed, per_device_train_batch_size=4 if packed else 8, logging_steps=1,
        )  # fmt: skip
        tok = AutoTokenizer.from_pretrained(folder / "model")
        one = SFTTrainer(
            str(folder / "model"),
            config,
            train_dataset=data,
            processing_class=tok,
            callbacks=[ticking(clock)],
        )
        one.train()
    seen = one.state.num_input_tokens_seen or next(
        (row["num_tokens"] for row in reversed(one.state.log_history) if "num_tokens" in row), 0
    )
    return clock.result(seen / steps)


def contend(what: str, who: str, folder: Path, steps: int, threads: int) -> dict[str, float]:
    """One contender, in this process."""
    import torch

    torch.set_num_threads(threads)
    if what == "pretrain" and who == "ours":
        config = {"size": "small", "context": ROW, "steps": steps, "batch_tokens": STEP_TOKENS,
                  "micro_tokens": MICRO_TOKENS, "eval_tokens": ROW}  # fmt: skip
        return stage("pretrain", folder, config, {"shards": "shards"}, threads)
    if what == "sft" and who == "ours":
        config = {
            "steps": steps,
            "batch_tokens": STEP_TOKENS,
            "micro_tokens": MICRO_TOKENS,
            "eval_steps": steps,
        }
        return stage("sft", folder, config, {"base": "model", "data": "conversations"}, threads)
    if what == "pretrain":
        return trainer(folder, steps) if who == "trainer" else bare(folder, steps, who == "bare-bf16")
    return trl(folder, steps, who == "trl-packed")


def gemm_peak(threads: int) -> float:
    """bf16 GFLOP/s of a 2048 x 512 x 2816 product, the largest shape of the model."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 512).bfloat16(), torch.randn(512, 2816).bfloat16()
    best = 0.0
    for _ in range(60):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048 * 512 * 2816 / (time.perf_counter() - start))
    return best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", default=["pretrain", "sft"], choices=sorted(CONTENDERS))
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
        "shape": {**SHAPE, "vocabulary": VOCAB}, "steps": args.steps, "rounds": args.rounds,
        "load_before": os.getloadavg(), "gemm_peak_gflops": round(gemm_peak(args.threads), 1), "results": {},
    }  # fmt: skip
    # glibc hands freed arrays back to the system after every step otherwise; all contenders get the same.
    keep = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
    env = {**os.environ, **keep, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as temporary:
        write_inputs(Path(temporary))
        for what in args.what:
            report["results"][what] = _race(what, Path(temporary), args, env)
    text = json.dumps(report, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)


def _race(what: str, folder: Path, args: argparse.Namespace, env: dict[str, str]) -> dict[str, Any]:
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
                best.setdefault(who, {"error": done.stderr.strip().splitlines()[-1:]})
                continue
            one = json.loads(found[-1])
            print(f"{what} {who}: {one['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
            if one["tokens_per_second"] > best.get(who, {}).get("tokens_per_second", 0.0):
                best[who] = one
    ours = best.get("ours", {}).get("tokens_per_second", 0.0)
    ratios = {
        who: round(ours / r["tokens_per_second"], 3) for who, r in best.items() if r.get("tokens_per_second")
    }
    result: dict[str, Any] = {"contenders": best, "ours_over": ratios}
    if what == "pretrain":
        # 6 multiplications per weight and token, and causal attention over rows of 512.
        flops = 6 * 27_787_264 + 6 * 2 * 8 * 512 * ROW / 2
        result["gflops"] = {
            w: round(r["tokens_per_second"] * flops / 1e9, 1) for w, r in best.items() if len(r) > 1
        }
    return result


if __name__ == "__main__":
    main()

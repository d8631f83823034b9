"""Tokens per second of generation: our engine beside `transformers.generate`, same weights, one process.

    python bench/engine.py [--size small] [--batches 1,16] [--new 64] [--threads 2] > engine.json

A random model of one of our sizes (or --folder, any model folder) is saved once and opened by both. Prompts
have different tokens and one length, answers have no stop token, both sides sample at temperature 1. Rounds
alternate between the sides and the best round of each counts, for the machine is shared. The time is that of
the whole call, prefill and sampling included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace


def best(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens per second of each side: the best of `rounds`, sides in turn, after one unmeasured call each."""
    for call in sides.values():
        call()
    result = dict.fromkeys(sides, 0.0)
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            tokens = call()
            result[name] = max(result[name], tokens / (time.perf_counter() - start))
    return result


def measure(folder: Path, quantised: Path, batch: int, dtype_name: str, args: argparse.Namespace) -> dict:
    """One row of the table."""
    import torch
    import transformers

    from caravan.compress.folder import swap
    from caravan.engine.engine import Engine
    from caravan.model.checkpoint import load_model
    from caravan.types import Sampling

    dtype = getattr(torch, dtype_name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    vocab = theirs.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab, (batch, args.prompt), generator=generator)
    prompts = ids.tolist()
    sampling = Sampling(temperature=1.0, max_tokens=args.new)
    version = iter(range(1_000_000))

    def ours(model: torch.nn.Module) -> Callable[[], int]:
        engine = Engine(model, max_seqs=batch, step_tokens=2048)

        def call() -> int:
            engine.update_weights(next(version))  # every round computes its prompts anew
            return sum(len(c[0].ids) for c in engine.generate(prompts, sampling))

        return call

    def peer() -> int:
        with torch.no_grad():
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new, do_sample=True, top_k=0
            )
        return (out.shape[1] - ids.shape[1]) * batch

    sides = {"caravan": ours(load_model(folder, dtype)), "transformers": peer}
    integer = load_model(quantised, dtype)
    swap(integer, quantised)
    sides["caravan_int4"] = ours(integer)
    speed = best(sides, args.rounds)
    return {
        "batch": batch,
        "dtype": dtype_name,
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "ratio": round(speed["caravan"] / speed["transformers"], 2),
        "ratio_int4": round(speed["caravan_int4"] / speed["transformers"], 2),
    }


def prepare(args: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """The folder both sides open, and its 4-bit copy."""
    import torch

    from caravan.model.checkpoint import save_model
    from caravan.model.sizes import derive, fresh
    from caravan.stage import Runtime
    from caravan.stages import quantize

    folder = args.folder
    if folder is None:
        folder = scratch / "model"
        spec, _ = derive(args.size, None, args.vocab, args.prompt + args.new)
        save_model(fresh(spec, 0), folder, dtype=torch.bfloat16)
    small = scratch / "int4"
    source = SimpleNamespace(path=folder)
    quantize.run(quantize.Config(bits=4), {"model": source}, small, Runtime(work=scratch))
    return folder, small


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="model folder; default: a random model of --size")
    parser.add_argument("--size", default="small", help="one of our sizes")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens per answer")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, quantised = prepare(args, Path(scratch))
        for dtype in args.dtypes.split(","):
            for batch in map(int, args.batches.split(",")):
                rows.append(measure(folder, quantised, batch, dtype, args))
                print(rows[-1], file=sys.stderr)
    report = {
        "bench": "engine",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "load_average": os.getloadavg()[0],
        },
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "model": str(args.folder or args.size),
        "prompt_tokens": args.prompt,
        "new_tokens": args.new,
        "rows": rows,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

"""Toy data for the training stages, and a way to run a stage in child processes that are killed at chosen
moments.

As a program: `training_toys.py INPUTS RUNS` does each entry [store, stage, changes of the config, kind, at]
of the JSON list RUNS in a forked child (torch is imported once): kind "step" is SIGKILL when step `at` is
reported, "fsync" at the at-th flush to disk, that is inside a checkpoint, "none" runs to the end and prints
the artefact's folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

CONFIGS = {
    "pretrain": {
        "size": "nano",
        "context": 32,
        "steps": 14,
        "batch_tokens": 128,
        "micro_tokens": 64,
        "ramp_steps": 4,
        "eval_steps": 4,
        "eval_tokens": 256,
        "keep": "best",
        "optimizer": "muon",
        "precision": "bf16",
    },
    "pretrain-base": {
        "context": 32,
        "tokens": 1400,
        "batch_tokens": 128,
        "micro_tokens": 64,
        "eval_steps": 4,
        "eval_tokens": 256,
        "only": "tables",
        "precision": "bf16",
    },
    "sft": {
        "epochs": 3.0,
        "batch_tokens": 160,
        "micro_tokens": 80,
        "keep": "best",
        "replay_share": 0.2,
        "precision": "bf16",
    },
}


def texts(count=60):
    return [
        f"Sum {i}: {i} plus {i + 1} makes {2 * i + 1}. The quick fox number {i} jumps." for i in range(count)
    ]


def write_inputs(folder: Path) -> None:
    """tokenizer, shards, conversations and a nano base model under `folder`; the same bytes every time."""
    from caravan.data import shards, tokenizer
    from caravan.model.checkpoint import save_model
    from caravan.model.sizes import derive, fresh

    tok = tokenizer.train(texts(), 300)
    tok.save(folder / "shards" / "tokenizer")
    encoded = list(shards.encode_documents(texts(), tok))
    shards.write(folder / "shards", {"train": encoded[:50], "heldout": encoded[50:]}, tok.vocab_size)
    (folder / "conversations").mkdir()
    for split, start, stop in (("train", 0, 24), ("heldout", 24, 30)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{i}+1?"},
                    {"role": "assistant", "content": str(i + 1)},
                ]
            }
            for i in range(start, stop)
        ]
        path = folder / "conversations" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec, _ = derive("nano", None, tok.vocab_size, 64)
    save_model(fresh(spec, 5), folder / "model", folder / "shards" / "tokenizer")


def artefacts(store, folder: Path):
    """The inputs of every stage, as artefacts of `store`."""
    added = {kind: store.add(folder / kind, kind) for kind in ("shards", "conversations", "model")}
    return {
        "pretrain": {"shards": added["shards"]},
        "pretrain-base": {"shards": added["shards"], "base": added["model"]},
        "sft": {"base": added["model"], "data": added["conversations"], "replay": added["shards"]},
    }


def execute(store_folder: Path, inputs: Path, stage: str, report=None, changes=None, **runtime):
    """Run a stage on the toy data through the store; `pretrain-base` is pretrain with --base."""
    from caravan import stage as stages
    from caravan.store import Store

    store, name = Store(store_folder), stage.partition("-")[0]
    cfg = stages.load("stages", name).Config(**{**CONFIGS[stage], **(changes or {})})
    rt = stages.Runtime(device="cpu", threads=1, **({"report": report} if report else {}), **runtime)
    return stages.execute(store, name, cfg, artefacts(store, inputs)[stage], rt)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _attempt(inputs: Path, store: str, stage: str, changes: dict, kind: str, at: int) -> None:
    def report(done, total, unit, **numbers):
        if kind == "step" and done >= at:
            _die()

    if kind == "fsync":
        real, calls = os.fsync, [0]

        def fsync(handle):
            calls[0] += 1
            if calls[0] == at:
                _die()
            real(handle)

        os.fsync = fsync
    art = execute(Path(store), inputs, stage, report, changes, save_steps=2)
    print(art.path, flush=True)


def main() -> None:
    import torch  # noqa: F401  (before the forks)

    from caravan.stages import pretrain, sft  # noqa: F401

    for run in json.loads(sys.argv[2]):
        child = os.fork()
        if child == 0:
            try:
                _attempt(Path(sys.argv[1]), *run)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) if run[3] != "none" else status == 0, f"{run}: status {status}"


def start(inputs: Path, runs: list, **env: str) -> subprocess.Popen:
    """The program in a process of its own, one thread."""
    here = Path(__file__)
    return subprocess.Popen(
        [sys.executable, here, inputs, json.dumps(runs)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parents[2]), **env},
    )


def finish(process: subprocess.Popen, seconds: float = 240) -> list[Path]:
    """The folders it printed; fails with what it said on stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return [Path(line) for line in out.splitlines() if line.startswith("/")]


if __name__ == "__main__":
    main()

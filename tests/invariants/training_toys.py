"""Toy data for the training stages, and a way to run a stage in child processes that are killed at chosen moments.

As a program: `training_toys.py FOLDER STAGE KILLS` runs STAGE in the store FOLDER once per entry of the JSON list KILLS
(["step", n]: SIGKILL when step n is reported; ["fsync", n]: at the n-th flush to disk, that is inside a checkpoint;
["none", 0]: to the end) and prints the artefact's id. torch is imported once; every attempt is a fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

CONFIGS = {
    "pretrain": dict(size="nano", context=32, steps=14, batch_tokens=128, micro_tokens=64, eval_steps=4,
                     eval_tokens=256, keep="best", optimizer="muon", ramp_steps=4, precision="bf16"),
    "sft": dict(epochs=3.0, batch_tokens=160, micro_tokens=80, keep="best", replay=0.2, precision="bf16"),
}  # fmt: skip


def texts(count=60):
    return [f"Sum {i}: {i} plus {i + 1} makes {2 * i + 1}. The quick fox number {i} jumps." for i in range(count)]


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
            {"messages": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": str(i + 1)}]}
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
        "sft": {"base": added["model"], "data": added["conversations"], "replay": added["shards"]},
    }


def execute(store_folder: Path, inputs: Path, stage: str, report=None, **runtime):
    """Run a stage on the toy data through the store."""
    from caravan import stage as stages
    from caravan.store import Store

    store = Store(store_folder)
    cfg = stages.load("stages", stage).Config(**CONFIGS[stage])
    rt = stages.Runtime(device="cpu", threads=1, **({"report": report} if report else {}), **runtime)
    return stages.execute(store, stage, cfg, artefacts(store, inputs)[stage], rt)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _attempt(store: Path, inputs: Path, stage: str, kind: str, at: int) -> None:
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
    art = execute(store, inputs, stage, report, save_steps=2)
    print(art.id, flush=True)


def main() -> None:
    import torch  # noqa: F401  (before the forks)

    from caravan.stages import pretrain, sft  # noqa: F401

    store, inputs, stage, kills = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    for kind, at in kills:
        child = os.fork()
        if child == 0:
            try:
                _attempt(store, inputs, stage, kind, at)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) == (kind != "none"), f"{kind} {at}: status {status}"


if __name__ == "__main__":
    main()

"""The whole road in one command: raw text to a chat page, offline, on a laptop.

Without arguments it builds a small assistant that knows Python's own documentation, from what every Python
installation carries and from questions, sums and preferences generated here (docs/seeds.md). With --text,
--chats or --preferences the same is done on your data; with --base an existing checkpoint is taken instead
of pre-training.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caravan import stage
from caravan.recipes.flow import Caravan
from caravan.recipes.table import Row, print_table, rows_of, write_table
from caravan.store import Artefact, Store, digest, file_digest
from caravan.types import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is learned, by how large a model, and what happens at the end."""

    text: Path | None = None
    """Your own texts: a file or folder of .txt, .md, .jsonl[.gz|.zst] or .parquet."""
    chats: Path | None = None
    """Your own conversations: Alpaca, ShareGPT or OpenAI messages."""
    preferences: Path | None = None
    """Your own preferences: HH-RLHF, prompt/chosen/rejected or K-wise rankings."""
    base: str = ""
    """Start from this checkpoint (folder, artefact or hf:ORG/NAME; Llama, Qwen2 or GPT-2 type) instead of
    pre-training."""
    size: str = "tiny"
    """Size of the fresh model: nano, tiny, small, gpt2, 1b."""
    vocab: int = 4096
    """Entries of the tokenizer."""
    scale: float = 1.0
    """Multiplies the seed data and the steps of every stage: 0.05 is a first look in a minute, at the price
    of quality."""
    seed: int = 0
    """Of everything that is drawn."""
    report: Path = Path("report.html")
    """Where the passport is written."""
    serve: bool = True
    """Open the chat page at the end (--no-serve: stop after the report)."""
    port: int = 8000
    """Port of the chat page; if it is taken, the next free one."""


def plan(cfg: Config) -> dict[str, dict[str, Any]]:
    """Settings per stage, all in one place: a fresh model bears high rates, a checkpoint wants care.

    Tuned on two CPU cores; docs/log.md says how.
    """

    def few(steps: int, least: int) -> int:
        return max(least, round(steps * cfg.scale))

    if cfg.base:
        return {
            "sft": {"epochs": 2.0},
            "reward": {},
            "prefer": {},
            "rl": {"steps": few(50, 2), "max_new_tokens": 64},
        }
    muon = {"optimizer": "muon"}
    return {
        "pretrain": muon
        | {"size": cfg.size, "context": 512, "tokens": few(600_000, 8192), "batch_tokens": 4096}
        | {"lr": 4e-3, "weight_decay": 0.01},
        "sft": muon | {"epochs": 1.0, "batch_tokens": 4096, "lr": 3e-3, "replay_share": 0.05},
        "reward": muon | {"epochs": 1.0, "batch_tokens": 2048, "lr": 1e-3},
        "prefer": {"epochs": 1.0, "batch_tokens": 2048, "lr": 3e-5, "beta": 0.1, "nll_weight": 1.0},
        "rl": {"steps": few(20, 2), "batch_prompts": 64, "minibatches": 2, "max_new_tokens": 64}
        | {"lr": 1.2e-4, "ppo": {"lam": 1.0}, "ptx_weight": 1.0},
    }


def main(cfg: Config, store: Store, rt: stage.Runtime) -> int:
    """Walk the road; 0 when the report is written (and the chat page was closed)."""
    for path in (cfg.text, cfg.chats, cfg.preferences):
        if path is not None and not path.exists():
            raise UserError(f"there is no file or folder {path}", "the path is taken from the current folder")
    if not 0 < cfg.scale <= 100:
        raise UserError(f"scale is {cfg.scale}", "1 is the full quickstart, 0.05 a first look")
    if not cfg.base:
        from caravan.model.sizes import shape

        shape(cfg.size, None)  # a slip here must not come up after minutes of other stages
    _may_write(cfg.report)
    c = Caravan(store, rt)
    road = walk(c, cfg)
    page = finish(c, cfg, road)
    if cfg.serve:
        return _serve(cfg, store, rt, road)
    print(page)
    return 0


def _may_write(page: Path) -> None:
    """UserError, before the road, where its last step could not write the report."""
    folder = next(p for p in page.absolute().parents if p.exists())
    if page.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--report {page} cannot be written", "give a file in a folder that is yours")


@dataclass(frozen=True)
class Road:
    """What the road produced."""

    models: dict[str, Artefact]
    """Name in the table -> model, in order."""
    evaluations: dict[str, Artefact]
    before: dict[str, str]
    """Row -> the row it is compared with."""
    best: str
    """Row of the model that is served."""


def walk(c: Caravan, cfg: Config) -> Road:
    """All stages from raw text to evaluations; the call graph is the flow."""
    settings, seeds = plan(cfg), seed_files(c.store, cfg)
    seeded = {"seed": cfg.seed}
    text = c.corpus(raw=c.add(cfg.text or seeds / "text"))
    chats = c.conversations(raw=c.add(cfg.chats or seeds / "chats.jsonl"))
    if cfg.base:
        base = c.model(cfg.base)
        shards = c.shards(corpus=text, tokenizer=base)
    else:
        tokenizer = c.tokenizer(corpus=text, chats=chats, vocab=cfg.vocab)
        shards = c.shards(corpus=text, tokenizer=tokenizer)
        base = c.pretrain(shards=shards, **settings["pretrain"], **seeded)
    sft = c.sft(base=base, data=chats, replay=shards, **settings["sft"], **seeded)
    preferences = c.preferences(raw=c.add(cfg.preferences or seeds / "preferences.jsonl"))
    reward = c.reward(base=sft, data=preferences, references=chats, **settings["reward"], **seeded)
    dpo = c.prefer(policy=sft, data=preferences, **settings["prefer"], **seeded)
    prompts = chats if cfg.chats else c.conversations(raw=c.add(seeds / "prompts.jsonl"))
    ppo = c.rl(policy=sft, reward=reward, prompts=prompts, ptx=chats, **settings["rl"], **seeded)
    models = {"base": base, "SFT": sft, "DPO": dpo, "PPO": ppo}
    before = {"SFT": "base", "DPO": "SFT", "PPO": "SFT", "int8": "PPO", "int4": "PPO"}
    models["int8"] = c.quantize(model=ppo, bits=8)
    models["int4"] = c.quantize(model=ppo, bits=4, method="gptq", calibration=chats)
    questions = c.add(question_files(c.store, cfg, seeds, chats))
    evaluations = {
        name: c.evaluate(
            model=model,
            questions=questions,
            shards=shards,
            reward=reward,
            reference=sft,
            corpus=text,
            chats=chats,
            max_tokens=64,
            parallel=64,
            sampled=160,
        )
        for name, model in models.items()
    }
    return Road(models, evaluations, before, best="PPO")


LEAST = {
    "text_bytes": 200_000,
    "facts": 20,
    "arithmetic": 200,
    "unknown": 10,
    "mixed": 50,
    "preferences": 100,
    "heldout_preferences": 40,
    "heldout_chats": 20,
    "prompts": 64,
    "eval_facts": 20,
    "eval_arithmetic": 20,
}
"""What a scale below 1 shrinks, and how small at most: every stage still has something to do."""


def seed_files(store: Store, cfg: Config) -> Path:
    """The folder of seed data, written once per (code that writes it, Python version, settings)."""
    from caravan import synth
    from caravan.synth.seeds import Sizes, write_quickstart

    full = Sizes()
    shrunk = {
        name: max(least, round(getattr(full, name) * min(cfg.scale, 1.0))) for name, least in LEAST.items()
    }
    sizes = replace(full, **shrunk)
    code = [file_digest(path) for path in sorted(Path(synth.__file__).parent.glob("*.py"))]
    asked = {"sizes": str(sizes), "seed": cfg.seed, "python": sys.version, "code": code}
    folder = store.root / "seeds" / digest(asked)[:12]
    if not folder.exists():
        draft = Path(tempfile.mkdtemp(dir=_made(store.root / "seeds")))
        write_quickstart(draft, seed=cfg.seed, sizes=sizes)
        try:
            draft.rename(folder)
        except OSError:  # another process was first, with the same bytes
            shutil.rmtree(draft)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def question_files(store: Store, cfg: Config, seeds: Path, chats: Artefact) -> Path:
    """What the models are asked: held-out seed questions, or the first turns of the user's held-out
    conversations."""
    folder = _made(store.root / "seeds" / f"questions-{chats.id[:12]}")
    if not cfg.chats:
        for name in ("eval_facts.jsonl", "eval_arithmetic.jsonl"):
            (folder / name).write_bytes((seeds / name).read_bytes())
        return folder
    rows: list[dict[str, Any]] = []
    for line in (chats / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:200]:
        row = json.loads(line)
        roles = [m["role"] for m in row["messages"]]
        if "assistant" in roles:
            at = roles.index("assistant")
            rows.append({"id": row.get("id") or f"chat/{len(rows)}", "messages": row["messages"][:at],
                         "answer": row["messages"][at]["content"], "kind": "chat"})  # fmt: skip
    if not rows:
        raise UserError(
            f"{cfg.chats} leaves no held-out conversation to evaluate on", "give at least fifty conversations"
        )
    (folder / "heldout.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8"
    )
    return folder


def finish(c: Caravan, cfg: Config, road: Road) -> Path:
    """Print the table, write it and the passport."""
    from caravan.report import passport

    rows: list[Row] = rows_of(road.evaluations, road.before)
    print_table(rows)
    page = passport.build(c.store, c.trail, [r.cells for r in rows], cfg.report, road.models[road.best])
    write_table(rows, cfg.report.with_suffix(".json"))
    print(f"report: {page}", file=sys.stderr)
    for name, model in road.models.items():
        c.store.name(f"quickstart-{name.lower()}", model)
    return page


def _serve(cfg: Config, store: Store, rt: stage.Runtime, road: Road) -> int:
    from caravan.serve import run

    others = tuple(f"{name}={model.ref}" for name, model in road.models.items() if name != road.best)
    config = run.Config(
        model=road.models[road.best].ref,
        name=road.best,
        more=others,
        port=_free_port(cfg.port),
        # A model this small knows one good answer: at 0.3 two sums of 24 went wrong. Regenerate is warmer.
        temperature=None if cfg.base else 0.0,
    )
    return run.main(config, store, rt)


def _free_port(wanted: int) -> int:
    import socket

    for port in range(wanted, wanted + 20):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError(f"ports {wanted} to {wanted + 19} are all taken", "give another with --port")

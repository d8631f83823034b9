"""Measure a model: held-out text, questions with known answers, reward, KL to a reference; with intervals.

    scores.json    {metric: {value, low, high, n}}: 95 % intervals (bootstrap; Wilson's for accuracies)
    items.jsonl    {task, id, score, weight}: one line per item and metric, in the same order for every model
    samples.jsonl  some of the texts the model wrote
    contamination.json   questions found in `corpus` and `chats`, the training text, if these are given

A model that was only pretrained is asked through the same chat template as the others: what fine-tuning
adds is part of what is measured. `evals.compare.compare(a, b)` compares two evaluations item by item.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from caravan import stage
from caravan.data import records
from caravan.data.shards import Shards
from caravan.data.tokenizer import Tokenizer
from caravan.evals.contamination import contamination
from caravan.evals.items import Item, read_questions
from caravan.evals.runner import Judge, Limits, Subject, World, evaluate, summarise
from caravan.model.checkpoint import check_vocab, load_model, load_reward
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.systems import runtime
from caravan.types import UserError

INPUTS = {
    "model": "model",
    "questions": "raw",
    "shards": "shards?",
    "reward": "reward?",
    "reference": "model?",
    "corpus": "corpus?",
    "chats": "conversations?",
}
OUTPUT = "evaluation"
USES = {"tasks": "evals/tasks"}
VERSION = 2
RANKS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is asked, and how much of it."""

    tasks: tuple[str, ...] = ("auto",)
    """Names of tasks; auto: every task the inputs have the means for."""
    max_questions: int = 0
    """Questions per task at most; 0 asks all."""
    max_tokens: int = 0
    """New tokens per answer at most; 0 leaves it to the task (80, sums 64)."""
    text_tokens: int = 60_000
    """Held-out tokens read for bits per byte; 0 reads all."""
    sampled: int = 64
    """Prompts answered at temperature 1, for reward and KL."""
    sampled_tokens: int = 64
    """New tokens of such an answer at most."""
    shown: int = 8
    """Texts kept in samples.jsonl per task."""
    parallel: int = 32
    """Answers generated side by side; Config, since another batch rounds differently in the last bit."""
    resamples: int = 10_000
    """Bootstrap resamples."""
    seed: int = 0
    """Of sampled answers and resampling."""
    precision: runtime.Precision = "fp32"
    """Dtype of weights and activations. fp32 keeps rounding out of the comparison; bf16 measures what is
    served."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    """Evaluate `model`; facts hold every metric and what was cut or refused."""
    out.mkdir(parents=True, exist_ok=True)
    machine = runtime.setup(rt, cfg.seed, cfg.precision)
    items, refused = read_questions(inputs["questions"].path, rt.strict)
    tokenizer = Tokenizer.load(inputs["model"].path)
    model = load_model(inputs["model"].path, machine.dtype, machine.device).eval()
    check_vocab(model.spec, tokenizer.vocab_size)
    world = World(
        Subject(model, tokenizer), items, limits=_limits(cfg), report=rt.report,
        shards=Shards.open(inputs["shards"].path, "heldout") if "shards" in inputs else None,
    )  # fmt: skip
    if "reward" in inputs:
        judge = load_reward(inputs["reward"].path, machine.dtype, machine.device).eval()
        world.judge = Judge(judge, Tokenizer.load(inputs["reward"].path))
    if "reference" in inputs:
        world.reference = load_model(inputs["reference"].path, machine.dtype, machine.device).eval()
    evaluate(world, _tasks(cfg.tasks))
    if not world.results:
        raise UserError(
            "nothing was measured: no task fits the questions and inputs", "see --tasks, --shards, --reward"
        )
    scores = summarise(world.results, resamples=cfg.resamples, seed=cfg.seed)
    page = {name: asdict(found) for name, found in scores.items()}
    (out / "scores.json").write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    rows = (
        {"task": r.task, "id": r.id, "score": r.score, "weight": r.weight, "kind": r.kind}
        for r in world.results
    )
    _write(out / "items.jsonl", rows)
    _write(out / "samples.jsonl", world.samples)
    if refused:
        _write(out / "quarantine.jsonl", refused)
    facts: dict[str, Any] = {name: found.value for name, found in scores.items()}
    counts = {"questions": len(items), "questions_refused": len(refused), **world.notes}
    if refused:
        facts |= {"quarantined": len(refused), "quarantined_first": [row["reason"] for row in refused[:5]]}
    if texts := _training_texts(inputs):
        facts["contamination"] = _contamination(items, texts, out)
    return {**facts, **counts, "dtype": str(machine.dtype).removeprefix("torch.")}


def _training_texts(inputs: Mapping[str, Artefact]) -> list[Iterable[str]]:
    """What the model was trained on, as far as it was given."""
    found: list[Iterable[str]] = []
    if "corpus" in inputs:
        found.append(d.text for d in records.read_documents(inputs["corpus"] / "train.jsonl.zst"))
    if "chats" in inputs:
        chats = records.read_conversations(inputs["chats"] / "train.jsonl")
        found.append("\n".join(m.content for m in chat.messages) for chat in chats)
    return found


def _contamination(items: Sequence[Item], texts: Iterable[Iterable[str]], out: Path) -> dict[str, int]:
    """Counts for the facts; the ids go into contamination.json."""
    seen = contamination(items, itertools.chain.from_iterable(texts))
    (out / "contamination.json").write_text(json.dumps(asdict(seen), indent=1) + "\n", encoding="utf-8")
    counts = {name: len(getattr(seen, name)) for name in ("questions", "answers", "both")}
    return {**counts, "checked": seen.checked, "texts": seen.texts}


def _limits(cfg: Config) -> Limits:
    shared = ("max_tokens", "text_tokens", "sampled", "sampled_tokens", "shown", "parallel", "seed")
    return Limits(questions=cfg.max_questions, **{name: getattr(cfg, name) for name in shared})


def _tasks(chosen: tuple[str, ...]) -> dict[str, Any]:
    names = stage.names("evals/tasks") if chosen == ("auto",) else list(chosen)
    return {name: stage.load("evals/tasks", name) for name in names}


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

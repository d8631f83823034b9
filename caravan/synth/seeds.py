"""Everything `caravan quickstart` learns from, written into one folder: offline, seeded, in a few seconds.

    text/*.jsonl            documents for pretraining, one file per kind
    chats.jsonl             conversations (OpenAI messages); "split": "heldout" is never trained
    preferences.jsonl       {"prompt", "responses", "ranks", "split"}
    prompts.jsonl           conversations whose questions reinforcement learning practises on
    eval_facts.jsonl        {"id", "question", "answer", "kind"}: held-out phrasings about taught functions
    eval_arithmetic.jsonl   the same about held-out pairs of numbers

One (Python version, seed, sizes) gives one set of bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.synth import arithmetic, persona, preferences, pydocs, qa
from caravan.synth.arithmetic import Style
from caravan.synth.facts import Fact, facts
from caravan.types import Conversation, Message, Ranking


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything is written."""

    text_bytes: int = 3_000_000
    """Pretraining text, bytes in all kinds together."""
    facts: int = 400
    """Facts taught at most, in teaching order."""
    per_fact: int = 18
    """Trained questions per fact, each in another phrasing."""
    arithmetic: int = 8_000
    """Trained sums."""
    persona_repeats: int = 4
    """How often each question about the assistant itself opens a longer conversation."""
    unknown: int = 200
    """Questions about functions that do not exist."""
    mixed: int = 600
    """Conversations of several turns."""
    heldout_chats: int = 200
    """Held-out conversations of each of facts and sums."""
    preferences: int = 1_200
    """Trained rankings."""
    heldout_preferences: int = 300
    """Held-out rankings."""
    prompts: int = 2_000
    """Prompts for reinforcement learning."""
    eval_facts: int = 200
    """Held-out questions about taught facts."""
    eval_arithmetic: int = 120
    """Held-out sums."""
    zh_share: float = 0.3
    """Part of questions asked in Chinese."""
    wordy_share: float = 0.35
    """Part of trained answers about functions with empty sentences around them, as demonstrations by many
    hands
    have. Preferences speak against them, so there is something for alignment to do."""
    style: Style = "steps"
    """Answers to sums: worked by columns, or the number alone."""


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _chat_row(chat: Conversation, split: str) -> dict[str, Any]:
    messages = [{"role": m.role, "content": m.content} for m in chat.messages]
    return {"id": chat.id, "messages": messages, "source": chat.source, "task": chat.source, "split": split}


def _ranking_row(ranking: Ranking, split: str) -> dict[str, Any]:
    return {
        "id": ranking.id,
        "prompt": [{"role": m.role, "content": m.content} for m in ranking.prompt],
        "responses": list(ranking.responses),
        "ranks": list(ranking.ranks),
        "source": ranking.source,
        "split": split,
    }


def training_chats(taught: tuple[Fact, ...], sizes: Sizes, seed: int) -> list[Conversation]:
    """All trained conversations, shuffled. The multi-turn ones are made of the single ones."""
    asked = qa.fact_conversations(taught, per_fact=sizes.per_fact, zh_share=sizes.zh_share, seed=seed)
    sums = arithmetic.conversations(sizes.arithmetic, seed=seed, style=sizes.style, zh_share=sizes.zh_share)
    talk = persona.conversations("train")
    unknown = persona.unknown(sizes.unknown, taught, seed=seed)
    where = qa.where_conversations(taught, share=0.5, seed=seed)
    rng = random.Random(f"{seed}:chats")
    asked = _by_many_hands(asked, sizes.wordy_share, seed)
    pools = (asked, asked, sums, talk)
    mixed = []
    for index in range(sizes.mixed):
        parts = [rng.choice(rng.choice(pools)) for _ in range(rng.choice((2, 2, 3)))]
        mixed.append(qa.joined(parts, id=f"mixed/{index}"))
    # A few dozen questions among thousands: said again at the head of longer talks (a copy would be dropped).
    for chat in talk:
        for turn in range(sizes.persona_repeats):
            parts = [chat, rng.choice(rng.choice(pools[:3]))]
            mixed.append(qa.joined(parts, id=f"mixed/{chat.id}/{turn}"))
    chats = [*asked, *sums, *talk, *unknown, *where, *mixed]
    rng.shuffle(chats)
    return chats


def _by_many_hands(chats: list[Conversation], wordy_share: float, seed: int) -> list[Conversation]:
    """The same conversations, a share of the answers said with empty sentences around them."""
    out = []
    for chat in chats:
        rng = random.Random(f"{seed}:hand:{chat.id}")
        if rng.random() < wordy_share:
            *before, last = chat.messages
            chinese = any("\u4e00" <= c <= "\u9fff" for c in before[-1].content)
            text = preferences.wordy(last.content, "zh" if chinese else "en", rng)
            chat = Conversation((*before, Message(last.role, text)), chat.id, chat.source)
        out.append(chat)
    return out


def heldout_chats(taught: tuple[Fact, ...], sizes: Sizes, seed: int) -> list[Conversation]:
    """Conversations in held-out phrasings and about held-out pairs of numbers; never trained."""
    rng = random.Random(f"{seed}:chats:heldout")
    out = []
    for index in range(sizes.heldout_chats):
        lang = "zh" if rng.random() < sizes.zh_share else "en"
        question, reply = qa.ask(rng.choice(taught), "heldout", lang, rng)
        out.append(qa.single(question, reply, id=f"fact/heldout/{index}", source="fact"))
    out += arithmetic.conversations(
        sizes.heldout_chats, seed=seed, split="heldout", style=sizes.style, zh_share=sizes.zh_share
    )
    return out + persona.conversations("heldout")


def eval_facts(taught: tuple[Fact, ...], count: int, *, zh_share: float, seed: int) -> list[dict[str, Any]]:
    """`count` held-out questions: facts in a seeded order, another fact each time until all were asked."""
    rng = random.Random(f"{seed}:eval:facts")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        for fact in rng.sample(taught, min(len(taught), count - len(rows))):
            lang = "zh" if rng.random() < zh_share else "en"
            question, _ = qa.ask(fact, "heldout", lang, rng)
            rows.append(
                {"id": f"fact/{len(rows)}/{fact.name}", "question": question, "answer": fact.summary,
                 "reference": qa.answer(fact, lang), "kind": "fact", "match": "contains", "lang": lang}
            )  # fmt: skip
    return rows


def eval_arithmetic(count: int, *, style: Style, zh_share: float, seed: int) -> list[dict[str, Any]]:
    """`count` different held-out sums, two digits by two at most."""
    rng = random.Random(f"{seed}:eval:arithmetic")
    rows: list[dict[str, Any]] = []
    seen: set[arithmetic.Sum] = set()
    while len(rows) < count:
        problem = arithmetic.draw(rng, split="heldout")
        if problem in seen:
            continue
        seen.add(problem)
        lang = "zh" if rng.random() < zh_share else "en"
        question = arithmetic.ask(problem, lang, rng)
        rows.append(
            {"id": f"arithmetic/{len(rows)}", "question": question, "answer": str(problem.result),
             "reference": arithmetic.solve(problem, style), "kind": "arithmetic", "lang": lang}
        )  # fmt: skip
    return rows


def _prompts(chats: list[Conversation], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` trained conversations of one question: mostly facts, some sums and a little talk."""
    rng = random.Random(f"{seed}:prompts")
    shares = {"fact": 0.8, "arithmetic": 0.12, "persona": 0.08}
    rows = []
    for source, share in shares.items():
        pool = [c for c in chats if c.source == source]
        for chat in rng.sample(pool, min(len(pool), round(count * share))):
            rows.append(_chat_row(chat, "train"))
    rng.shuffle(rows)
    return rows


def write_quickstart(folder: Path, *, seed: int = 0, sizes: Sizes | None = None) -> dict[str, int]:
    """Write the whole set under `folder` (made if need be); returns rows per file, facts taught and text
    bytes."""
    sizes = sizes or Sizes()
    folder = Path(folder)
    taught = facts()[: sizes.facts]
    counts: dict[str, int] = {"facts": len(taught), "text_bytes": 0}
    for kind in pydocs.KINDS:
        documents = list(
            pydocs.documents(
                limit_bytes=sizes.text_bytes, seed=seed, kinds=(kind,), taught=taught, style=sizes.style
            )
        )
        lines = ({"id": d.id, "text": d.text, "source": d.source, "lang": d.lang} for d in documents)
        counts[f"text/{kind}.jsonl"] = _write(folder / "text" / f"{kind}.jsonl", lines)
        counts["text_bytes"] += sum(len(d.text.encode()) for d in documents)
    trained = training_chats(taught, sizes, seed)
    held = heldout_chats(taught, sizes, seed)
    rows = [_chat_row(c, "train") for c in trained] + [_chat_row(c, "heldout") for c in held]
    counts["chats.jsonl"] = _write(folder / "chats.jsonl", rows)
    ranked: list[dict[str, Any]] = []
    for split, count in (("train", sizes.preferences), ("heldout", sizes.heldout_preferences)):
        found = preferences.rankings(
            count, taught, seed=seed, split=split, style=sizes.style, zh_share=sizes.zh_share
        )
        ranked += [_ranking_row(r, split) for r in found]
    counts["preferences.jsonl"] = _write(folder / "preferences.jsonl", ranked)
    counts["prompts.jsonl"] = _write(folder / "prompts.jsonl", _prompts(trained, sizes.prompts, seed))
    asked = eval_facts(taught, sizes.eval_facts, zh_share=sizes.zh_share, seed=seed)
    counts["eval_facts.jsonl"] = _write(folder / "eval_facts.jsonl", asked)
    asked = eval_arithmetic(sizes.eval_arithmetic, style=sizes.style, zh_share=sizes.zh_share, seed=seed)
    counts["eval_arithmetic.jsonl"] = _write(folder / "eval_arithmetic.jsonl", asked)
    return counts

"""Read preferences of any known format (pairs, rankings or labelled answers), check and deduplicate them,
keep a part out of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from caravan.data import records
from caravan.data.dedup import SameKey
from caravan.stage import Runtime
from caravan.stages._intake import Intake, Languages, Reading, Sizes, halves
from caravan.store import Artefact
from caravan.types import Labelled, Message, Ranking

INPUTS = {"raw": "raw", "benchmarks": "raw?"}
OUTPUT = "preferences"
USES: dict[str, str] = {}
VERSION = 4
LABELS = ".labels.jsonl"
"""Single answers with a label lie beside the rankings, in train.labels.jsonl and heldout.labels.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    heldout_share: float = 0.05
    """Share kept out of training, by a hash of the prompt; `"split"` in a record wins."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    intake = Intake(OUTPUT, cfg, inputs, out, rt)
    rankings, labels = intake.shelf("rankings"), intake.shelf("labels", LABELS)
    prompts = SameKey(rt.work, intake.memory_bytes)
    for found in intake.found("preferences"):
        value = found.value
        assert isinstance(value, Ranking | Labelled)
        prompt, problem = intake.ordered(value.prompt)
        value = replace(value, prompt=prompt)
        responses = value.responses if isinstance(value, Ranking) else (value.response,)
        problem = problem or _problem(prompt, responses, cfg.max_chars)
        if isinstance(value, Ranking):
            problem = problem or _unordered(value)
        if problem:
            intake.refuse(found, problem, _shown(prompt, responses))
            continue
        key = records.digest_of(*records.words_of(prompt))
        order = map(str, value.ranks) if isinstance(value, Ranking) else [str(value.good)]
        digest = records.digest_of(key, *responses, *order)
        value = replace(value, id=value.id or digest[:16])
        text = "\n".join([*(m.content for m in prompt if m.role != "system"), *responses])
        shelf = rankings if isinstance(value, Ranking) else labels
        shelf.add(records.dump(value), value.id, digest, key, found.split, text)
        prompts.add_digests([halves(key)])  # one per line on any shelf: its number is the line's
    intake.need(len(rankings) + len(labels), "preference")
    tally = _Tally(prompts)
    written = rankings.write(out, cfg.heldout_share, tally.rankings)
    facts = {"rankings": written["train"] + written["heldout"], **written}
    single = labels.write(out, cfg.heldout_share, tally.labels) if len(labels) else {}
    if single:
        facts |= {"labels": single["train"] + single["heldout"], "train_labels": single["train"],
                  "heldout_labels": single["heldout"]}  # fmt: skip
        for name in {"duplicates", "near_duplicates", "contaminated", "removed"} & single.keys():
            facts[name] += single[name]
    else:
        labels.close()
    return {**facts, "joined": intake.counts["joined"], **tally.facts(), **intake.facts()}


def _problem(prompt: Sequence[Message], responses: Sequence[str], max_chars: int) -> str | None:
    """What was expected of the contents and is not there."""
    if not prompt or prompt[-1].role not in ("user", "tool"):
        return "a question before the answers"
    for turn, m in enumerate(prompt, 1):
        if m.role != "tool" and not (m.content.strip() or m.tool_calls or m.tools):
            return f"turns with a text (turn {turn}, {m.role}, is empty)"
    if empty := next((k for k, r in enumerate(responses, 1) if not r.strip()), 0):
        return f"answers with a text (answer {empty} is empty)"
    size = sum(len(m.content) for m in prompt) + max(map(len, responses), default=0)
    if size > max_chars:
        return f"at most {max_chars:,} characters (there are {size:,})"
    return None


def _unordered(ranking: Ranking) -> str | None:
    """Why a ranking says nothing."""
    if len(ranking.responses) < 2:
        return "two answers or more"
    if len(set(ranking.ranks)) < 2:
        return "answers of which one is better than another (all are ties)"
    if any(p.chosen == p.rejected for p in ranking.pairs()):
        return "different texts where one is better than the other"
    return None


class _Tally:
    """Counts of what was kept (near duplicates that are dropped afterwards included)."""

    def __init__(self, prompts: SameKey) -> None:
        self.counts: Counter[str] = Counter()
        self._asked_before = prompts.repeated()
        self.languages = Languages()
        self.asked, self.answers = Sizes(), Sizes()

    def rankings(self, numbers: np.ndarray, lines: Sequence[bytes]) -> None:
        self._note(numbers, [records.ranking_of(orjson.loads(line)) for line in lines])

    def labels(self, numbers: np.ndarray, lines: Sequence[bytes]) -> None:
        self._note(numbers, [records.labelled_of(orjson.loads(line)) for line in lines])

    def _note(self, numbers: np.ndarray, values: Sequence[Ranking | Labelled]) -> None:
        # The first line with a prompt is no copy of another one, so it comes by here.
        for value, before in zip(values, self._asked_before.take(numbers).tolist(), strict=True):
            self._add(value, not before)

    def _add(self, value: Ranking | Labelled, first: bool) -> None:
        if first:
            self.counts["prompts"] += 1
            self.asked.add(sum(len(m.content) for m in value.prompt))
            self.languages.add(next(m.content for m in reversed(value.prompt) if m.role == "user"))
        if isinstance(value, Labelled):
            self.counts["good" if value.good else "bad"] += 1
            self.answers.add(len(value.response))
            return
        self.counts["kwise"] += len(value.responses) > 2
        self.counts["with_ties"] += len(set(value.ranks)) < len(value.ranks)
        for response in value.responses:
            self.answers.add(len(response))
        for pair in value.pairs():
            self.counts["pairs"] += 1
            self.counts["better_is_longer"] += len(pair.chosen) > len(pair.rejected)

    def facts(self) -> dict[str, Any]:
        counts = self.counts
        labels = {k: counts[k] for k in ("good", "bad")} if counts["good"] + counts["bad"] else {}
        return {
            "prompts": counts["prompts"],
            "pairs": counts["pairs"],
            "kwise": counts["kwise"],
            "with_ties": counts["with_ties"],
            **labels,
            "better_is_longer": round(counts["better_is_longer"] / max(1, counts["pairs"]), 4),
            "prompt_chars": self.asked.facts(),
            "answer_chars": self.answers.facts(),
            "languages": self.languages.facts(),
        }


def _shown(prompt: Sequence[Message], responses: Sequence[str]) -> str:
    return " | ".join(
        [*(f"{m.role}: {m.content[:40]}" for m in prompt), *(f"answer: {r[:40]}" for r in responses)]
    )

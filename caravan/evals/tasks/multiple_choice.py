"""Multiple choice by log-likelihood, as the lm-evaluation-harness defines it.

Each choice is scored by the *sum* of the log-probabilities of its tokens after the prompt:

    multiple_choice              acc: argmax ll
    multiple_choice.acc_norm     argmax ll / len(choice) in characters (its paper says bytes)
    multiple_choice.acc_bytes    argmax ll / UTF-8 bytes of the choice; differs from acc_norm for Chinese

The first of equal choices wins, so a model that says the same of all always answers A. A row with
`question` is put through the chat template and the choice is the answer; a row with `context` is plain
text, continued by a space and the choice, tokenised as one string and cut behind the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from caravan.evals.items import Item
from caravan.types import Message

KIND = "choices"
VERSION = 1
CHECKED = True

EXAMPLES = (
    {"id": "x", "question": "Which is a fruit?", "choices": ["stone", "apple", "车"], "answer": 1},
    {"id": "y", "context": "The sky is", "choices": ["green", "a bird", "blue"], "answer": "C"},
)


@dataclass(frozen=True, slots=True)
class Choices:
    """What to score: turns of a chat, or plain `context`; and the continuations."""

    messages: tuple[Message, ...]
    context: str | None
    continuations: tuple[str, ...]


def load(items: Sequence[Item]) -> list[Item]:
    """The questions that have choices."""
    return [item for item in items if item.choices]


def prompt(item: Item) -> Choices:
    """The prompt and one continuation per choice."""
    context = item.row.get("context")
    if isinstance(context, str):
        return Choices(item.messages, context, tuple(" " + choice for choice in item.choices))
    return Choices(item.messages, None, item.choices)


def score(item: Item, ll_C: Sequence[float]) -> dict[str, float]:
    """Log-likelihood per choice -> acc, acc_norm, acc_bytes; all 0 if nothing was answered."""
    names = {"multiple_choice": np.ones(len(item.choices))}
    names["multiple_choice.acc_norm"] = np.array([max(1, len(c)) for c in item.choices], float)
    names["multiple_choice.acc_bytes"] = np.array([max(1, len(c.encode())) for c in item.choices], float)
    if not len(ll_C):
        return dict.fromkeys(names, 0.0)
    ll = np.asarray(ll_C, float)
    return {name: float(int(np.argmax(ll / length)) == item.gold) for name, length in names.items()}

"""Bits per byte of held-out text: how well the model predicts it, whatever its vocabulary.

    bits_per_byte = - sum log2 P(token | tokens before, same document) / sum UTF-8 bytes of those tokens

Each document is scored apart, in disjoint windows that see one token back, as the rolling log-likelihood of
the lm-evaluation-harness does. One departure: a document's first token is context and is not scored, its
bytes are not counted. Our training never predicts it either (documents do not see each other), so a prefix
token would be something the model has not met.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from caravan.data.shards import Shards
from caravan.data.tokenizer import Tokenizer

KIND = "text"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids of a document, without the end mark; `size` is the bytes of all but the first token."""

    id: str
    ids: tuple[int, ...]
    size: int


def load(shards: Shards, tokenizer: Tokenizer, max_tokens: int = 0) -> Iterator[Text]:
    """Documents of two tokens or more, in order, until `max_tokens` are reached (0: all)."""
    seen = 0
    for index, row in enumerate(shards.documents()):
        ids = [int(i) for i in row]
        if ids and ids[-1] == tokenizer.eos:
            ids.pop()
        if len(ids) < 2:
            continue
        if max_tokens and seen + len(ids) > max_tokens:
            return
        seen += len(ids)
        yield Text(f"document/{index}", tuple(ids), sum(len(tokenizer.bytes_of(i)) for i in ids[1:]))


def score(text: Text, nats: float) -> tuple[float, float]:
    """(bits, bytes) of a document whose tokens after the first have a negative log-likelihood of `nats`."""
    return nats / math.log(2), float(text.size)

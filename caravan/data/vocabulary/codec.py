"""What turns text into ids underneath a tokenizer: the `tokenizers` library, or our own greedy matchers.

A codec never finds a special token in text: it is given a definition in which no text leads to one.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import tokenizers

from caravan.data.vocabulary import cpm, greedy, merges
from caravan.data.vocabulary.normaliser import Normaliser
from caravan.types import UserError

_BYTE_PIECE = re.compile("(?<=<)(?=0x[0-9A-F]{2}>)")
"""Inside the text of a byte piece, which a unigram model would match where somebody typed it."""


class Codec(Protocol):
    """Texts here are well-formed (no lone surrogates). `begins`: no text stands before."""

    never_special: bool
    """No text at all leads to a special token's id."""

    def vocabulary(self) -> dict[str, int]: ...

    def encode(self, text: str, begins: bool = True) -> list[int]: ...

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...

    def words(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Per text, the ids of each word that the split cuts."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...


def open_codec(definition: dict[str, Any], config: dict[str, Any], special: dict[str, int]) -> Codec:
    """The codec of a definition; `special`: texts that must not become their ids. Raises UserError."""
    if greedy.is_greedy(definition):
        return greedy.Greedy(definition)
    if cpm.family_of(definition):
        return cpm.Words(definition)
    if config.get("sentencepiece_normalizer"):
        return SentencePieceLike(definition, special)
    return Library(definition, special)


class Library:
    """The `tokenizers` library."""

    def __init__(self, definition: dict[str, Any], special: dict[str, int]) -> None:
        self._backend = backend(definition, special)
        bare = without_prefix(definition)
        self._later = self._backend if bare is None else backend(bare, special)
        self.never_special = _never_special(definition, special)

    def vocabulary(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        chosen = self._backend if begins else self._later
        ids: list[int] = chosen.encode(text, add_special_tokens=False).ids
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def words(self, texts: Sequence[str]) -> list[list[list[int]]]:
        return _words(self._backend, texts)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))


class SentencePieceLike:
    """The library behind SentencePiece's own normalisation (`normaliser.py`)."""

    never_special = True

    def __init__(self, definition: dict[str, Any], special: dict[str, int]) -> None:
        self._whole = backend(definition, special)
        steps = (definition.get("normalizer") or {}).get("normalizers") or []
        kinds = {step["type"] for step in steps}
        charsmap = next((s["precompiled_charsmap"] for s in steps if s["type"] == "Precompiled"), "")
        added = definition.get("added_tokens") or []
        self._normalise = Normaliser(
            base64.b64decode(charsmap),
            prefix="Prepend" in kinds,
            squeeze=any(s.get("pattern", {}).get("Regex") == " {2,}" for s in steps),
            keep=[t["content"] for t in added if not t["special"] and t["content"] not in special],
        )
        model = definition["model"]
        self._spelt = model["type"] == "Unigram" and model["byte_fallback"]
        self._pieces = backend({**_unreachable(definition), "normalizer": None}, special)

    def vocabulary(self) -> dict[str, int]:
        return self._whole.get_vocab(with_added_tokens=True)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        plain = self._normalise(text, begins)
        ids: list[int] = []
        for part in _BYTE_PIECE.split(plain) if self._spelt and "<0x" in plain else (plain,):
            ids += self._pieces.encode(part, add_special_tokens=False).ids
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        plain = [self._normalise(t) for t in texts]
        rows = [e.ids for e in self._pieces.encode_batch_fast(plain, add_special_tokens=False)]
        if not self._spelt:
            return rows
        return [self.encode(t) if "<0x" in t else ids for t, ids in zip(texts, rows, strict=True)]

    def words(self, texts: Sequence[str]) -> list[list[list[int]]]:
        return _words(self._pieces, [self._normalise(t) for t in texts])

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return str(self._whole.decode(list(ids), skip_special_tokens=skip_special))


def _never_special(definition: dict[str, Any], special: dict[str, int]) -> bool:
    """Whether no merge ends in a special token's text, so that nobody need look for one among the ids."""
    model = definition["model"]
    if (
        model.get("type", "BPE") != "BPE"
        or model.get("ignore_merges")
        or min(map(len, special), default=2) < 2
    ):
        return False
    return special.keys().isdisjoint(left + right for left, right in merges.pairs_of(model["merges"]))


def _words(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[list[int]]]:
    found = []
    for encoding in backend.encode_batch(list(texts), add_special_tokens=False):
        pairs = zip(encoding.word_ids, encoding.ids, strict=True)
        found.append([[token for _, token in word] for _, word in groupby(pairs, key=lambda pair: pair[0])])
    return found


def _unreachable(definition: dict[str, Any]) -> dict[str, Any]:
    """A unigram model matches every piece it holds, `</s>` too: give control pieces texts nobody types."""
    model = definition["model"]
    if model["type"] != "Unigram":
        return definition
    hidden = {t["id"] for t in definition["added_tokens"] if t["special"]}
    lowest = min(score for i, (_, score) in enumerate(model["vocab"]) if i not in hidden)
    vocab = [
        [f"\U0010fffd{i}\U0010fffd", lowest] if i in hidden else entry
        for i, entry in enumerate(model["vocab"])
    ]
    left = [t for t in definition["added_tokens"] if not t["special"]]
    return {**definition, "model": {**model, "vocab": vocab}, "added_tokens": left}


def backend(definition: dict[str, Any], special: dict[str, int]) -> tokenizers.Tokenizer:
    """The library's tokenizer, with every control token marked special and none ever read out of text."""
    tokens = [
        {**t, "special": t["special"] or t["content"] in special}
        for t in definition.get("added_tokens") or []
    ]
    changed = {**definition, "added_tokens": tokens, "truncation": None, "padding": None}
    try:
        made = tokenizers.Tokenizer.from_str(json.dumps(changed))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer.json cannot be read: {error}") from error
    made.encode_special_tokens = True
    return made


def without_prefix(definition: dict[str, Any]) -> dict[str, Any] | None:
    """The same definition without the dummy space that SentencePiece-like ones put in front; None if there is
    none."""

    def strip(part: Any) -> Any:
        if isinstance(part, list):
            return [strip(p) for p in part if not (isinstance(p, dict) and p.get("type") == "Prepend")]
        if isinstance(part, dict):
            part = {k: strip(v) for k, v in part.items()}
            if part.get("type") == "Metaspace":
                part["prepend_scheme"], part["add_prefix_space"] = "never", False
            if part.get("type") == "ByteLevel":
                part["add_prefix_space"] = False
        return part

    normalizer = definition.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "Prepend":
        normalizer = None
    changed = {
        **definition,
        "normalizer": strip(normalizer),
        "pre_tokenizer": strip(definition.get("pre_tokenizer")),
    }
    return None if all(changed[k] == definition.get(k) for k in changed) else changed

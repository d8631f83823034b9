"""More entries for a BPE vocabulary, learned from text in other scripts, that leave English alone.

Continued training: the new text is cut into words and encoded by the tokenizer as it is; then pairs of the
pieces are merged, most frequent first, and the merges are appended behind the old ones. So old merges always
go first, no id changes, and each new piece is one that the extended tokenizer really makes. Joining two
finished vocabularies instead leaves pieces that can never appear (the old merges cut their halves otherwise)
and, in SentencePiece's format, scores that put the new pieces before the old ones.

1. Every character that costs several pieces and is frequent enough becomes one: byte by byte from the left
   for byte-level tokenizers, as an entry for SentencePiece ones.
2. Pairs of whole characters and pieces are merged by the `tokenizers` library's trainer, which is given the
   pieces as letters of a made-up alphabet.

What "English" means: text of Latin letters, their accents, general punctuation, currency signs and marks
(`PROTECTED`). Two protected characters are never merged, and a protected character in parts is left in parts,
so each new piece holds a character of another script, or the first bytes of one, and cannot fire in such
text: its ids are the same before and after. That is not a measurement but a consequence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from caravan.data.vocabulary import merges
from caravan.types import UserError

PROTECTED = re.compile("[\x00-\u024f\u2000-\u20ff]")
"""Whole blocks that begin with the same bytes, so that no part of another character could be one of these."""
_SPELT = re.compile("<0x([0-9A-F]{2})>")
SPACE = "\u2581"
LONGEST = 16
"""Characters of a new piece at most, as SentencePiece has it."""
_LETTERS = 0x10000


@dataclass
class Growing:
    """A BPE model while it grows."""

    vocab: dict[str, int]
    merges: list[list[str]]
    following: int
    room: int
    made: list[str] = field(default_factory=list)

    def piece(self, text: str) -> bool:
        """Add an entry; False if there is no room."""
        if text in self.vocab:
            return True
        if not self.room:
            return False
        self.vocab[text] = self.following
        self.made.append(text)
        self.following, self.room = self.following + 1, self.room - 1
        return True

    def merge(self, left: str, right: str) -> bool:
        if not self.piece(left + right):
            return False
        self.merges.append([left, right])
        return True


def extend(
    definition: dict[str, Any],
    cut: Callable[[Sequence[str]], Iterable[list[list[int]]]],
    texts: Iterable[str],
    more: int,
    min_count: int = 2,
    coverage: float = 0.9995,
) -> tuple[dict[str, Any], list[str]]:
    """(tokenizer.json with at most `more` new entries behind all others, their texts in order of ids).

    `cut(texts)` gives, per text, the ids of each word. `coverage`: share of all characters (by occurrence)
    that shall be one piece each. Raises UserError for models that are not BPE over bytes or with byte
    fallback.
    """
    spelling = _spelling(definition)
    byte_level = spelling is merges.as_bytes
    growing = _growing(definition, more)
    pieces = {token: text for text, token in growing.vocab.items()}
    bytes_of = {token: spelling(text) for token, text in pieces.items()}
    counted = _count(cut, texts, pieces, bytes_of, byte_level)
    known = _characters(growing, counted, min_count, coverage, byte_level)
    _pairs(growing, counted, known, min_count)
    changed = {**definition["model"], "vocab": growing.vocab, "merges": growing.merges}
    return {**definition, "model": changed}, growing.made


Unit = tuple[str, ...]
"""The pieces of one stretch of whole characters as they are: a single one, or parts of a character."""


def _spelling(definition: dict[str, Any]) -> Callable[[str], bytes | None]:
    """Bytes that a piece stands for, by kind of tokenizer."""
    model = definition["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(
            f"a {model['type']} vocabulary cannot be extended",
            "only BPE can; train a new one on all the text",
        )
    if "ByteLevel" in json.dumps(definition.get("pre_tokenizer") or {}):
        return merges.as_bytes
    if model.get("byte_fallback"):
        return _spelt_piece
    raise UserError(
        "this vocabulary cannot be extended: it knows neither bytes nor byte fallback",
        "its unknown characters are lost before anything could be learned about them",
    )


def _spelt_piece(piece: str) -> bytes | None:
    found = _SPELT.fullmatch(piece)
    return bytes.fromhex(found.group(1)) if found else piece.replace(SPACE, " ").encode()


def _growing(definition: dict[str, Any], more: int) -> Growing:
    model = definition["model"]
    vocab = dict(model["vocab"])
    # The library numbers added tokens itself unless the model knows them.
    vocab |= {t["content"]: t["id"] for t in definition.get("added_tokens") or []}
    old = [list(pair) for pair in merges.pairs_of(model["merges"])]
    return Growing(vocab, old, max(vocab.values()) + 1, more)


def _count(
    cut: Callable[[Sequence[str]], Iterable[list[list[int]]]],
    texts: Iterable[str],
    pieces: dict[int, str],
    bytes_of: dict[int, bytes | None],
    byte_level: bool,
) -> Counter[tuple[Unit, ...]]:
    """Stretches of units that merges may join, with how often they occur."""
    words: Counter[tuple[int, ...]] = Counter()
    for batch in _batches(texts):
        for rows in cut(batch):
            words.update(map(tuple, rows))
    counted: Counter[tuple[Unit, ...]] = Counter()
    for word, count in words.items():
        spelt = [bytes_of.get(token) for token in word]
        if any(b is None for b in spelt):
            continue
        units = list(_units([pieces[t] for t in word], [b for b in spelt if b is not None]))
        for stretch in _stretches(units, byte_level):
            counted[stretch] += count
    return counted


def _units(word: list[str], spelt: list[bytes]) -> Iterator[tuple[Unit, bool]]:
    """(the pieces of a stretch of whole characters, whether one of those is of another script)."""
    parts: list[str] = []
    data = b""
    for at, (piece, more) in enumerate(zip(word, spelt, strict=True)):
        parts.append(piece)
        data += more
        if at + 1 < len(word) and spelt[at + 1] and spelt[at + 1][0] & 0xC0 == 0x80:
            continue
        text = data.decode("utf-8", "replace")
        yield tuple(parts), bool(PROTECTED.sub("", text)) and "\ufffd" not in text
        parts, data = [], b""


def _stretches(units: list[tuple[Unit, bool]], byte_level: bool) -> Iterator[tuple[Unit, ...]]:
    """Cut where no piece may reach over: between two units of protected text, round a protected character in
    parts, and before a space of SentencePiece's."""
    run: list[Unit] = []
    before = False
    for unit, foreign in units:
        if not foreign and (len(unit) > 1 or (not byte_level and _SPELT.fullmatch(unit[0]))):
            yield tuple(run)
            run, before = [], False
            continue
        if run and ((not foreign and not before) or (not byte_level and unit[0].startswith(SPACE))):
            yield tuple(run)
            run = []
        run.append(unit)
        before = foreign
    yield tuple(run)


def _characters(
    growing: Growing,
    counted: Counter[tuple[Unit, ...]],
    min_count: int,
    coverage: float,
    byte_level: bool,
) -> dict[Unit, str]:
    """Make one piece of each frequent character that has parts. Gives the piece of each unit that has one."""
    seen: Counter[Unit] = Counter()
    for stretch, count in counted.items():
        for unit in stretch:
            seen[unit] += count
    known: dict[Unit, str] = {unit: unit[0] for unit in seen if len(unit) == 1}
    in_parts = sorted((u for u in seen if len(u) > 1), key=lambda u: (-seen[u], u))
    there = {(left, right) for left, right in growing.merges}
    left = sum(seen[u] for u in in_parts) - sum(seen.values()) * (1 - coverage)
    for unit in in_parts:
        if left <= 0 or seen[unit] < min_count:
            break
        left -= seen[unit]
        if not byte_level:
            text = b"".join(bytes.fromhex(p[3:5]) for p in unit).decode()
            if growing.piece(text):
                known[unit] = text
        elif growing.room >= len(unit) - 1:
            whole = unit[0]
            for part in unit[1:]:
                if (whole, part) not in there:
                    growing.merge(whole, part)
                    there.add((whole, part))
                whole += part
            known[unit] = whole
    return known


def _pairs(
    growing: Growing,
    counted: Counter[tuple[Unit, ...]],
    known: dict[Unit, str],
    min_count: int,
) -> None:
    """Merge pairs of units, most frequent first; of equals the pair with the smaller ids."""
    order = sorted(known, key=lambda unit: (growing.vocab[known[unit]], unit))
    letter = {unit: chr(_LETTERS + n) for n, unit in enumerate(order)}
    piece = {chr(_LETTERS + n): known[unit] for n, unit in enumerate(order)}

    def lines() -> Iterator[str]:
        for stretch, count in sorted(counted.items()):
            line = "".join(letter.get(unit, "\n") for unit in stretch)
            if len(line) > 1:
                yield from [line] * count

    if not growing.room or not letter:
        return
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
    trainer = trainers.BpeTrainer(
        vocab_size=len(letter) + growing.room,
        min_frequency=max(1, min_count),
        show_progress=False,
        max_token_length=LONGEST,
    )
    backend.train_from_iterator(lines(), trainer=trainer)
    for pair in json.loads(backend.to_str())["model"]["merges"]:
        left, right = ("".join(piece[c] for c in half) for half in merges.pairs_of([pair])[0])
        if left in growing.vocab and right in growing.vocab:
            growing.merge(left, right)


def _batches(texts: Iterable[str], size: int = 1000) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch

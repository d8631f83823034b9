"""RWKV's world vocabulary: at each place of the text's bytes, the longest entry (BlinkDL/RWKV-LM, tokenizer).

Written down as a `WordPiece` model over GPT-2's stand-ins for bytes, which is greedy longest match too: the
library, and so transformers, reads our folder and gives the same ids. Its search tries every length of the
rest of the text, quadratic in the text, so here we match ourselves, trying only lengths that exist behind the
next two bytes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, AnyStr, Generic

from caravan.data.vocabulary import merges
from caravan.data.vocabulary.definition import BYTE_LEVEL, added_token, whole
from caravan.types import UserError

END = "<|endoftext|>"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, defaults of tokenizer_config.json) of lines `id literal bytes`. Raises UserError."""
    vocab: dict[str, int] = {END: 0}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            first, last = line.index(" "), line.rindex(" ")
            token, size = int(line[:first]), int(line[last:])
            value = ast.literal_eval(line[first:last].strip())
            data = value.encode() if isinstance(value, str) else bytes(value)
        except (ValueError, SyntaxError, TypeError) as error:
            raise UserError(f"{path} line {number} is not `id literal bytes`: {error}") from error
        if len(data) != size or not data or token <= 0:
            raise UserError(f"{path} line {number}: {size} bytes were promised, the literal has {len(data)}")
        vocab[merges.as_text(data)] = token
    missing = [b for b in range(256) if merges.CHARACTER_OF[b] not in vocab]
    if missing:
        raise UserError(f"{path} has no entry for byte {missing[0]}", "the file may be cut short")
    return definition(vocab), {"bos_token": END, "eos_token": END, "pad_token": END}


def definition(vocab: dict[str, int]) -> dict[str, Any]:
    """A tokenizer.json of greedy matching over bytes; `vocab` holds END and GPT-2's stand-ins."""
    model = {
        "type": "WordPiece",
        "unk_token": END,
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": 1 << 62,
        "vocab": vocab,
    }
    return whole(model, [added_token(END, vocab[END])], pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL)


def is_greedy(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    model = definition.get("model") or {}
    before = definition.get("pre_tokenizer") or {}
    return (
        model.get("type") == "WordPiece"
        and model.get("continuing_subword_prefix") == ""
        and (before.get("type"), before.get("use_regex")) == ("ByteLevel", False)
    )


class Longest(Generic[AnyStr]):
    """At each place the longest entry of a table. Lengths that no entry behind the next two letters has are
    not tried, so the work is linear in the text."""

    def __init__(self, table: Mapping[AnyStr, int]) -> None:
        self._table: Mapping[AnyStr, int] = table
        sizes: dict[AnyStr, set[int]] = {}
        for data in table:
            if len(data) > 1:
                sizes.setdefault(data[:2], set()).add(len(data))
        self._sizes: dict[AnyStr, list[int]] = {
            head: sorted(found, reverse=True) for head, found in sizes.items()
        }

    def __call__(self, data: AnyStr) -> list[int]:
        """Ids of all of it; -1 for each letter that no entry takes up."""
        table, sizes = self._table, self._sizes
        ids: list[int] = []
        at, none = 0, ()
        while at < len(data):
            for size in sizes.get(data[at : at + 2], none):
                token = table.get(data[at : at + size])
                if token is not None and at + size <= len(data):
                    at += size
                    break
            else:
                token = table.get(data[at : at + 1], -1)
                at += 1
            ids.append(token)
        return ids


class Greedy:
    """Greedy longest match over UTF-8 bytes."""

    never_special = True

    def __init__(self, definition: dict[str, Any]) -> None:
        self._vocab: dict[str, int] = dict(definition["model"]["vocab"])
        self._special = {t["id"]: t["content"] for t in definition.get("added_tokens") or []}
        self._vocab |= {text: token for token, text in self._special.items()}
        known = {t: merges.as_bytes(t) for t, i in self._vocab.items() if i not in self._special}
        table = {data: self._vocab[t] for t, data in known.items() if data is not None}
        self._bytes = {token: data for data, token in table.items()}
        self._match = Longest(table)

    def vocabulary(self) -> dict[str, int]:
        return self._vocab

    def encode(self, text: str, begins: bool = True) -> list[int]:
        ids = self._match(text.encode())
        if -1 in ids:
            raise UserError("the vocabulary lacks an entry for one of the 256 bytes")
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(t) for t in texts]

    def words(self, texts: Sequence[str]) -> list[list[list[int]]]:
        return [[self.encode(t)] for t in texts]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        parts = []
        for token in ids:
            if token in self._special:
                parts.append(b"" if skip_special else self._special[token].encode())
            else:
                parts.append(self._bytes.get(token, b""))
        return b"".join(parts).decode("utf-8", "replace")

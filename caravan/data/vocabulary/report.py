"""What a vocabulary costs, by language and by script: tokens per character and per word, and how many
characters stay whole.

Tokens per word is called fertility (Rust et al. 2021, arXiv 2012.15613); words are runs without white space,
so it says nothing about Chinese or Japanese. A character is whole if it lies inside one token: spelt in
bytes, it costs a model several steps and cannot be seen as one thing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate

_NAMES = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}


LOOKED_AT = 200_000
"""Characters of each language that are looked at one by one: were it of all texts together, the first
language of a corpus would hide the others."""


@lru_cache(maxsize=1 << 16)
def script(character: str) -> str:
    """Latin, Han, Cyrillic, …; Digit, Space and Other for what belongs to none."""
    kind = unicodedata.category(character)
    if kind[0] in "LM":
        name = unicodedata.name(character, "OTHER").split()[0].split("-")[0]
        return _NAMES.get(name, name.capitalize()) if kind[0] == "L" else "Mark"
    return {"N": "Digit", "Z": "Space"}.get(kind[0], "Space" if character in "\t\n\r" else "Other")


class Report:
    """Adds texts up. `bytes_of`: the bytes of one id, as `Tokenizer.bytes_of`."""

    def __init__(self, bytes_of: Callable[[int], bytes], unknown: int | None = None) -> None:
        self._bytes_of, self._unknown = bytes_of, unknown
        self._scripts: dict[str, list[float]] = {}
        self._languages: dict[str, list[int]] = {}
        self._whole: dict[str, list[int]] = {}
        self._lost = self._tokens = 0

    def add(self, text: str, ids: Sequence[int], language: str = "") -> None:
        """One text and its ids."""
        language = language or "none"
        entry = self._languages.setdefault(language, [0, 0, 0, 0])
        for at, more in enumerate((len(text.encode()), len(ids), len(text.split()), len(text))):
            entry[at] += more
        self._tokens += len(ids)
        self._lost += sum(i == self._unknown for i in ids)
        looked_at = self._whole.setdefault(language, [0, 0])
        if looked_at[0] < LOOKED_AT:
            spelt = [self._bytes_of(i) for i in ids if i != self._unknown]
            self._characters(spelt, looked_at)

    def _characters(self, spelt: list[bytes], looked_at: list[int]) -> None:
        """Share every token among the characters it lies in; a character is whole inside one token.
        `looked_at`: characters of this language, and how many of them were whole."""
        ends = list(accumulate(map(len, spelt)))
        starts = [0, *ends[:-1]]
        read = b"".join(spelt).decode("utf-8", "replace")
        at = token = 0
        for character in read[: LOOKED_AT - looked_at[0]]:
            stop = at + len(character.encode())
            while token < len(ends) and ends[token] <= at:
                token += 1
            entry = self._scripts.setdefault(script(character), [0, 0.0, 0])
            entry[0] += 1
            k, share = token, 0.0
            while k < len(ends) and starts[k] < stop:
                share += (min(ends[k], stop) - max(starts[k], at)) / max(1, ends[k] - starts[k])
                k += 1
            entry[1] += share
            entry[2] += k == token + 1
            looked_at[0] += 1
            looked_at[1] += k == token + 1
            at = stop

    def bytes_per_token(self) -> float:
        """Of all texts."""
        size = sum(entry[0] for entry in self._languages.values())
        return round(size / self._tokens, 3) if self._tokens else 0.0

    def by_script(self) -> dict[str, dict[str, float]]:
        """Most frequent first: characters, tokens_per_character, whole (share)."""
        order = sorted(self._scripts.items(), key=lambda item: (-item[1][0], item[0]))
        return {
            name: {
                "characters": int(count),
                "tokens_per_character": round(tokens / count, 4),
                "whole": round(whole / count, 4),
            }
            for name, (count, tokens, whole) in order
            if count
        }

    def by_language(self) -> dict[str, dict[str, float]]:
        """bytes_per_token, tokens_per_word, tokens_per_character, whole (share of characters)."""
        return {
            name: {
                "bytes_per_token": round(size / max(1, tokens), 3),
                "tokens_per_word": round(tokens / max(1, words), 3),
                "tokens_per_character": round(tokens / max(1, characters), 3),
                "whole": round(self._whole[name][1] / max(1, self._whole[name][0]), 4),
            }
            for name, (size, tokens, words, characters) in sorted(self._languages.items())
        }

    def unknown(self) -> float:
        """Share of tokens that stand for something unknown."""
        return round(self._lost / max(1, self._tokens), 6)

"""SentencePiece's text normaliser, exactly.

A `.model` holds a table of replacements as a double-array trie (darts-clone) followed by the replacing texts.
At each place of the text the longest source in the table is replaced. The `tokenizers` library reads the same
table as `Precompiled`, but looks up grapheme clusters: a base character whose combining mark has no rule of
its own loses the mark (`½` + U+0300), where SentencePiece keeps it. So text is normalised here, and the
library's step is left to those who open the exported tokenizer.json with it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable

import numpy as np

SPACE = "\u2581"


class Normaliser:
    """Text to text with `▁` for spaces. `keep`: user-defined symbols, which pass untouched."""

    def __init__(self, charsmap: bytes, *, prefix: bool, squeeze: bool, keep: Iterable[str] = ()) -> None:
        self.prefix, self.squeeze = prefix, squeeze
        self._table = Table(charsmap) if charsmap else None
        self._keep = sorted(keep, key=len, reverse=True)
        starts = {symbol[0] for symbol in self._keep} | (self._table.starts() if self._table else set())
        self._starts = re.compile("[" + "".join(map(re.escape, sorted(starts))) + "]") if starts else None

    def __call__(self, text: str, begins: bool = True) -> str:
        """`begins`: no text stands before (the dummy space goes in front, spaces at the start go away)."""
        if not text:
            return ""
        made = self._replace(text) if self._starts else text
        if self.squeeze:
            made = re.sub(" +", " ", made)
            made = made.lstrip(" ") if begins else made
            if begins and not made and not text.strip(" "):
                return ""
        made = made.replace(" ", SPACE)
        if begins and self.prefix:
            made = SPACE + made
        return made.rstrip(SPACE) if self.squeeze else made

    def _replace(self, text: str) -> str:
        assert self._starts is not None
        parts, done = [], 0
        for found in self._starts.finditer(text):
            at = found.start()
            if at < done:
                continue
            symbol = next((k for k in self._keep if text.startswith(k, at)), None)
            if symbol is not None:
                source, target = symbol, symbol
            else:
                source, target = self._table.longest(text, at) if self._table else ("", "")
            if source:
                parts += [text[done:at], target]
                done = at + len(source)
        return "".join([*parts, text[done:]]) if parts else text


class Table:
    """The replacements. Layout: uint32 size of the trie, the trie, texts ending in NUL.

    The trie shares its tails (a quarter of a million sources in 60,000 units), so sources are looked up, not
    listed.
    """

    def __init__(self, charsmap: bytes) -> None:
        (size,) = struct.unpack_from("<I", charsmap)
        self._units: list[int] = np.frombuffer(charsmap, "<u4", size // 4, 4).tolist()
        self._texts = charsmap[4 + size :]

    def longest(self, text: str, at: int) -> tuple[str, str]:
        """(longest source that stands at `at`, its replacement); two empty texts if there is none."""
        node, best = _child(0, self._units[0]), ("", "")
        for stop in range(at, len(text)):
            for letter in text[stop].encode():
                step = self._step(node, letter)
                if step is None:
                    return best
                node, ends = step
            if ends:
                start = self._units[node] & 0x7FFFFFFF
                target = self._texts[start : self._texts.index(b"\0", start)].decode()
                best = (text[at : stop + 1], target)
        return best

    def starts(self) -> set[str]:
        """Every character that a source begins with."""
        found: set[str] = set()
        stack = [(_child(0, self._units[0]), b"")]
        while stack:
            node, before = stack.pop()
            letters = range(1, 256) if not before else range(0x80, 0xC0)
            for letter in letters:
                step = self._step(node, letter)
                if step is None:
                    continue
                now = before + bytes([letter])
                size = 1 + (now[0] >= 0xC0) + (now[0] >= 0xE0) + (now[0] >= 0xF0)
                if len(now) == size:
                    found.add(now.decode())
                else:
                    stack.append((step[0], now))
        return found

    def _step(self, node: int, letter: int) -> tuple[int, bool] | None:
        """(the node behind `letter`, whether a source ends there)."""
        place = node ^ letter
        if place >= len(self._units):
            return None
        unit = self._units[place]
        return (_child(place, unit), bool(unit >> 8 & 1)) if unit & 0x800000FF == letter else None


def _child(place: int, unit: int) -> int:
    return place ^ (unit >> 10 << ((unit & 1 << 9) >> 6))

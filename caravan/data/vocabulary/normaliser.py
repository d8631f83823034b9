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
from functools import cached_property

import numpy as np

SPACE = "\u2581"


class Normaliser:
    """Text to text with `▁` for spaces. `keep`: user-defined symbols, which pass untouched."""

    def __init__(self, charsmap: bytes, *, prefix: bool, squeeze: bool, keep: Iterable[str] = ()) -> None:
        self.prefix, self.squeeze = prefix, squeeze
        self._rules = rules(charsmap) if charsmap else {}
        self._rules |= {symbol: symbol for symbol in keep}
        self._longest: dict[str, int] = {}
        for source in self._rules:
            self._longest[source[0]] = max(self._longest.get(source[0], 0), len(source))

    @cached_property
    def _starts(self) -> re.Pattern[str]:
        """One character that begins a source, with what may follow it in that source."""
        return re.compile("[" + "".join(re.escape(c) for c in sorted(self._longest)) + "]")

    def __call__(self, text: str, begins: bool = True) -> str:
        """`begins`: no text stands before (the dummy space goes in front, spaces at the start go away)."""
        if not text:
            return ""
        made = self._replace(text) if self._longest else text
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
        parts, done = [], 0
        for found in self._starts.finditer(text):
            at = found.start()
            if at < done:
                continue
            for size in range(self._longest[text[at]], 0, -1):
                source = text[at : at + size]
                if len(source) == size and source in self._rules:
                    parts += [text[done:at], self._rules[source]]
                    done = at + size
                    break
        return "".join([*parts, text[done:]]) if parts else text


def rules(charsmap: bytes) -> dict[str, str]:
    """Every source and its replacement. Layout: uint32 size of the trie, the trie, texts ending in NUL."""
    (size,) = struct.unpack_from("<I", charsmap)
    units = np.frombuffer(charsmap, "<u4", size // 4, 4)
    texts = charsmap[4 + size :]
    labels = units & np.uint32(0x800000FF)
    letters = np.arange(1, 256, dtype=np.int64)
    found: dict[str, str] = {}
    stack = [(_child(0, int(units[0])), b"")]
    while stack:
        node, source = stack.pop()
        places = node ^ letters
        inside = places < len(units)
        hits = letters[inside][labels[places[inside]] == letters[inside]]
        for letter in hits.tolist():
            unit = int(units[node ^ letter])
            child, longer = _child(node ^ letter, unit), source + bytes([letter])
            if unit >> 8 & 1:
                start = int(units[child]) & 0x7FFFFFFF
                found[longer.decode()] = texts[start : texts.index(b"\0", start)].decode()
            stack.append((child, longer))
    return found


def _child(place: int, unit: int) -> int:
    return place ^ (unit >> 10 << ((unit & 1 << 9) >> 6))

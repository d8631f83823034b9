"""Which language a text is in, offline: by its script, and where several share one by a model of characters.

A script that one language writes decides alone (Greek, Thai, Hangul, Kana, Han, ...). For Latin, Cyrillic,
Arabic, Devanagari, Bengali, Hebrew and Ethiopic each language has a 4-gram model of characters, made at
first use from languages.txt: a few everyday sentences and frequent little words each, which anybody can
lengthen. Probabilities are interpolated from long to short contexts (MacKay and Peto 1995); a gram no
language knows is read at a shorter length. The score is a softmax over the script's languages, flattened
because neighbouring grams say the same thing twice; near 1 / (number of languages) nothing is known, 0.99
is sure.

Legend: D documents, G grams of the model, P positions read, L languages of a script.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("languages.txt")
ORDER = 4
_PRIOR = 3.0
_FLATTEN = 0.35
_LETTERS = 260
"""Size of the alphabet a new character is drawn from."""
ALONE = {
    "HAN": "zh", "KANA": "ja", "HANGUL": "ko", "GREEK": "el", "THAI": "th", "LAO": "lo", "KHMER": "km",
    "MYANMAR": "my", "TIBETAN": "bo", "GEORGIAN": "ka", "ARMENIAN": "hy", "TAMIL": "ta", "TELUGU": "te",
    "KANNADA": "kn", "MALAYALAM": "ml", "GUJARATI": "gu", "GURMUKHI": "pa", "ORIYA": "or", "SINHALA": "si",
    "THAANA": "dv", "CHEROKEE": "chr", "TIFINAGH": "tzm", "SYLLABICS": "iu", "NKO": "nqo", "JAVANESE": "jv",
    "BALINESE": "ban", "OL CHIKI": "sat", "VAI": "vai", "YI": "ii", "MONGOLIAN": "mn",
}  # fmt: skip
"""Scripts that (nearly) one language writes."""
SHARED = ("LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI", "BENGALI", "HEBREW", "ETHIOPIC")
_RANGES = (
    ("LATIN", 0x41, 0x24F), ("LATIN", 0x1E00, 0x1EFF), ("LATIN", 0x250, 0x2AF), ("GREEK", 0x370, 0x3FF),
    ("GREEK", 0x1F00, 0x1FFF), ("CYRILLIC", 0x400, 0x52F), ("ARMENIAN", 0x530, 0x58F),
    ("HEBREW", 0x590, 0x5FF), ("ARABIC", 0x600, 0x6FF), ("ARABIC", 0x750, 0x77F), ("ARABIC", 0xFB50, 0xFEFC),
    ("THAANA", 0x780, 0x7BF), ("NKO", 0x7C0, 0x7FF), ("DEVANAGARI", 0x900, 0x97F), ("BENGALI", 0x980, 0x9FF),
    ("GURMUKHI", 0xA00, 0xA7F), ("GUJARATI", 0xA80, 0xAFF), ("ORIYA", 0xB00, 0xB7F), ("TAMIL", 0xB80, 0xBFF),
    ("TELUGU", 0xC00, 0xC7F), ("KANNADA", 0xC80, 0xCFF), ("MALAYALAM", 0xD00, 0xD7F),
    ("SINHALA", 0xD80, 0xDFF), ("THAI", 0xE00, 0xE7F), ("LAO", 0xE80, 0xEFF), ("TIBETAN", 0xF00, 0xFFF),
    ("MYANMAR", 0x1000, 0x109F), ("GEORGIAN", 0x10A0, 0x10FF), ("GEORGIAN", 0x1C90, 0x1CBF),
    ("HANGUL", 0x1100, 0x11FF), ("ETHIOPIC", 0x1200, 0x139F), ("CHEROKEE", 0x13A0, 0x13FF),
    ("SYLLABICS", 0x1400, 0x167F), ("KHMER", 0x1780, 0x17FF), ("MONGOLIAN", 0x1800, 0x18AF),
    ("BALINESE", 0x1B00, 0x1B7F), ("OL CHIKI", 0x1C50, 0x1C7F), ("TIFINAGH", 0x2D30, 0x2D7F),
    ("KANA", 0x3041, 0x30FA), ("KANA", 0x30FC, 0x30FF), ("HAN", 0x3400, 0x9FFF), ("YI", 0xA000, 0xA4CF),
    ("VAI", 0xA500, 0xA63F), ("JAVANESE", 0xA980, 0xA9DF), ("HANGUL", 0xAC00, 0xD7AF),
    ("HAN", 0xF900, 0xFAFF),
)  # fmt: skip
SCRIPTS = ("", *dict.fromkeys(name for name, _, _ in _RANGES))
_MARKS = (
    "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0dff\u0e31-\u0e4e\u0eb1-\u0ecd\u0f71-\u0f84"
    "\u102b-\u103e\u17b4-\u17d3"
)
"""Vowel signs and accents that stand for themselves: parts of words, though not letters to `re`."""
_SPLIT = re.compile(rf"(?:[^\w{_MARKS}]|[\d_\u0964\u0965])+")


@lru_cache(maxsize=1)
def _script_table() -> np.ndarray:
    """uint8 [65536]: index into SCRIPTS; 0 for what is no letter or mark of a script."""
    table = np.zeros(0x10000, np.uint8)
    for name, first, last in _RANGES:
        table[first : last + 1] = SCRIPTS.index(name)
    ascii_marks = [c for c in range(0x250) if not chr(c).isalpha()]
    table[ascii_marks] = 0
    return table


@dataclass(frozen=True, slots=True)
class Guess:
    """A language code, how surely, and the script; code "" if there is no letter."""

    lang: str
    score: float
    script: str


@dataclass(frozen=True, slots=True)
class Model:
    """Log-probabilities of grams under each language of one script."""

    languages: tuple[str, ...]
    keys: tuple[np.ndarray, ...]
    """Per length 1 .. ORDER: sorted uint64 [G]."""
    rows_GL: np.ndarray
    """float32: of all lengths, one below the other; the last row is for a character nobody knows."""
    first: tuple[int, ...]
    """Per length: where its rows begin."""

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [D, L]: summed log-probability of each text (given by `padded`) under each language."""
        joined = "".join(texts)
        codes = np.frombuffer(joined.encode("utf-32-le", "replace"), np.uint32).astype(np.uint64) & _LOW
        sizes = np.fromiter(map(len, texts), np.int64, len(texts)) - (ORDER - 1)
        starts = np.concatenate([[0], np.cumsum(sizes + ORDER - 1)[:-1]])
        place = np.repeat(starts - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) + np.arange(
            sizes.sum()
        )
        key = np.zeros(len(place), np.uint64)
        for k in range(ORDER):
            key = (key << np.uint64(16)) | codes[place + k]
        row = np.full(len(key), len(self.rows_GL) - 1)
        left = np.arange(len(key))
        for n in range(ORDER, 0, -1):
            short = key[left] & np.uint64((1 << (16 * n)) - 1)
            known = self.keys[n - 1]
            at = np.minimum(np.searchsorted(known, short), len(known) - 1)
            hit = known[at] == short
            row[left[hit]] = self.first[n - 1] + at[hit]
            left = left[~hit]
        edges = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        # Row after row, so that a text's sum does not depend on its neighbours.
        return np.add.reduceat(self.rows_GL[row], edges, axis=0).astype(np.float64)


_LOW = np.uint64(0xFFFF)


def fit(texts: Mapping[str, Sequence[tuple[str, float]]]) -> Model:
    """A model from language -> (text, how often it counts)."""
    languages = tuple(texts)
    counts = [_grams(parts) for parts in texts.values()]
    keys, rows = [], []
    below: dict[str, int] = {}
    shorter = np.full((1, len(languages)), 1.0 / _LETTERS)
    for n in range(1, ORDER + 1):
        grams = sorted({g for count in counts for g in count[n]}, key=_key)
        place = {g: i for i, g in enumerate(grams)}
        contexts = {h: i for i, h in enumerate(sorted({g[:-1] for g in grams}))}
        seen = np.zeros((len(grams), len(languages)))
        total = np.zeros((len(contexts), len(languages)))
        for column, count in enumerate(counts):
            for gram, times in count[n].items():
                seen[place[gram], column] += times
                total[contexts[gram[:-1]], column] += times
        tail = np.array([below[g[1:]] for g in grams]) if n > 1 else np.zeros(len(grams), np.int64)
        head = np.array([contexts[g[:-1]] for g in grams])
        shorter = (seen + _PRIOR * shorter[tail]) / (total[head] + _PRIOR)
        if n == 1:
            floor = _PRIOR / _LETTERS / (total[0] + _PRIOR)
        below = place
        keys.append(np.array([_key(g) for g in grams], np.uint64))
        rows.append(shorter)
    table = np.log(np.concatenate([*rows, floor[None]])).astype(np.float32)
    first = np.cumsum([0, *map(len, rows)])[:-1]
    return Model(languages, tuple(keys), table, tuple(first.tolist()))


def _grams(parts: Sequence[tuple[str, float]]) -> list[Counter[str]]:
    """Per length 0 .. ORDER: how often each gram occurs, counted by the weight of its text."""
    counts: list[Counter[str]] = [Counter() for _ in range(ORDER + 1)]
    for text, weight in parts:
        line = padded(text)
        for i in range(ORDER - 1, len(line)):
            for n in range(1, ORDER + 1):
                counts[n][line[i - n + 1 : i + 1]] += weight  # type: ignore[assignment]
    return counts


def plain(text: str) -> str:
    """Lower-cased letters with one space between words."""
    return " ".join(w for w in _SPLIT.split(text.lower()) if w)


def padded(text: str, chars: int = 1 << 30) -> str:
    """What a model reads: plain text with the spaces that begin and end it."""
    return " " * (ORDER - 1) + plain(text)[:chars] + " "


def _key(gram: str) -> int:
    key = 0
    for char in gram:
        key = (key << 16) | (ord(char) & 0xFFFF)
    return key


@lru_cache(maxsize=1)
def texts() -> dict[str, list[tuple[str, float]]]:
    """languages.txt: language -> sentences, and its little words, the frequent ones counting more."""
    out: dict[str, list[tuple[str, float]]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            lang, sentences, words = line.split("\t")
            listed = words.split()
            out[lang] = [(sentences, 1.0), *((w, 24.0 / (k + 8)) for k, w in enumerate(listed))]
    return out


@lru_cache(maxsize=1)
def models() -> dict[str, Model]:
    """Script -> model of the languages of languages.txt that are written in it."""
    by_script: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for lang, parts in texts().items():
        by_script.setdefault(scripts([parts[0][0]])[0], {})[lang] = parts
    return {name: fit(group) for name, group in by_script.items()}


def scripts(texts: Sequence[str]) -> list[str]:
    """The script most letters of each text are in; "" if there are none."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "replace"), np.uint32)
    kind = _script_table()[np.minimum(codes, 0xFFFF)]
    document = np.repeat(np.arange(len(texts)), np.fromiter(map(len, texts), np.int64, len(texts)))
    size = len(SCRIPTS)
    counts = np.bincount(document * size + kind, minlength=len(texts) * size).reshape(-1, size)
    counts[:, 0] = 0
    han, kana = SCRIPTS.index("HAN"), SCRIPTS.index("KANA")
    both = counts[:, han] + counts[:, kana]
    japanese = counts[:, kana] > 0.1 * both
    counts[:, kana] = np.where(japanese, both, counts[:, kana])
    counts[:, han] = np.where(
        japanese, 0, 3 * counts[:, han]
    )  # a Han character says as much as several letters
    best = counts.argmax(axis=1)
    return [SCRIPTS[b] if row[b] else "" for b, row in zip(best.tolist(), counts, strict=True)]


def guess(text: str, chars: int = 300) -> Guess:
    """The language of a text by its first `chars` letters and spaces."""
    return _judged([text[: 4 * chars]], chars)[0]


_GLANCE, _LOOK, _SURE = 80, 200, 0.9999


def guesses(texts: Sequence[str]) -> list[Guess]:
    """The language of each text: by a glance at its middle, and where that leaves doubt by its beginning,
    middle and end."""
    found = _judged([_middle(t, _GLANCE) for t in texts], _GLANCE)
    doubt = [d for d, g in enumerate(found) if g.score < _SURE]
    pieces = [
        t if len(t := texts[d]) <= 3 * _LOOK else f"{t[:_LOOK]} {_middle(t, _LOOK)} {t[-_LOOK:]}"
        for d in doubt
    ]
    for d, better in zip(doubt, _judged(pieces, 3 * _LOOK), strict=True):
        found[d] = better
    return found


def _middle(text: str, chars: int) -> str:
    start = max(0, (len(text) - chars) // 2)
    return text[start : start + chars]


def _judged(texts: Sequence[str], chars: int) -> list[Guess]:
    named = scripts(texts)
    out = [Guess(ALONE.get(name, ""), 1.0 if name else 0.0, name) for name in named]
    for name, model in models().items():
        which = [d for d, s in enumerate(named) if s == name and name in SHARED]
        if not which:
            continue
        scores = model.scores([padded(texts[d], chars) for d in which])
        weight = np.exp((scores - scores.max(axis=1, keepdims=True)) * _FLATTEN)
        share = weight / weight.sum(axis=1, keepdims=True)
        for d, best, row in zip(which, share.argmax(axis=1).tolist(), share, strict=True):
            out[d] = Guess(model.languages[best], float(row[best]), name)
    return out

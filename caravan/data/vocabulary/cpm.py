"""The `vocab.txt` of CPM-Bee and CPM-Ant (OpenBMB/CPM-Bee, cpm_live/tokenizers): at each place of the text
the longest entry, over characters.

One entry per line; `</_>` stands for a space, `</n>` for a line end, and `<name>` entries are special. In a
CPM-Bee file empty lines do not count; in a CPM-Ant file they take an id, and nothing has it (as transformers
reads it).

What CPM-Bee cannot spell is one `<unk>` per run of characters. The original writes such a run down beside the
text and gives it a number that only this text knows, and reads a text's own `<...>` as special tokens; here
text is text. CPM-Ant cuts text into Chinese words first (jieba), matches within them, and gives one `<unk>`
per character.

CPM-Bee's is written down as a `WordPiece` model behind a split that isolates the unknown runs. The library
reads that, to the same ids if each character is an entry too; otherwise its `<unk>` is wider. No part of a
`tokenizer.json` can say jieba, so for CPM-Ant it names a step that only we know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from caravan.data.vocabulary.definition import added_token, split, whole
from caravan.data.vocabulary.greedy import Longest
from caravan.types import UserError

WRITTEN = {" ": "</_>", "\n": "</n>"}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
UNKNOWN = NAMED["unk_token"]
JIEBA = {"type": "Jieba", "hmm": True}
"""CPM-Ant's first step: words of jieba's dictionary, and those its hidden Markov model finds between them.
(transformers, whose look-alike joins more Latin letters too, leaves the latter out; the release did not.)"""
ANT_CLASS = "CpmAntTokenizer"
UNKNOWN_RUNS = "(?#characters of no entry)[^"
"""Where CPM-Bee's split begins."""
LONGEST_WORD = 200
"""Characters of a word that CPM-Ant still looks at; a longer one is unknown as a whole."""


def kind(model: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """`cpmbee`, `cpmant` or None, from config.json and tokenizer_config.json: the vocab.txt of other families
    is another thing."""
    classes = {"CpmBeeTokenizer": "cpmbee", "CPMBeeTokenizer": "cpmbee", ANT_CLASS: "cpmant"}
    said = model.get("model_type")
    return said if said in ("cpmbee", "cpmant") else classes.get(str(config.get("tokenizer_class")))


def read(path: Path, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, defaults of tokenizer_config.json) of a vocab.txt. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}", "download it again") from None
    spoken = {text: character for character, text in WRITTEN.items()}
    vocab: dict[str, int] = {}
    for number, line in enumerate(lines):
        if not line:
            continue
        text = spoken.get(line, line)
        if text in vocab:
            raise UserError(f"{path} line {number + 1} repeats {line!r}", "each entry must have one id")
        vocab[text] = len(vocab) if family == "cpmbee" else number
    missing = [WRITTEN.get(text, text) for text in (*WRITTEN, UNKNOWN) if text not in vocab]
    if missing:
        raise UserError(f"{path} has no entry {missing[0]}", "the file may be cut short, or another model's")
    names = {name: text for name, text in NAMED.items() if text in vocab}
    # transformers has a class for CPM-Ant, and it reads vocab.txt, which we write too.
    return definition(vocab, family), names | ({} if family == "cpmbee" else {"tokenizer_class": ANT_CLASS})


def definition(vocab: Mapping[str, int], family: str) -> dict[str, Any]:
    """A tokenizer.json of greedy matching over characters."""
    model = {
        "type": "WordPiece",
        "unk_token": UNKNOWN,
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": 1 << 62 if family == "cpmbee" else LONGEST_WORD,
        "vocab": dict(vocab),
    }
    special = [added_token(text, token) for text, token in vocab.items() if _is_special(text)]
    known = {character for text in vocab if not _is_special(text) for character in text}
    first = split(f"{UNKNOWN_RUNS}{_ranges(known)}]+") if family == "cpmbee" else JIEBA
    return whole(model, special, pre_tokenizer=first, decoder={"type": "Fuse"})


def family_of(definition: Mapping[str, Any]) -> str | None:
    """`cpmbee` or `cpmant` if a tokenizer.json is of this kind; else None."""
    model, first = definition.get("model") or {}, definition.get("pre_tokenizer") or {}
    if (model.get("type"), model.get("continuing_subword_prefix")) != ("WordPiece", ""):
        return None
    if first.get("type") == JIEBA["type"]:
        return "cpmant"
    found = first.get("type") == "Split" and str(first["pattern"].get("Regex")).startswith(UNKNOWN_RUNS)
    return "cpmbee" if found else None


def written(definition: Mapping[str, Any]) -> str:
    """The vocab.txt of a tokenizer.json of this kind."""
    texts = {token: WRITTEN.get(text, text) for text, token in definition["model"]["vocab"].items()}
    return "".join(texts.get(token, "") + "\n" for token in range(max(texts) + 1))


def _is_special(text: str) -> bool:
    return len(text) > 1 and text[0] == "<" and text[-1] == ">"


def _ranges(characters: Iterable[str]) -> str:
    """The inside of a character class of a regular expression."""
    runs = groupby(enumerate(sorted(map(ord, characters))), key=lambda pair: pair[1] - pair[0])
    return "".join(
        f"\\x{{{points[0]:x}}}-\\x{{{points[-1]:x}}}"
        for points in ([point for _, point in run] for _, run in runs)
    )


class Words:
    """Greedy longest match over characters."""

    never_special = True

    def __init__(self, definition: dict[str, Any]) -> None:
        model = definition["model"]
        self._vocab: dict[str, int] = dict(model["vocab"])
        self._special = {t["id"]: t["content"] for t in definition.get("added_tokens") or []}
        self._vocab |= {text: token for token, text in self._special.items()}
        plain = {text: token for text, token in self._vocab.items() if token not in self._special}
        self._match = Longest(plain)
        self._texts = {token: text for text, token in plain.items()}
        self._unknown = self._vocab[model["unk_token"]]
        self._cut = jieba() if family_of(definition) == "cpmant" else None
        self._longest = model["max_input_chars_per_word"]

    def vocabulary(self) -> dict[str, int]:
        return self._vocab

    def encode(self, text: str, begins: bool = True) -> list[int]:
        if self._cut is not None:
            return [token for word in self._cut(text) for token in self._word(word)]
        ids = self._match(text)
        return [
            t if t >= 0 else self._unknown
            for t, before in zip(ids, [0, *ids], strict=False)
            if (t, before) != (-1, -1)
        ]

    def _word(self, word: str) -> list[int]:
        if len(word) > self._longest:
            return [self._unknown]
        return [token if token >= 0 else self._unknown for token in self._match(word)]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def words(self, texts: Sequence[str]) -> list[list[list[int]]]:
        return [[self.encode(text)] for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        special = {} if skip_special else self._special
        return "".join(self._texts.get(token) or special.get(token, "") for token in ids)


@cache
def jieba() -> Callable[[str], Iterable[str]]:
    """Text to Chinese words. Raises UserError where jieba is not installed."""
    try:
        import jieba
    except ImportError:
        raise UserError(
            "CPM-Ant's vocabulary is matched within Chinese words, which the library jieba cuts",
            'pip install "caravan-llm[jieba]"',
        ) from None
    jieba.setLogLevel("WARNING")  # it tells of its dictionary otherwise
    return lambda text: jieba.cut(text, HMM=True)

"""Text to ids and back: byte-level BPE of our own, or whatever tokenizer a checkpoint brings.

Ours: byte-level BPE with the `qwen2` split (digits one by one: small models learn sums that way), no
normalizer, so that `decode(encode(x)) == x` for every text. Four special tokens, ids 0 to 3.

Special tokens are never read out of text. Whoever types `<|im_end|>` gets the nine pieces of that text, not
the token; the renderer puts special tokens in by id.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from caravan.data import template
from caravan.data.vocabulary import cpm, extending, merges, pruning, sentencepiece_model, sources, training
from caravan.data.vocabulary.codec import open_codec
from caravan.data.vocabulary.splits import SPLITS, name_of
from caravan.types import UserError

QWEN2_SPLIT = SPLITS["qwen2"]
"""The split that GGUF readers know as `qwen2`: words with their space, single digits, runs of punctuation."""

END_OF_TEXT, PAD, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.txt",
)
"""What belongs to a tokenizer in a model folder."""
Kind = Literal["bpe", "sentencepiece", "unigram", "bytes"]
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class Tokenizer:
    """One tokenizer, loaded by `Tokenizer.load` or made by `train`. Ids are Python ints.

    `bos`, `eos`, `pad`, `end_of_turn`: ids or None. `stop_ids`: any of them ends an answer.
    `chat_template`: the checkpoint's own, or ChatML if the tokenizer has its two tokens, or CPM-Bee's, or
    plain headings.
    """

    def __init__(
        self,
        definition: dict[str, Any],
        config: dict[str, Any],
        chat_template: str | None = None,
        more_stops: Iterable[int] = (),
        original: bytes | None = None,
    ) -> None:
        self._definition, self._config = definition, config
        self.original = original
        """The SentencePiece `.model` behind it, which some readers want; none for other kinds."""
        added = {t["content"]: t for t in definition.get("added_tokens") or []}
        self.special: dict[str, int] = {text: t["id"] for text, t in added.items() if t["special"]}
        self.token_texts: dict[str, str] = {}
        for name in _NAMED:
            text = _content(config.get(name))
            if text is not None:
                self.token_texts[name] = text
                if text in added:
                    self.special[text] = added[text]["id"]
        self.strips: dict[str, tuple[bool, bool]] = {
            text: (added[text].get("lstrip", False), added[text].get("rstrip", False))
            for text in self.special
        }
        self._codec = open_codec(definition, config, self.special)
        self._vocabulary = self._codec.vocabulary()
        for text in self.token_texts.values():
            found = self._vocabulary.get(text)
            if text not in self.special and found is not None:
                self.special[text], self.strips[text] = found, (False, False)
        self._control = frozenset(self.special.values())
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        """One more than the largest id."""
        self.bos, self.eos, self.pad = (self._named(n) for n in ("bos_token", "eos_token", "pad_token"))
        self.chat_template = chat_template or self._own_template()
        self.turn_stop = self._turn_stop()
        """(text, id) where a plain token ends answers, as RWKV's two line ends do."""
        self.end_of_turn = self._turn_end()
        self._more_stops = tuple(i for i in more_stops if 0 <= i < self.vocab_size)

    # -- reading and writing -------------------------------------------------------------------------------
    @classmethod
    def load(cls, folder: Path | str, chat: str | None = None) -> Tokenizer:
        """From a folder or one file: tokenizer.json, SentencePiece, tiktoken, GPT-2, RWKV or CPM files
        (`vocabulary/sources.py`). `chat`: a built-in chat template instead of the folder's own. Raises
        UserError."""
        path = Path(folder)
        definition, config = sources.read(path)
        folder = path if path.is_dir() else path.parent
        stops = _stops_of_model(folder, definition, config)
        own = template.builtin(chat) if chat else _template_of(folder, config)
        made = cls(definition, config, own, stops, sources.original(path, config))
        lacking = [t for t in template.header(made.chat_template).needs if t not in made._vocabulary]
        if chat and lacking:
            raise UserError(
                f"the chat template {chat} needs tokens that this tokenizer has not: {' '.join(lacking)}",
                "templates that need none: " + ", ".join(n for n in template.names() if not _needs(n)),
            )
        return made

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json (template inside) and chat_template.jinja."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            **self._config,
            "chat_template": self.chat_template,
        }
        _write_json(folder / "tokenizer.json", self._definition)
        _write_json(folder / "tokenizer_config.json", config)
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        if self.original is not None:
            (folder / "tokenizer.model").write_bytes(self.original)
        if cpm.family_of(self._definition):
            (folder / "vocab.txt").write_text(cpm.written(self._definition), encoding="utf-8", newline="\n")

    def complete(self, folder: Path | str) -> None:
        """Give a model folder what its copied tokenizer files lack: tokenizer.json, if they are of another
        format, and the chat template in use."""
        folder = Path(folder)
        of_cpm = cpm.family_of(self._definition) is not None
        if not (folder / "tokenizer.json").exists() or (of_cpm and not (folder / "vocab.txt").exists()):
            self.save(folder)
        config = sources.read_json(folder / "tokenizer_config.json")
        if _template_of(folder, config) != self.chat_template:
            _write_json(folder / "tokenizer_config.json", {**config, "chat_template": self.chat_template})
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    # -- text to ids ---------------------------------------------------------------------------------------
    def encode(self, text: str) -> list[int]:
        """Ids of untrusted text: nothing is added, and the text of a special token is text."""
        return self._plain(text, True)

    def encode_continuation(self, text: str) -> list[int]:
        """As `encode`, for text that goes on where other text stopped: no dummy space in front."""
        return self._plain(text, False)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; uses the threads that the tokenizers library is allowed."""
        rows = self._codec.encode_many([_whole(t) for t in texts])
        if self._codec.never_special:
            return rows
        return [
            ids if self._control.isdisjoint(ids) else self.encode(text)
            for ids, text in zip(rows, texts, strict=True)
        ]

    def _plain(self, text: str, begins: bool) -> list[int]:
        ids = self._codec.encode(_whole(text), begins)
        if self._codec.never_special or self._control.isdisjoint(ids):
            return ids
        # A unigram model may hold a special token's text as an ordinary piece: cut that text after one
        # character.
        ids = []
        for at, piece in enumerate(self._inside_special.split(text)):
            ids += self._codec.encode(_whole(piece), begins and not at)
        return [i for i in ids if i not in self._control or i == self._named("unk_token")]

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Any special token's text, longest first."""
        return re.compile(
            "|".join(re.escape(t) for t in sorted(self.special, key=len, reverse=True)) or "(?!)"
        )

    @cached_property
    def _inside_special(self) -> re.Pattern[str]:
        cuts = (f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in self.special if len(t) > 1)
        return re.compile("|".join(cuts) or "(?!)")

    # -- other vocabularies from this one ------------------------------------------------------------------
    def extended(
        self, texts: Iterable[str], more: int, min_count: int = 2, coverage: float = 0.9995
    ) -> Tokenizer:
        """At most `more` new entries behind the old ones, learned from text of other scripts
        (`vocabulary/extending.py`). No old id changes, and Latin text is encoded as before. Raises
        UserError."""
        definition, made = extending.extend(
            self._definition, self._codec.words, map(_whole, texts), more, min_count, coverage
        )
        original = sentencepiece_model.appended(self.original, made) if self.original else None
        return self._like(definition, original)

    def pruned(self, texts: Iterable[str]) -> tuple[Tokenizer, list[int]]:
        """(only what these texts use, the old id of each new one). Raises UserError."""
        used = {i for text in texts for i in self.encode(text)}
        definition, kept = pruning.prune(self._definition, used | self.stop_ids)
        return self._like(definition, None), kept

    def alike(self, other: Tokenizer) -> bool:
        """Whether both cut every text into the same ids, whatever files they come from."""
        parts = ("model", "added_tokens", "pre_tokenizer", "normalizer")
        return all(self._definition.get(part) == other._definition.get(part) for part in parts)

    def told(self, chat_template: str) -> Tokenizer:
        """The same vocabulary with another chat template (its text)."""
        return Tokenizer(
            self._definition, self._config, chat_template, self._more_stops, original=self.original
        )

    def _like(self, definition: dict[str, Any], original: bytes | None) -> Tokenizer:
        return Tokenizer(definition, self._config, self.chat_template, original=original)

    # -- ids to text ---------------------------------------------------------------------------------------
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Bytes that are not UTF-8 become U+FFFD."""
        return self._codec.decode([int(i) for i in ids], skip_special)

    def bytes_of(self, token: int) -> bytes:
        """The bytes one id stands for; a special token's own text."""
        return self._bytes[token]

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        byte_level = "ByteLevel" in json.dumps(self._definition.get("decoder") or {})
        of_cpm = cpm.family_of(self._definition) is not None
        added = {t["id"] for t in self._definition.get("added_tokens") or []}
        for text, token in self._vocabulary.items():
            if of_cpm or token in added or token in self._control:
                table[token] = text.encode()
            elif byte_level:
                found = merges.as_bytes(text)
                table[token] = text.encode() if found is None else found
            elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
                table[token] = bytes([int(text[3:5], 16)])
            else:
                table[token] = text.replace("\u2581", " ").encode()
        return table

    @property
    def kind(self) -> str:
        """BPE, Unigram or WordPiece: the algorithm."""
        return str(self._definition["model"].get("type", "BPE"))

    @property
    def split_name(self) -> str | None:
        """llama.cpp's name of the split, which a GGUF file must give; None if it has none."""
        return name_of(self._definition)

    # -- what the special tokens are -----------------------------------------------------------------------
    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: end of turn, end of text, and what generation_config.json lists."""
        return frozenset(i for i in (self.end_of_turn, self.eos, *self._more_stops) if i is not None)

    @property
    def unknown(self) -> int | None:
        """The id that stands for what the vocabulary cannot spell; None if it can spell everything."""
        model = self._definition["model"]
        named = self._named("unk_token")
        spells = model.get("byte_fallback") or "ByteLevel" in json.dumps(
            self._definition.get("decoder") or {}
        )
        return None if spells else named

    def _named(self, name: str) -> int | None:
        text = self.token_texts.get(name)
        return None if text is None else self._vocabulary.get(text)

    def _own_template(self) -> str:
        if TURN_START in self.special and TURN_END in self.special:
            return template.CHATML
        if cpm.family_of(self._definition) and self.special.keys() >= {*_needs("cpm-bee")}:
            return template.builtin("cpm-bee")
        named = self.token_texts
        closing = named.get("sep_token")
        if "cls_token" in named and closing is not None and named.get("eos_token") in (None, closing):
            return template.builtin("encoder")
        return template.PLAIN

    def _turn_stop(self) -> tuple[str, int] | None:
        text = template.header(self.chat_template).stop
        ids = self.encode_continuation(text) if text else []
        return (text, ids[0]) if text and len(ids) == 1 else None

    def _turn_end(self) -> int | None:
        """The first special token that the template puts behind an answer; the end of text if it puts
        none."""
        if self.turn_stop:
            return self.turn_stop[1]
        probe = [{"role": "user", "content": "\uf8f0"}, {"role": "assistant", "content": "\uf8f1"}]
        try:
            text = template.fill(self.chat_template, probe, False, self.token_texts)
        except UserError:
            return self.eos
        behind = text.rpartition("\uf8f1")[2]
        found = [(at, -len(t), i) for t, i in self.special.items() if (at := behind.find(t)) >= 0]
        return min(found)[2] if found else self.eos


def train(
    texts: Iterable[str],
    vocab_size: int,
    min_count: int = 2,
    kind: Kind = "bpe",
    coverage: float = 0.9995,
    chat: str = "chatml",
    special: Sequence[str] = (),
) -> Tokenizer:
    """A tokenizer of `vocab_size` ids at most, with ChatML's tokens. Same texts, same tokenizer.

    `kind`: `bpe` over bytes; `sentencepiece` and `unigram` of the library of that name; `bytes` needs no
    text. `vocabulary/training.py` says more. `chat`: a built-in template, whose tokens are added; `special`:
    further special tokens. Raises UserError.
    """
    texts = map(_whole, texts)
    source = template.builtin(chat)
    more = [t for t in dict.fromkeys((*template.header(source).needs, *special)) if t not in SPECIALS]
    if kind == "bytes":
        return Tokenizer(*training.single_bytes((*SPECIALS, *more)), source)
    if kind == "bpe":
        return Tokenizer(*training.byte_bpe(texts, vocab_size, (*SPECIALS, *more), min_count), source)
    algorithm: Literal["bpe", "unigram"] = "bpe" if kind == "sentencepiece" else "unigram"
    turns = (TURN_START, TURN_END, *more)
    original, definition, config = training.sentencepiece(texts, vocab_size, algorithm, turns, coverage)
    return Tokenizer(definition, config, source, original=original)


def _needs(name: str) -> tuple[str, ...]:
    return template.header(template.builtin(name)).needs


def copy_files(source: Path, target: Path) -> None:
    """Copy the tokenizer files of one folder into another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _whole(text: str) -> str:
    """Lone surrogates (from broken JSON escapes) cannot be written as UTF-8: U+FFFD instead."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _stops_of_model(folder: Path, definition: dict[str, Any], config: dict[str, Any]) -> list[int]:
    """Stop ids from generation_config.json and config.json; names of bos and eos are filled in when
    missing."""
    model = {
        **sources.read_json(folder / "config.json"),
        **sources.read_json(folder / "generation_config.json"),
    }
    text_of = (
        {i: t for t, i in ((definition.get("model") or {}).get("vocab") or {}).items()}
        if isinstance((definition.get("model") or {}).get("vocab"), dict)
        else {}
    )
    text_of.update({t["id"]: t["content"] for t in definition.get("added_tokens") or []})
    for name in ("bos_token", "eos_token", "pad_token"):
        given = model.get(f"{name}_id")
        first = given[0] if isinstance(given, list) and given else given
        if _content(config.get(name)) is None and isinstance(first, int) and first in text_of:
            config[name] = text_of[first]
    stops = model.get("eos_token_id")
    return [i for i in (stops if isinstance(stops, list) else [stops]) if isinstance(i, int)]


def _template_of(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {t.get("name"): t.get("template") for t in given}
        given = named.get("default") or next(iter(named.values()), None)
    return given if isinstance(given, str) and given.strip() else None


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

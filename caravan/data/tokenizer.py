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
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from caravan.data import template
from caravan.types import UserError

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The split that GGUF readers know as `qwen2`: words with their space, single digits, runs of punctuation."""

END_OF_TEXT, PAD, TURN_START, TURN_END = SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
"""What belongs to a tokenizer in a model folder."""
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class Tokenizer:
    """One tokenizer, loaded by `Tokenizer.load` or made by `train`. Ids are Python ints.

    `bos`, `eos`, `pad`, `end_of_turn`: ids or None. `stop_ids`: any of them ends an answer.
    `chat_template`: the checkpoint's own, or ChatML if the tokenizer has its two tokens, or plain headings.
    """

    def __init__(
        self,
        definition: dict[str, Any],
        config: dict[str, Any],
        chat_template: str | None = None,
        more_stops: Iterable[int] = (),
    ) -> None:
        self._definition, self._config = definition, config
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
        self._backend = _backend(definition, self.special)
        self._continuation = _without_prefix(definition, self.special) or self._backend
        for text in self.token_texts.values():
            found = self._backend.token_to_id(text)
            if text not in self.special and found is not None:
                self.special[text], self.strips[text] = found, (False, False)
        self._control = frozenset(self.special.values())
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """One more than the largest id."""
        self.bos, self.eos, self.pad = (self._named(n) for n in ("bos_token", "eos_token", "pad_token"))
        self.chat_template = chat_template or self._own_template()
        self.end_of_turn = self._turn_end()
        self._more_stops = tuple(i for i in more_stops if 0 <= i < self.vocab_size)

    # -- reading and writing -------------------------------------------------------------------------------
    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """From a Hugging Face folder (tokenizer.json, or GPT-2's vocab.json with merges.txt). Raises
        UserError."""
        folder = Path(folder)
        config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
        if (folder / "tokenizer.json").exists():
            definition = _json(folder / "tokenizer.json")
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            definition, defaults = _gpt2(folder)
            config = {**defaults, **config}
        else:
            raise UserError(
                f"no tokenizer in {folder}: tokenizer.json is missing",
                "a Hugging Face folder with a fast tokenizer is needed",
            )
        stops = _stops_of_model(folder, definition, config)
        return cls(definition, config, _template_of(folder, config), stops)

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

    # -- text to ids ---------------------------------------------------------------------------------------
    def encode(self, text: str) -> list[int]:
        """Ids of untrusted text: nothing is added, and the text of a special token is text."""
        return self._plain(self._backend, text)

    def encode_continuation(self, text: str) -> list[int]:
        """As `encode`, for text that goes on where other text stopped: no dummy space in front."""
        return self._plain(self._continuation, text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; uses the threads that the tokenizers library is allowed."""
        rows = [
            e.ids
            for e in self._backend.encode_batch_fast([_whole(t) for t in texts], add_special_tokens=False)
        ]
        return [
            ids if self._control.isdisjoint(ids) else self.encode(text)
            for ids, text in zip(rows, texts, strict=True)
        ]

    def _plain(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        ids: list[int] = backend.encode(_whole(text), add_special_tokens=False).ids
        if self._control.isdisjoint(ids):
            return ids
        # A unigram model may hold a special token's text as an ordinary piece: cut that text after one
        # character.
        ids = []
        for at, piece in enumerate(self._inside_special.split(text)):
            part = self._continuation if at else backend
            ids += part.encode(_whole(piece), add_special_tokens=False).ids
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

    # -- ids to text ---------------------------------------------------------------------------------------
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Bytes that are not UTF-8 become U+FFFD."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def bytes_of(self, token: int) -> bytes:
        """The bytes one id stands for; a special token's own text."""
        return self._bytes[token]

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        byte_level = "ByteLevel" in json.dumps(self._definition.get("decoder") or {})
        added = {t["id"] for t in self._definition.get("added_tokens") or []}
        for text, token in self._backend.get_vocab(with_added_tokens=True).items():
            if token in added or token in self._control:
                table[token] = text.encode()
            elif byte_level:
                table[token] = (
                    bytes(_BYTE_OF[c] for c in text) if all(c in _BYTE_OF for c in text) else text.encode()
                )
            elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
                table[token] = bytes([int(text[3:5], 16)])
            else:
                table[token] = text.replace("\u2581", " ").encode()
        return table

    # -- what the special tokens are -----------------------------------------------------------------------
    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: end of turn, end of text, and what generation_config.json lists."""
        return frozenset(i for i in (self.end_of_turn, self.eos, *self._more_stops) if i is not None)

    def _named(self, name: str) -> int | None:
        text = self.token_texts.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _own_template(self) -> str:
        if TURN_START in self.special and TURN_END in self.special:
            return template.CHATML
        return template.PLAIN

    def _turn_end(self) -> int | None:
        """The first special token that the template puts behind an answer; the end of text if it puts
        none."""
        probe = [{"role": "user", "content": "\uf8f0"}, {"role": "assistant", "content": "\uf8f1"}]
        try:
            text = template.fill(self.chat_template, probe, False, self.token_texts)
        except UserError:
            return self.eos
        behind = text.rpartition("\uf8f1")[2]
        found = [(at, -len(t), i) for t, i in self.special.items() if (at := behind.find(t)) >= 0]
        return min(found)[2] if found else self.eos


def train(texts: Iterable[str], vocab_size: int, min_count: int = 2) -> Tokenizer:
    """Byte-level BPE of `vocab_size` ids at most (256 bytes + 4 specials at least). Same texts, same
    tokenizer."""
    if vocab_size < 256 + len(SPECIALS):
        raise UserError(
            f"a byte-level vocabulary needs at least {256 + len(SPECIALS)} entries, not {vocab_size}",
            "use --vocab 4096 or more",
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_count,
        show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(_pieces(texts), trainer=trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    return Tokenizer(json.loads(backend.to_str()), config, template.CHATML)


def copy_files(source: Path, target: Path) -> None:
    """Copy the tokenizer files of one folder into another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _pieces(texts: Iterable[str], limit: int = 1 << 16) -> Iterator[str]:
    """Long texts in parts: the trainer holds whole pieces in memory. Cut at line ends, where the split cuts
    too."""
    for text in texts:
        start = 0
        while start < len(text):
            stop = start + limit
            if stop < len(text):
                line = text.rfind("\n", start, stop) + 1
                stop = line if line > start else stop
            yield _whole(text[start:stop])
            start = stop


def _whole(text: str) -> str:
    """Lone surrogates (from broken JSON escapes) cannot be written as UTF-8: U+FFFD instead."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _backend(definition: dict[str, Any], special: dict[str, int]) -> tokenizers.Tokenizer:
    """The library's tokenizer, with every control token marked special and none ever read out of text."""
    tokens = [
        {**t, "special": t["special"] or t["content"] in special}
        for t in definition.get("added_tokens") or []
    ]
    changed = {**definition, "added_tokens": tokens, "truncation": None, "padding": None}
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(changed))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer.json cannot be read: {error}") from error
    backend.encode_special_tokens = True
    return backend


def _without_prefix(definition: dict[str, Any], special: dict[str, int]) -> tokenizers.Tokenizer | None:
    """The same tokenizer without the dummy space that SentencePiece-like ones put in front; None if there is
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
    return None if all(changed[k] == definition.get(k) for k in changed) else _backend(changed, special)


def _gpt2(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """GPT-2's two files; the `#version` line of merges.txt is optional."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [
        (line.partition(" ")[0], line.partition(" ")[2])
        for line in lines
        if line and not line.startswith("#version")
    ]
    vocab = _json(folder / "vocab.json")
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocab:
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return json.loads(backend.to_str()), {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}


def _stops_of_model(folder: Path, definition: dict[str, Any], config: dict[str, Any]) -> list[int]:
    """Stop ids from generation_config.json and config.json; names of bos and eos are filled in when
    missing."""
    model = {**_json(folder / "config.json"), **_json(folder / "generation_config.json")}
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


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} should hold a JSON object")
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _byte_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, backwards."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTE_OF = _byte_table()

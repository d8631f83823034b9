"""SentencePiece `.model` files: BPE and unigram, read without the library.

The file is a protocol buffer (sentencepiece_model.proto of google/sentencepiece); the few fields that decide
ids are read here. What comes out is a `tokenizer.json` definition:

* BPE: the pieces with one merge each (`merges.canonical`), byte fallback as stored.
* unigram: the pieces with their log-probabilities.
* The words are cut before each run of spaces (`▁`) where no piece reaches over such a place, as none does
  unless someone trained with `--split_by_whitespace=false`: same ids, and the library's cache can work.
* The normaliser is the file's own table (`normaliser.py`), in the definition as `Precompiled`.

Not supported, with a clear error: word and char models, white space as a suffix, and pieces marked unused.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from caravan.data.vocabulary import merges
from caravan.data.vocabulary.definition import added_token, bpe, split, whole
from caravan.types import UserError

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry: its text, score (log-probability, or minus its rank) and type."""

    text: str
    score: float
    kind: int


@dataclass(slots=True)
class Model:
    """What decides ids, of a `.model` file."""

    pieces: list[Piece] = field(default_factory=list)
    algorithm: int = _UNIGRAM
    byte_fallback: bool = False
    suffix_space: bool = False
    charsmap: bytes = b""
    dummy_prefix: bool = True
    squeeze: bool = True
    escape: bool = True
    ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})


def read(data: bytes) -> Model:
    """Parse a `.model` file. Raises UserError."""
    model = Model()
    try:
        for number, value in _fields(data):
            if number == 1:
                model.pieces.append(_piece(value))
            elif number == 2:
                _trainer(model, value)
            elif number == 3:
                _normalizer(model, value)
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError) as error:
        raise UserError(
            f"not a SentencePiece model: {error}", "the file may be cut short, or a tiktoken file"
        ) from error
    if not model.pieces:
        raise UserError("not a SentencePiece model: it has no pieces")
    return model


def definition(model: Model) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, defaults for tokenizer_config.json). Raises UserError for what is not supported."""
    if model.algorithm not in (_UNIGRAM, _BPE):
        raise UserError("a SentencePiece word or char model is not supported", "train it as bpe or unigram")
    if model.suffix_space:
        raise UserError("SentencePiece with white space as a suffix is not supported")
    if any(p.kind == UNUSED for p in model.pieces):
        raise UserError("a SentencePiece model with pieces marked unused is not supported")
    if not model.escape:
        raise UserError("SentencePiece without escaped white space is not supported")
    added = [
        added_token(p.text, i, p.kind != USER_DEFINED)
        for i, p in enumerate(model.pieces)
        if p.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    body = whole(
        _bpe(model) if model.algorithm == _BPE else _unigram(model),
        added,
        normalizer=_normalizers(model),
        pre_tokenizer=_words(model),
        decoder=_decoder(model),
    )
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "sentencepiece_normalizer": True}
    for name in ("unk", "bos", "eos", "pad"):
        if 0 <= model.ids[name] < len(model.pieces):
            config[f"{name}_token"] = model.pieces[model.ids[name]].text
    return body, config


def tied(model: Model) -> int:
    """How many pieces of a BPE model share their score with another. SentencePiece merges those leftmost
    first, whichever piece it is, and no list of merges can say so."""
    scores = [p.score for p in model.pieces if p.kind == NORMAL and len(p.text) > 1]
    return len(scores) - len(set(scores)) if model.algorithm == _BPE else 0


def appended(data: bytes, pieces: list[str]) -> bytes:
    """The same BPE model with more pieces, each merged later than all that were there.

    Scores go down from the lowest one. (Score 0, as in a well-known recipe, would put new pieces before all
    old ones here and behind them in converted copies.) Repeated fields may stand anywhere in the file.
    """
    lowest = min(p.score for p in read(data).pieces)
    more = [
        _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", lowest - 1 - k))
        for k, text in enumerate(pieces)
    ]
    return data + b"".join(more)


# -- the pieces of a definition ------------------------------------------------------------------------------


def _normalizers(model: Model) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.squeeze:
        steps.append({"type": "Replace", "pattern": {"Regex": rf"\A +|[ {SPACE}]+\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _words(model: Model) -> dict[str, Any] | None:
    reaches_over = any(
        before != SPACE and after == SPACE
        for p in model.pieces
        if p.kind in (NORMAL, USER_DEFINED)
        for before, after in zip(p.text, p.text[1:], strict=False)
    )
    if reaches_over:
        return None
    return split(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")


def _decoder(model: Model) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if model.dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _bpe(model: Model) -> dict[str, Any]:
    usable = {p.text: (-p.score, i) for i, p in enumerate(model.pieces) if p.kind == NORMAL}
    ranks = {text: rank for rank, text in enumerate(sorted(usable, key=lambda t: usable[t]))}
    return bpe(
        {p.text: i for i, p in enumerate(model.pieces)},
        merges.canonical(ranks, merges.characters),
        unk_token=model.pieces[model.ids["unk"]].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _unigram(model: Model) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.ids["unk"],
        "vocab": [[p.text, p.score] for p in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


# -- the wire format -----------------------------------------------------------------------------------------


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, int or bytes) of one message; 32- and 64-bit values as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError("the file ends inside a field")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def _field(number: int, content: bytes) -> bytes:
    size, head = len(content), bytearray([number << 3 | 2])
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*head, size]) + content


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = value.decode()
        elif number == 2:
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            kind = value
    return Piece(text, score, kind)


def _trainer(model: Model, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 3:
            model.algorithm = value
        elif number == 24:
            model.suffix_space = bool(value)
        elif number == 35:
            model.byte_fallback = bool(value)
        elif number in (40, 41, 42, 43):
            model.ids[("unk", "bos", "eos", "pad")[number - 40]] = _signed(value)


def _normalizer(model: Model, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.charsmap = value
        elif number == 3:
            model.dummy_prefix = bool(value)
        elif number == 4:
            model.squeeze = bool(value)
        elif number == 5:
            model.escape = bool(value)

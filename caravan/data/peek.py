"""A look at records as a model would be trained on them: tokens, which of them carry loss, and how they pack.

Data are untrusted: `visible` takes the sting out of control characters, whoever prints them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from caravan.data import formats, template
from caravan.data.pack import first_fit, fit
from caravan.data.render import Rendered, render, render_pair
from caravan.data.tokenizer import SPECIALS, Tokenizer
from caravan.data.vocabulary import training
from caravan.types import Conversation, Document, Labelled, Ranking, UserError

KINDS = ("conversations", "preferences", "corpus")
_VOCABULARY = 2000


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a token, or of several where one alone is part of a character."""

    text: str
    trained: bool
    special: bool
    cut: bool
    """Behind what fits into the context."""


@dataclass(frozen=True, slots=True)
class Look:
    """One sequence of tokens: a conversation, an answer of a ranking, a document."""

    title: str
    pieces: tuple[Piece, ...]
    tokens: int
    trained: int
    kept: int
    """Tokens that fit into the context, up to the last whole answer; 0: nothing to train on would be left."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Peek:
    """What a source is, and its records from a place on."""

    kind: str
    read_as: dict[str, str]
    """File -> format and the reason."""
    values: list[Conversation | Ranking | Labelled | Document]
    problems: list[formats.Problem]
    also: dict[str, str] = field(default_factory=dict)
    """Other kinds the first file gives, where nobody asked for one -> format and the reason."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How sequences fill contexts."""

    sequences: int
    tokens: int
    contexts: int
    truncated: int
    lost: int
    """Sequences of which nothing to train on is left."""
    context: int

    @property
    def filled(self) -> float:
        return self.tokens / (self.contexts * self.context) if self.contexts else 0.0


def open_source(path: Path, kind: str, asked: str, skip: int, count: int) -> Peek:
    """The first records of a file or folder behind `skip`; `kind` auto takes the first that reads.

    Raises UserError if nothing can be read.
    """
    complaint: UserError | None = None
    for one in KINDS if kind == "auto" else (kind,):
        problems: list[formats.Problem] = []
        chosen: dict[str, str] = {}
        try:
            if asked != "auto" and kind == "auto":
                formats.named(asked, one)
            found = formats.read_all(path, one, problems.append, formats.Limits(), chosen, asked)
            values = [f.value for f in islice(found, skip, skip + count)]
        except UserError as error:
            if not str(error).startswith(("nothing that gives", "there is no format")):
                raise
            complaint = complaint or error
            continue
        also = _also(path, one, chosen) if kind == asked == "auto" else {}
        return Peek(one, chosen, values, problems, also)
    assert complaint is not None
    raise complaint


def _also(path: Path, kind: str, chosen: Mapping[str, str]) -> dict[str, str]:
    """What else the first file can be read as (answers with labels are chats and preferences)."""
    file = path if path.is_file() else path / next(iter(chosen))
    found: dict[str, str] = {}
    for other in formats.DECIDED:
        try:
            best = formats.choose(file, other, formats.Limits(), lambda _: None) if other != kind else None
        except UserError:  # in two ways: then it must be asked for
            continue
        if best:
            found[other] = f"{best[0]}: {best[1]}"
    return found


def stand_in(values: Sequence[Conversation | Ranking | Labelled | Document], name: str | None) -> Tokenizer:
    """A small tokenizer made from the records themselves, with all that a built-in template needs."""
    source = template.builtin(name or "chatml")
    needs = [t for t in template.header(source).needs if t not in SPECIALS]
    specials = (*SPECIALS, *needs, *(t for t in ("<s>", "</s>") if t not in needs))
    texts = [text for value in values for text in _texts(value)]
    definition, config = training.byte_bpe(texts, _VOCABULARY, specials, 2)
    return Tokenizer(definition, {"cls_token": "<s>", "sep_token": "</s>"} | config, source)


def _texts(value: Conversation | Ranking | Labelled | Document) -> Iterator[str]:
    if isinstance(value, Document):
        yield value.text
        return
    yield from (m.content for m in (value.messages if isinstance(value, Conversation) else value.prompt))
    if isinstance(value, Ranking):
        yield from value.responses
    elif isinstance(value, Labelled):
        yield value.response


def looks(
    value: Conversation | Ranking | Labelled | Document, tok: Tokenizer, context: int
) -> Iterator[Look]:
    """What a record becomes, one sequence after another."""
    for title, rendered in _rendered(value, tok):
        if isinstance(rendered, str):
            yield Look(title, (), 0, 0, 0, rendered)
            continue
        kept = rendered if isinstance(value, Document) else fit(rendered, context)  # texts are cut anywhere
        size = len(kept) if kept else 0
        pieces = tuple(_pieces(rendered, size, tok))
        yield Look(title, pieces, len(rendered), sum(rendered.mask), size)


def _rendered(
    value: Conversation | Ranking | Labelled | Document, tok: Tokenizer
) -> Iterator[tuple[str, Rendered | str]]:
    """(title, tokens or what the template says against it)."""
    title = value.id or "without id"
    try:
        if isinstance(value, Document):
            ids = [*tok.encode(value.text), *([] if tok.eos is None else [tok.eos])]
            yield title, Rendered(ids, [True] * len(ids))
        elif isinstance(value, Conversation):
            yield title, render(value.messages, tok)
        elif isinstance(value, Labelled):
            yield (
                f"{title}, {'good' if value.good else 'bad'}",
                render_pair(value.prompt, value.response, tok),
            )
        else:
            for response, rank in sorted(
                zip(value.responses, value.ranks, strict=True), key=lambda pair: pair[1]
            ):
                yield f"{title}, rank {rank}", render_pair(value.prompt, response, tok)
    except UserError as error:
        yield title, str(error)


def _pieces(rendered: Rendered, kept: int, tok: Tokenizer) -> Iterator[Piece]:
    """Tokens as text; bytes that are no whole character wait for the next ones."""
    control = set(tok.special.values())
    held, state = b"", (False, False, False)
    for at, (token, trained) in enumerate(zip(rendered.ids, rendered.mask, strict=True)):
        now = (trained, token in control, at >= kept)
        if held and now != state:
            yield Piece(held.decode("utf-8", "replace"), *state)
            held = b""
        held, state = held + tok.bytes_of(token), now
        try:
            text = held.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and len(held) < 4:
                continue
            text = held.decode("utf-8", "replace")
        yield Piece(text, *state)
        held = b""
    if held:
        yield Piece(held.decode("utf-8", "replace"), *state)


def packing(found: Sequence[Look], context: int) -> Packing:
    """How these sequences would be packed into contexts (first fit, longest first; a longer text fills as
    many as it can)."""
    whole = [look for look in found if not look.problem]
    kept = [look.kept for look in whole if look.kept]
    rest = [k % context for k in kept if k % context]
    return Packing(
        sequences=len(kept),
        tokens=sum(kept),
        contexts=sum(k // context for k in kept) + len(first_fit(rest, context)),
        truncated=sum(0 < look.kept < look.tokens for look in whole),
        lost=sum(look.kept == 0 for look in whole),
        context=context,
    )


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


def visible(text: str) -> str:
    """Without characters that a terminal or browser would obey: they are written out instead."""

    def shown(found: re.Match[str]) -> str:
        code = ord(found.group())
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"

    return _CONTROL.sub(shown, text)

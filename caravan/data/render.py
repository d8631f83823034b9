"""One renderer: messages to token ids and a loss mask, for training, reward, RL, evaluation and serving.

The promise: what is served before an answer is, id for id, what stood before that answer in training. It
holds by construction. A conversation is laid down turn by turn; every answer starts a piece of its own that
is tokenised apart, behind exactly the ids a server would send. No merge can cross that seam.

How a jinja template of unknown shape is cut into turns: each content is wrapped in two private-use marks,
inside its outer white space (templates like to trim). Where the marks come out tells untrusted text from the
template's own, and only the latter may become special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from caravan.data import template
from caravan.data.tokenizer import Tokenizer
from caravan.types import ROLES, Message, UserError


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids, and for each whether it is the assistant's (its stop token included), i.e. carries loss."""

    ids: list[int]
    mask: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


def render(messages: Sequence[Message], tok: Tokenizer, generation_prompt: bool = False) -> Rendered:
    """Ids and mask of a conversation; with `generation_prompt`, of the prompt for the next answer.

    `render(m[:k], generation_prompt=True).ids` is a prefix of `render(m).ids` for every answer m[k].
    Raises UserError for an unknown role, or with the template's words when it refuses the messages.
    """
    ids: list[int] = []
    mask: list[bool] = []
    marks = _Marks(messages)
    for text, answer, goes_on in _pieces(messages, marks, tok, generation_prompt):
        piece, last = _encode(_parts(text, marks, tok, answer), tok, answer, goes_on)
        ids += piece
        mask += [answer and at <= last for at in range(len(piece))]
    return Rendered(ids, mask)


def render_pair(prompt: Sequence[Message], response: str, tok: Tokenizer) -> Rendered:
    """A prompt and one answer, mask on the answer alone, ending at its stop token (where a reward is
    read)."""
    before = render(prompt, tok, generation_prompt=True).ids
    whole = render([*prompt, Message("assistant", response)], tok)
    stop = max(i for i, answered in enumerate(whole.mask) if answered) + 1
    return Rendered(whole.ids[:stop], [False] * len(before) + [True] * (stop - len(before)))


# -- cutting into turns --------------------------------------------------------------------------------------


class _Marks:
    """A start and an end mark per message, of a private-use character that occurs in no content."""

    def __init__(self, messages: Sequence[Message]) -> None:
        used = {c for m in messages for c in m.content if c >= "\U000f0000"}
        free = next(chr(c) for c in range(0xF0000, 0xFFFFD) if chr(c) not in used)
        self._free = free
        self.pattern = re.compile(f"{free}([SE])([0-9]+){free}")

    def start(self, k: int) -> str:
        return f"{self._free}S{k}{self._free}"

    def end(self, k: int) -> str:
        return f"{self._free}E{k}{self._free}"

    def wrap(self, k: int, content: str) -> str:
        core = content.strip()
        left = len(content) - len(content.lstrip())
        return content[:left] + self.start(k) + core + self.end(k) + content[left + len(core) :]


def _pieces(
    messages: Sequence[Message], marks: _Marks, tok: Tokenizer, generation_prompt: bool
) -> Iterator[tuple[str, bool, bool]]:
    """(marked text, is an answer, follows other text) per piece: prompt, answer, prompt, answer, …"""
    for message in messages:
        if message.role not in ROLES:
            raise UserError(
                f"unknown role {message.role!r} in a conversation", f"roles are {', '.join(ROLES)}"
            )
    wrapped = [{"role": m.role, "content": marks.wrap(k, m.content)} for k, m in enumerate(messages)]

    def filled(count: int, prompt: bool) -> str:
        return template.fill(tok.chat_template, wrapped[:count], prompt, tok.token_texts)

    answers = [k for k, message in enumerate(messages) if message.role == "assistant"]
    prompts = [(k, filled(k, True)) for k in answers]
    if generation_prompt or not messages or messages[-1].role != "assistant":
        prompts.append((len(messages), filled(len(messages), generation_prompt)))
    done, anchor = "", ""
    for turn, (k, prompt) in enumerate(prompts):
        yield _after(prompt, done, anchor), False, bool(done)
        if k < len(messages):
            whole = filled(k + 1, False)
            following = prompts[turn + 1][1] if turn + 1 < len(prompts) else whole
            whole = _kept(whole, following, marks.end(k))
            yield _answer(whole, prompt, anchor, marks, k), True, True
            done, anchor = whole, marks.end(k)


def _kept(whole: str, following: str, anchor: str) -> str:
    """`whole` without what it loses behind its answer once the conversation goes on (Phi-3's template ends
    every finished conversation with an end-of-text token, for one)."""
    tail, known = _tail(whole, anchor), _tail(following, anchor)
    if anchor not in following or known.startswith(tail):
        return whole
    same = next((at for at, (a, b) in enumerate(zip(tail, known, strict=False)) if a != b), len(known))
    return whole[: len(whole) - len(tail) + same]


def _tail(text: str, anchor: str) -> str:
    return text.rpartition(anchor)[2] if anchor and anchor in text else text


def _after(text: str, done: str, anchor: str) -> str:
    """What `text` adds to `done`. Templates may rewrite earlier turns: compare behind the last answer
    only."""
    if text.startswith(done):
        return text[len(done) :]
    tail, known = _tail(text, anchor), _tail(done, anchor)
    if anchor not in text or not tail.startswith(known):
        raise UserError(
            "the chat template changes what follows an answer once the conversation goes on",
            "this template cannot be trained on several turns at once; use single-turn data",
        )
    return tail[len(known) :]


def _answer(whole: str, prompt: str, anchor: str, marks: _Marks, k: int) -> str:
    """The k-th turn behind its generation prompt, as the model would have to write it."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    tail, known = _tail(whole, anchor), _tail(prompt, anchor)
    if tail.startswith(known):
        return tail[len(known) :]
    # The prompt holds more than the finished turn shows (an empty thinking block, say): answer behind the
    # prompt.
    if marks.start(k) not in whole:
        raise UserError("the chat template does not show the assistant's content")
    return "".join(whole.partition(marks.start(k))[1:])


# -- encoding one piece --------------------------------------------------------------------------------------


def _encode(
    parts: list[tuple[str, str]], tok: Tokenizer, answer: bool, goes_on: bool
) -> tuple[list[int], int]:
    """Ids of one piece, and the index of the last one the model itself writes (-1: none).

    Every maximal stretch of plain text between two special tokens is encoded at once, template and content
    together, as any other tool would; the text of a special token inside it stays text.
    """
    ids: list[int] = []
    plain = ""
    last = -1
    control = {**tok.special, **dict([tok.turn_stop] if tok.turn_stop else [])}
    over = next((at for at, (_, kind) in enumerate(parts) if kind == "end"), len(parts))
    stops = any(kind == "special" and control[text] in tok.stop_ids for text, kind in parts[over:])

    def flush() -> None:
        nonlocal plain
        if plain:
            ids.extend(tok.encode_continuation(plain) if goes_on and not ids else tok.encode(plain))
        plain = ""

    for at, (text, kind) in enumerate(parts):
        if kind == "text":
            plain += text
        elif kind == "special":
            flush()
            ids.append(control[text])
            if answer and at > over and last < 0 and ids[-1] in tok.stop_ids:
                last = len(ids) - 1
        elif answer and not stops and last < 0:  # the template ends answers with nothing: we do
            flush()
            stop = tok.end_of_turn if tok.end_of_turn is not None else tok.eos
            ids.extend([] if stop is None else [stop])
            last = len(ids) - 1
    flush()
    return ids, last


def _parts(text: str, marks: _Marks, tok: Tokenizer, answer: bool) -> list[tuple[str, str]]:
    """(text, 'text'), (special token, 'special') and ('', 'end') of a content, in order. A plain token that
    ends answers counts as special there."""
    parts: list[tuple[str, str]] = []
    stop = tok.turn_stop[0] if tok.turn_stop and answer else None
    inside, position = False, 0
    for found in [*marks.pattern.finditer(text), None]:
        stretch = text[position : found.start() if found else len(text)]
        if stop and not inside and parts and parts[-1][1] == "end" and stretch.startswith(stop):
            parts.append((stop, "special"))
            stretch = stretch[len(stop) :]
        parts += [(stretch, "text")] if inside else _trusted(stretch, tok)
        if found:
            inside = found.group(1) == "S"
            position = found.end()
            if not inside:
                parts.append(("", "end"))
    return parts


def _trusted(text: str, tok: Tokenizer) -> list[tuple[str, str]]:
    """The template's own words, special tokens told apart (some swallow the white space beside them)."""
    parts: list[tuple[str, str]] = []
    position, swallow = 0, False
    for found in [*tok.special_pattern.finditer(text), None]:
        stretch = text[position : found.start() if found else len(text)]
        if swallow:
            stretch = stretch.lstrip()
        if found:
            left, swallow = tok.strips[found.group()]
            parts += [(stretch.rstrip() if left else stretch, "text"), (found.group(), "special")]
            position = found.end()
        else:
            parts.append((stretch, "text"))
    return parts

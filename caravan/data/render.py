"""One renderer: messages to token ids and a loss mask, for training, reward, RL, evaluation and serving.

The promise: what is served before an answer is, id for id, what stood before that answer in training. It
holds by construction. A conversation is laid down turn by turn; every answer starts a piece of its own that
is tokenised apart, behind exactly the ids a server would send. No merge can cross that seam.

How a jinja template of unknown shape is cut into turns: each content is wrapped in two private-use marks,
inside its outer white space (templates like to trim). Where the marks come out tells untrusted text from the
template's own, and only the latter may become special tokens.

Tools and calls go to templates that know them (`data/tools.py` writes them into the contents for the
others). What a call holds is marked like a content; an assistant's calls carry loss, results of tools none,
and a turn that is not to be trained on none either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from caravan.data import template
from caravan.data.tokenizer import Tokenizer
from caravan.data.tools import as_text
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
    messages, tools = _known(messages, tok)
    marks = _Marks(messages, tools, tok)
    for text, message, goes_on in _pieces(messages, tools, marks, tok, generation_prompt):
        answer = message is not None
        piece, last = _encode(_parts(text, marks, tok, answer), tok, message, goes_on)
        ids += piece
        learnt = message is not None and message.train
        mask += [learnt and at <= last for at in range(len(piece))]
    return Rendered(ids, mask)


def render_pair(prompt: Sequence[Message], response: str, tok: Tokenizer) -> Rendered:
    """A prompt and one answer, mask on the answer alone, ending at its stop token (where a reward is
    read)."""
    before = render(prompt, tok, generation_prompt=True).ids
    whole = render([*prompt, Message("assistant", response)], tok)
    stop = max(i for i, answered in enumerate(whole.mask) if answered) + 1
    return Rendered(whole.ids[:stop], [False] * len(before) + [True] * (stop - len(before)))


# -- cutting into turns --------------------------------------------------------------------------------------


def _known(messages: Sequence[Message], tok: Tokenizer) -> tuple[Sequence[Message], list[Any] | None]:
    """The messages and tools as the template knows them: what it does not know is written into contents."""
    if not any(m.tool_calls or m.tools for m in messages):
        return messages, None
    knows_tools, knows_calls = template.knows(tok.chat_template)
    tools = [json.loads(tool) for m in messages for tool in m.tools] if knows_tools else None
    texts = as_text(messages, calls=not knows_calls, tools=not knows_tools)
    return [m for m in texts if m.content.strip() or not m.tools], tools or None


_HARMLESS = re.compile(r"[\w .,:;!?'()/@#%&*+=~^$-]*")


class _Marks:
    """A start and an end mark per content, of a private-use character that occurs in none.

    Texts inside tools and calls are marked too, unless no special token can be hidden in them (templates
    compare some, such as the type of a parameter). `k` is the index of the message, for tools their number.
    """

    def __init__(self, messages: Sequence[Message], tools: Sequence[Any] | None, tok: Tokenizer) -> None:
        used = {c for m in messages for c in m.content if c >= "\U000f0000"}
        given = [(c.name, json.loads(c.arguments), c.id) for m in messages for c in m.tool_calls]
        if given or tools:
            used |= set(json.dumps([given, tools], ensure_ascii=False))
        used |= {c for m in messages for c in m.name + m.tool_call_id}
        free = next(chr(c) for c in range(0xF0000, 0xFFFFD) if chr(c) not in used)
        self._free = free
        self._special = tok.special_pattern
        self._count = 0
        self.escaped = json.dumps(free)[1:-1]
        """What some templates make of the character when they write JSON."""
        self.pattern = re.compile(f"{free}([SE])([0-9]+)(?:\\.[0-9]+)?{free}")

    def start(self, k: int) -> str:
        return f"{self._free}S{k}{self._free}"

    def end(self, k: int) -> str:
        return f"{self._free}E{k}{self._free}"

    def last(self, k: int, text: str) -> str:
        """The last end mark of message `k` in a text."""
        ends = [m for m in self.pattern.finditer(text) if m[1] == "E" and m[2] == str(k)]
        return ends[-1].group() if ends else self.end(k)

    def mark(self, k: int, text: str) -> str:
        self._count += 1
        return f"{self._free}S{k}.{self._count}{self._free}{text}{self._free}E{k}.{self._count}{self._free}"

    def tree(self, k: int, value: Any) -> Any:
        """A JSON value with its texts marked where they could hold special tokens."""
        if isinstance(value, dict):
            return {self.tree(k, key): self.tree(k, inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.tree(k, inner) for inner in value]
        if not isinstance(value, str) or (_HARMLESS.fullmatch(value) and not self._special.search(value)):
            return value
        return self.mark(k, value)

    def row(self, k: int, message: Message) -> dict[str, Any]:
        """A message as templates take it."""
        content = self.wrap(k, message.content) if message.content.strip() or not message.tool_calls else ""
        row: dict[str, Any] = {"role": message.role, "content": content}
        if message.tool_calls:  # the name is always marked: the end of the answer is behind it
            row["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": self.tree(k, call.id)} if call.id else {}),
                    "function": {
                        "name": self.mark(k, call.name),
                        "arguments": self.tree(k, json.loads(call.arguments)),
                    },
                }
                for call in message.tool_calls
            ]
        more = {"name": message.name, "tool_call_id": message.tool_call_id}
        return row | {key: self.tree(k, text) for key, text in more.items() if text}

    def wrap(self, k: int, content: str) -> str:
        core = content.strip()
        left = len(content) - len(content.lstrip())
        return content[:left] + self.start(k) + core + self.end(k) + content[left + len(core) :]


def _pieces(
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    marks: _Marks,
    tok: Tokenizer,
    generation_prompt: bool,
) -> Iterator[tuple[str, Message | None, bool]]:
    """(marked text, the answer it is or None, follows other text) per piece: prompt, answer, prompt, …"""
    for message in messages:
        if message.role not in ROLES:
            raise UserError(
                f"unknown role {message.role!r} in a conversation", f"roles are {', '.join(ROLES)}"
            )
    wrapped = [marks.row(k, m) for k, m in enumerate(messages)]
    marked = marks.tree(len(messages), tools) if tools else None

    def filled(count: int, prompt: bool) -> str:
        text = template.fill(tok.chat_template, wrapped[:count], prompt, tok.token_texts, marked)
        return text.replace(marks.escaped, marks.start(0)[0]) if marks.escaped in text else text

    answers = [k for k, message in enumerate(messages) if message.role == "assistant"]
    prompts = [(k, filled(k, True)) for k in answers]
    if generation_prompt or not messages or messages[-1].role != "assistant":
        prompts.append((len(messages), filled(len(messages), generation_prompt)))
    done, anchor = "", ""
    for turn, (k, prompt) in enumerate(prompts):
        yield _after(prompt, done, anchor), None, bool(done)
        if k < len(messages):
            whole = filled(k + 1, False)
            following = prompts[turn + 1][1] if turn + 1 < len(prompts) else whole
            end = marks.last(k, whole)
            whole = _kept(whole, following, end)
            yield _answer(whole, prompt, anchor, marks, k), messages[k], True
            done, anchor = whole, end


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
    parts: list[tuple[str, str]], tok: Tokenizer, message: Message | None, goes_on: bool
) -> tuple[list[int], int]:
    """Ids of one piece, and the index of the last one the model itself writes (-1: none).

    Every maximal stretch of plain text between two special tokens is encoded at once, template and content
    together, as any other tool would; the text of a special token inside it stays text.
    """
    ids: list[int] = []
    answer = message is not None
    plain = ""
    last = -1
    control = {**tok.special, **dict([tok.turn_stop] if tok.turn_stop else [])}
    over = max((at for at, (_, kind) in enumerate(parts) if kind == "end"), default=len(parts))
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
        elif answer and at == over and not stops and last < 0:  # the template ends answers with nothing
            if message is not None and message.tool_calls:  # and more of the call may follow
                raise UserError(
                    "the chat template ends tool calls with no token to stop at",
                    "choose another one (`caravan template --template chatml` writes calls as text)",
                )
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

"""Tool calls in what a model writes: how its chat template spells them, and how they are read back.

A template is shown one call; what it makes of it says which marks stand around a call and which names its
JSON has. Templates that know no calls get them as text from `data/tools.py`, and so they are spelt as there.
Marks that are special tokens never come out as text: such a template's calls are answers that are JSON and
nothing else (Llama 3.1's objects, Mistral's list).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from caravan.data import template
from caravan.data.tokenizer import Tokenizer
from caravan.data.tools import CLOSE, OPEN
from caravan.types import ToolCall, UserError

_DECODER = json.JSONDecoder()
_QUESTION = "\uf8f0"
_NAME, _ARGUMENTS = "probe_tool", {"probe_key": "probe value"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}},
    },
}


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a template writes a call: marks around a JSON object, and the names in it."""

    open: str = OPEN
    """Before each object; empty: an answer is calls and nothing else."""
    close: str = CLOSE
    name: str = "name"
    arguments: str = "arguments"


def spelling(tok: Tokenizer) -> Spelling | None:
    """How the tokenizer's chat template writes calls; None where it is no JSON object with name and arguments
    (DeepSeek's, Pythonic ones), which nobody could read back."""
    if not template.knows(tok.chat_template)[1]:
        return Spelling()
    asked: list[dict[str, Any]] = [{"role": "user", "content": _QUESTION}]
    call = {"id": "probe0001", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        prompt = template.fill(tok.chat_template, asked, True, tok.token_texts, [_TOOL])
        text = template.fill(tok.chat_template, [*asked, answer], False, tok.token_texts, [_TOOL])
    except UserError:
        return None
    return _spelt(text.removeprefix(prompt).rpartition(_QUESTION)[2], tok)


def _spelt(text: str, tok: Tokenizer) -> Spelling | None:
    """The marks and names of the one call in a text: the words next to its object, special tokens aside."""
    at = text.find(_NAME)
    while (at := text.rfind("{", 0, max(at, 0))) >= 0:
        try:
            found, end = _DECODER.raw_decode(text, at)
        except ValueError:
            continue
        name = next((k for k, v in found.items() if v == _NAME), None)
        given = (_ARGUMENTS, json.dumps(_ARGUMENTS))
        arguments = next((k for k, v in found.items() if v in given), None)
        if name and arguments:
            before = tok.special_pattern.split(text[:at])[-1].split()[-1:]
            behind = tok.special_pattern.split(text[end:])[0].split()[:1]
            if before in ([], ["["]):
                return Spelling("", "", name, arguments)
            return Spelling(before[0], "".join(behind), name, arguments)
    return None


class Reader:
    """Tells calls from words while an answer comes in. What may still become a call is held back."""

    def __init__(self, spelt: Spelling, names: Collection[str]) -> None:
        """`names`: the tools there are; a call of any other stays text."""
        self._spelt, self._names = spelt, frozenset(names)
        self._held = ""
        self._words = self._called = False
        """Where calls stand alone: the answer has begun with something else. A call has been read."""

    def feed(self, text: str, last: bool = False) -> list[str | ToolCall]:
        """Words and calls (without ids) that `text` completes, in order; with `last`, all that is left. White
        space around calls is theirs."""
        self._held += text
        found = self._between_marks(last) if self._spelt.open else self._alone(last)
        return [part for part in found if part]

    def _between_marks(self, last: bool) -> Iterator[str | ToolCall]:
        opening, closing = self._spelt.open, self._spelt.close
        while self._held:
            if self._called:
                self._held = self._held.lstrip()
            at = self._held.find(opening)
            if at < 0:
                yield self._let_go(last)
                return
            before, self._held = self._held[:at], self._held[at:]
            call, end = self._first(len(opening))
            behind = self._held[max(end, 0) :].lstrip()
            unclear = end < 0 or (len(behind) < len(closing) and closing.startswith(behind))
            if unclear and not last:
                yield before.rstrip()
                self._held = before[len(before.rstrip()) :] + self._held
                return
            if call:
                yield before.rstrip()
                yield call
                self._called = True
                self._held = behind.removeprefix(closing)
            else:  # no JSON, or a tool that is not there: the mark is a word like any other
                yield before + opening
                self._held = self._held[len(opening) :]

    def _let_go(self, last: bool) -> str:
        """The words that are held, but for an end that may belong to a call."""
        rest = len(self._held) if last else len(self._held) - _overlap(self._held, self._spelt.open)
        cut = rest if last else len(self._held[:rest].rstrip())
        gone, self._held = self._held[:cut], self._held[cut:]
        return gone

    def _first(self, start: int) -> tuple[ToolCall | None, int]:
        """The call in the JSON behind a mark, and where that ends; -1 while there is no whole object."""
        body = self._held[start:]
        skipped = len(body) - len(body.lstrip())
        try:
            value, end = _DECODER.raw_decode(body, skipped)
        except (ValueError, RecursionError):
            return None, -1
        return self._call(value), start + end

    def _alone(self, last: bool) -> Iterator[str | ToolCall]:
        begun = self._held.lstrip()
        self._words = self._words or bool(begun and begun[0] not in "{[")
        if self._words or last:
            calls = None if self._words else self._all(begun)
            yield from calls or [self._held]
            self._held = ""

    def _all(self, text: str) -> list[str | ToolCall] | None:
        """A text that is calls and nothing else: objects, in a list or one behind another."""
        values: list[Any] = []
        while text:
            try:
                value, end = _DECODER.raw_decode(text)
            except (ValueError, RecursionError):
                return None
            values += value if isinstance(value, list) else [value]
            text = text[end:].lstrip(" \t\r\n;,")
        calls = [self._call(value) for value in values]
        return [call for call in calls if call] if all(calls) else None

    def _call(self, value: Any) -> ToolCall | None:
        name = value.get(self._spelt.name) if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        given = value.get(self._spelt.arguments, {})
        if isinstance(given, str):
            try:
                given = json.loads(given or "{}")
            except (ValueError, RecursionError):
                return None
        if not isinstance(given, dict):
            return None
        return ToolCall(name, json.dumps(given, ensure_ascii=False))


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    sizes = range(min(len(text), len(mark) - 1), 0, -1)
    return next((n for n in sizes if text.endswith(mark[:n])), 0)

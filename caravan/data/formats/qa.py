"""Question and answer by their Chinese, English or short names: {问题, 答案}, {question, answer}, {q, a}, …

COIG's and many other Chinese collections; `title` and `desc` (community question answering) make one
question.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from caravan.data.formats._files import Bad, id_of, reader, source_of
from caravan.data.formats._turns import with_system
from caravan.types import Conversation, Message

KINDS = ("conversations",)
PAIRS = (
    ("问题", "答案"), ("问题", "回答"), ("问", "答"), ("提问", "回答"), ("指令", "输出"), ("指令", "回答"),
    ("输入", "输出"), ("question", "answer"), ("question", "response"), ("query", "response"),
    ("query", "answer"), ("Question", "Answer"), ("q", "a"), ("Q", "A"), ("ask", "answer"),
    ("title", "answer"), ("textbox_question", "textbox_answer"),
)  # fmt: skip


def _keys(row: dict[str, Any]) -> tuple[str, str] | None:
    return next((k for k in PAIRS if all(isinstance(row.get(name), str) for name in k)), None)


def detect(sample: dict[str, Any] | bytes, path: Path) -> str | None:
    if not isinstance(sample, dict) or sample.keys() & {"instruction", "prompt", "chosen", "messages"}:
        return None
    keys = _keys(sample)
    return keys and f"records hold {keys[0]!r} and {keys[1]!r}"


def convert(row: dict[str, Any], kind: str) -> Iterator[Conversation]:
    keys = _keys(row)
    if keys is None:
        raise Bad("a question and an answer, both text, such as 'question' and 'answer' or '问题' and '答案'")
    question = row[keys[0]]
    more = row.get("desc" if keys[0] == "title" else "输入" if keys[0] == "指令" else "input")
    if isinstance(more, str) and more.strip():
        question = f"{question}\n{more}"
    turns = (Message("user", question), Message("assistant", row[keys[1]]))
    yield Conversation(with_system(row, turns), id_of(row), source_of(row))


read = reader(convert)

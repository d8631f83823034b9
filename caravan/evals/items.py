"""What every task works with: one question, one answer, one score.

A task is one file in `tasks/`. Its KIND says what it needs of the runner, and with that the shape of `score`:

    generate   load(rows), prompt(item) -> messages, score(item, text) -> {metric: 0..1}; CHECKED: only 0 or 1
    choices    load(rows), prompt(item) -> Choices, score(item, log-likelihood per choice) -> {metric: 0 or 1}
    text       load(shards, tokenizer) -> documents, score(document, nats) -> (bits, bytes)
    reward     score(reward of the answer) -> number                 both on answers sampled by the model
    compare    score(log-probs of the model, of the reference, exact KL per token) -> {metric: number}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caravan.types import Message, UserError


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `answer` is what is looked for, `reference` a whole good answer, `choices` what to
    choose from."""

    id: str
    messages: tuple[Message, ...]
    answer: str = ""
    reference: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()
    gold: int = -1
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What one item gave to one metric: `score / weight` is its value, sums over items that of the metric."""

    task: str
    id: str
    score: float
    weight: float = 1.0
    binary: bool = False
    """Right or wrong: the metric is an accuracy, its interval Wilson's."""
    kind: str = ""
    """Kind of question; every kind is reported apart too."""


def metrics_of(task: str, kind: str) -> tuple[str, ...]:
    """The metrics a result counts for: its task's, and `task.kind` unless that would say the same twice."""
    return (task,) if not kind or kind == task.split(".")[0] else (task, f"{task}.{kind}")


def item_of(row: Mapping[str, Any], at: str) -> Item:
    """An item of a row with `question` (or `messages`) and `answer`, or `choices` and the index or letter
    of one.

    Raises UserError, naming `at` (file and line), for anything else.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{at}: expected an object, found {type(row).__name__}")
    if "messages" in row:
        messages = _messages(row["messages"], at)
    elif isinstance(row.get("question"), str) and row["question"].strip():
        messages = (Message("user", row["question"]),)
    elif isinstance(row.get("context"), str) and row.get("choices"):
        messages = (Message("user", row["context"]),)
    else:
        raise UserError(f"{at}: a question needs `question` (text), `messages`, or `context` with `choices`")
    choices = row.get("choices") or ()
    if not isinstance(choices, list | tuple) or not all(isinstance(c, str) for c in choices):
        raise UserError(f"{at}: `choices` must be a list of texts")
    answer = row.get("answer", "")
    gold = _gold(answer, len(choices), at) if choices else -1
    if not choices and not str(answer).strip():
        raise UserError(f"{at}: `answer` is missing or empty")
    text = choices[gold] if choices else str(answer)
    reference = str(row.get("reference") or text)
    kind = str(row.get("kind", ""))
    return Item(str(row.get("id", at)), messages, text, reference, kind, tuple(choices), gold, row)


def _messages(found: Any, at: str) -> tuple[Message, ...]:
    try:
        messages = tuple(Message(str(m["role"]), str(m["content"])) for m in found)
    except (TypeError, KeyError) as error:
        raise UserError(f"{at}: `messages` must be a list of objects with role and content") from error
    if not messages or messages[-1].role == "assistant":
        raise UserError(f"{at}: `messages` must end with a turn of the user")
    return messages


def _gold(answer: Any, count: int, at: str) -> int:
    if isinstance(answer, str) and len(answer) == 1 and answer.upper().isalpha():
        answer = ord(answer.upper()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < count:
        raise UserError(f"{at}: `answer` must be the index (from 0) or the letter of one of {count} choices")
    return answer


def read_questions(folder: Path, strict: bool = False) -> tuple[list[Item], list[dict[str, Any]]]:
    """Items of the `eval*.jsonl` files of a folder (of all its .jsonl files if there are none), and what
    was refused.

    A file instead of a folder is read as it is. Refused rows name file, line and reason; `strict` raises at
    the first, and an evaluation without a single question is an error in any case.
    """
    items: list[Item] = []
    refused: list[dict[str, Any]] = []
    seen: set[str] = set()
    for path in question_files(folder):
        for number, line in _lines(path):
            at = f"{path.name}:{number}"
            try:
                item = item_of(_parse(line, at), at)
                if item.id in seen:
                    raise UserError(f"{at}: the id {item.id!r} occurs twice")
            except UserError as error:
                if strict:
                    raise
                refused.append({"file": path.name, "line": number, "reason": str(error), "text": line[:200]})
                continue
            seen.add(item.id)
            items.append(item)
    if not items:
        raise UserError(
            f"no question in {folder}",
            'one JSON object per line: {"question": "2+2=?", "answer": "4", "kind": "arithmetic"}',
        )
    return items, refused


def question_files(folder: Path) -> list[Path]:
    """The files that hold questions, sorted by name."""
    if folder.is_file():
        return [folder]
    found = sorted(folder.rglob("*.jsonl"))
    return [p for p in found if p.name.startswith("eval")] or found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.strip()


def _parse(line: str, at: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{at}: not JSON ({error})") from error

"""Our own files: documents, conversations and rankings, one JSON object per line; quarantine; and the split.

`Spool` decides the held-out part when everything has been seen: by a hash of the key (a text, a prompt), so
that the same prompt never lies on both sides, adding data moves nothing, and order does not matter.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard

from caravan.data.clean import Rejection
from caravan.data.columns import Column
from caravan.data.formats import Problem, called
from caravan.data.tools import as_text
from caravan.types import Conversation, Document, Labelled, Message, Ranking, ToolCall, UserError

SPLITS = ("train", "heldout")


def dump(value: Document | Conversation | Ranking | Labelled) -> bytes:
    """One line of JSON; messages as `row_of` gives them."""
    return orjson.dumps(value, _rows, orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATACLASS)


def row_of(message: Message) -> dict[str, Any]:
    """A message as other programs write it: role and content, and what belongs to tools where there is
    any."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        row["tool_calls"] = [
            {
                "type": "function",
                **({"id": call.id} if call.id else {}),
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    for key in ("name", "tool_call_id"):
        if given := getattr(message, key):
            row[key] = given
    if message.tools:
        row["tools"] = [orjson.loads(tool) for tool in message.tools]
    if not message.train:
        row["weight"] = 0
    return row


def _rows(value: Any) -> dict[str, Any]:
    if isinstance(value, Message):
        return row_of(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}


def dump_removed(document: Document, verdict: Rejection) -> bytes:
    """One line about a document that was removed: which rule did it, why, how large it was, and how the
    text begins."""
    row = {
        "id": document.id,
        "source": document.source,
        "rule": verdict.rule,
        "reason": verdict.reason,
        "bytes": len(document.text.encode("utf-8", "replace")),
        "text": document.text[:500],
        **({"kept": verdict.kept} if verdict.kept else {}),
    }
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


@contextmanager
def packed_writer(path: Path) -> Iterator[io.BufferedIOBase]:
    """A .zst file to write bytes into; the same bytes in give the same bytes out."""
    with open(path, "wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as packed:
        yield packed  # type: ignore[misc]


def read_lines(path: Path) -> Iterator[Any]:
    """Every line of one of our .jsonl or .jsonl.zst files, parsed. Raises UserError if it is damaged."""
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".zst":
                stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                for line in io.BufferedReader(stream, 1 << 20):  # type: ignore[arg-type]
                    yield orjson.loads(line)
            else:
                yield from map(orjson.loads, raw)
    except (OSError, orjson.JSONDecodeError, zstandard.ZstdError) as error:
        raise UserError(
            f"cannot read {path}: {error}", "`caravan verify` tells whether the artefact is whole"
        ) from error


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a corpus file (`train.jsonl.zst`)."""
    return (Document(**row) for row in read_lines(path))


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Conversations of `train.jsonl` or `heldout.jsonl`."""
    return map(conversation_of, read_lines(path))


def read_rankings(path: Path) -> Iterator[Ranking]:
    """Rankings of `train.jsonl` or `heldout.jsonl`."""
    return map(ranking_of, read_lines(path))


def read_labelled(path: Path) -> Iterator[Labelled]:
    """Labelled answers of `train.labels.jsonl` or `heldout.labels.jsonl`."""
    return map(labelled_of, read_lines(path))


def conversation_of(row: dict[str, Any]) -> Conversation:
    """A conversation from what `dump` makes of it."""
    return Conversation(messages_of(row["messages"]), row["id"], row["source"])


def ranking_of(row: dict[str, Any]) -> Ranking:
    """A ranking from what `dump` makes of it."""
    prompt, order = messages_of(row["prompt"]), tuple(row["ranks"])
    return Ranking(prompt, tuple(row["responses"]), order, row["id"], row["source"])


def labelled_of(row: dict[str, Any]) -> Labelled:
    """A labelled answer from what `dump` makes of it."""
    return Labelled(messages_of(row["prompt"]), row["response"], row["good"], row["id"], row["source"])


def messages_of(rows: list[dict[str, Any]]) -> tuple[Message, ...]:
    """Messages from what `row_of` makes of them."""
    return tuple(
        Message(m["role"], m["content"]) if len(m) == 2 else _with_tools(m["role"], m["content"], m)
        for m in rows
    )


def _with_tools(role: str, content: str, row: dict[str, Any]) -> Message:
    calls = tuple(
        ToolCall(c["function"]["name"], c["function"]["arguments"], c.get("id", ""))
        for c in row.get("tool_calls", ())
    )
    tools = tuple(orjson.dumps(tool).decode() for tool in row.get("tools", ()))
    name, call = row.get("name", ""), row.get("tool_call_id", "")
    return Message(role, content, calls, name, call, tools, row.get("weight") != 0)


def words_of(messages: Iterable[Message]) -> Iterator[str]:
    """What makes messages equal: roles and contents, and what belongs to tools where there is any."""
    for message in messages:
        yield from (message.role, message.content)
        row = row_of(message)
        if len(row) > 2:
            yield orjson.dumps(row).decode()


def digest_of(*texts: str) -> str:
    """32 hex digits of texts, told apart by their lengths."""
    h = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


def share_of(digest: str) -> float:
    """A number in [0, 1) of a digest: below the held-out share means held out."""
    return int(hashlib.blake2b(b"split" + digest.encode(), digest_size=8).hexdigest(), 16) / 2**64


class Quarantine:
    """Writes what could not be read to quarantine.jsonl; with `strict`, stops at the first."""

    def __init__(self, path: Path, root: Path, strict: bool) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by facts())
        self._root, self._strict = root, strict
        self.count = 0
        self._first: list[str] = []

    def __call__(self, problem: Problem) -> None:
        path = problem.path
        name = called(path.relative_to(self._root) if path != self._root else Path(path.name))
        where = f"{name}, {problem.place}" if problem.place else name
        if self._strict:
            raise UserError(
                f"{where}: expected {problem.expected}", "without --strict it goes to quarantine.jsonl"
            )
        row = {"file": name, "place": problem.place, "expected": problem.expected, "sample": problem.sample}
        self._file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        self.count += 1
        if len(self._first) < 5:
            self._first.append(f"{where}: expected {problem.expected}")

    def facts(self) -> dict[str, Any]:
        """Close the file; the count, and the first few."""
        self._file.close()
        return {"quarantined": self.count, "quarantined_first": self._first}


class Spool:
    """Lines kept on disk until the split can be decided; so are their keys (9 bytes a line)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shares, self._forced = Column(path.parent, np.float64), Column(path.parent, np.uint8)
        self._file = open(path, "wb")  # noqa: SIM115  (closed by split())

    def add(self, line: bytes, key: str, forced: str = "") -> None:
        """A line of JSON, the digest that decides its split, and the split it asks for itself, if any."""
        self._file.write(line)
        self._shares.add([share_of(key)])
        self._forced.add([("", *SPLITS).index(forced)])

    def __len__(self) -> int:
        return len(self._shares)

    def split(self, heldout_share: float, without: Column | None = None) -> Iterator[tuple[str, bytes]]:
        """(split, line) in the order of arrival. With a share above 0 and two keys or more, neither side is
        empty. Lines marked in `without` come too, but decide nothing."""
        self._file.close()
        limit = self._limit(heldout_share, without) if heldout_share > 0 else heldout_share
        with open(self.path, "rb") as file:
            for at, shares in self._shares.chunks():
                forced = self._forced[at : at + len(shares)].tolist()
                # The file comes last: nothing may be read from it once the chunk is over.
                for share, asked, line in zip(shares.tolist(), forced, file, strict=False):
                    yield SPLITS[asked - 1] if asked else "heldout" if share < limit else "train", line
        self._shares.close()
        self._forced.close()
        self.path.unlink()

    def _limit(self, heldout_share: float, without: Column | None) -> float:
        """Keys below this are held out: the share, or just above the least key if it would hold out none."""
        least = np.zeros(0)
        for at, shares in self._shares.chunks():
            forced = self._forced[at : at + len(shares)]
            if without is not None:
                there = without[at : at + len(shares)] == 0
                shares, forced = shares[there], forced[there]
            if (forced == 1 + SPLITS.index("heldout")).any():
                return heldout_share
            least = np.unique(np.concatenate([least, shares[forced == 0]]))[:2]
        return float(least.mean()) if len(least) > 1 and least[0] >= heldout_share else heldout_share


def write_splits(out: Path, spool: Spool, heldout_share: float, suffix: str = ".jsonl") -> dict[str, int]:
    """train.jsonl and heldout.jsonl in `out` (or with another suffix); how many lines each."""
    counts = dict.fromkeys(SPLITS, 0)
    with open(out / f"train{suffix}", "wb") as train, open(out / f"heldout{suffix}", "wb") as heldout:
        for name, line in spool.split(heldout_share):
            (train if name == "train" else heldout).write(line)
            counts[name] += 1
    return counts


def texts_of(conversations: Iterable[Conversation]) -> Iterator[str]:
    """The content of every turn, tools and calls written out."""
    for conversation in conversations:
        yield from (m.content for m in as_text(conversation.messages))

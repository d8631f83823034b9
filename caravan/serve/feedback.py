"""What people thought of the answers: the store behind the thumbs, and how it becomes preferences.

Nothing is written until somebody votes: recent answers live in memory (`remember`), and a vote copies the
answer it is about (prompt, text, model, weights) into the database. The client sends only names of answers,
so it cannot put words into a model's mouth.

Training needs comparisons, and a lone thumb is none. So a prompt gives a `Ranking` only when it has
- an answer voted up and another voted down: every up before every down, one Ranking of K >= 2 responses; or
- two answers between which somebody chose after "regenerate": a Ranking of 2.
An explicit choice outweighs thumbs that contradict it; the later of two contradicting choices counts. Votes
without a counterpart are counted and said, never used.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Float, ForeignKey, Integer, String, Text, create_engine, event, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool

from caravan.data.records import messages_of, row_of
from caravan.types import Message, Ranking, UserError

REMEMBERED_ANSWERS = 4096
"""Answers kept in memory so that they can be voted on."""


class _Base(DeclarativeBase):
    pass


class AnswerRow(_Base):
    """One answer somebody had an opinion on, with what it answered and who gave it."""

    __tablename__ = "answers"
    id: Mapped[str] = mapped_column(String(96), primary_key=True)
    prompt_key: Mapped[str] = mapped_column(String(64), index=True)
    prompt: Mapped[str] = mapped_column(Text)
    text: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(String(255))
    weights: Mapped[str] = mapped_column(String(96))
    finish_reason: Mapped[str] = mapped_column(String(16))
    created: Mapped[float] = mapped_column(Float)


class VoteRow(_Base):
    """One thumb: +1, -1, or 0 for taken back. The latest of an answer counts."""

    __tablename__ = "votes"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    answer_id: Mapped[str] = mapped_column(ForeignKey("answers.id"), index=True)
    vote: Mapped[int] = mapped_column(Integer)
    created: Mapped[float] = mapped_column(Float)


class ChoiceRow(_Base):
    """Of an answer and its regeneration, the one preferred; `tie` when neither was."""

    __tablename__ = "choices"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    chosen_id: Mapped[str] = mapped_column(ForeignKey("answers.id"))
    rejected_id: Mapped[str] = mapped_column(ForeignKey("answers.id"))
    tie: Mapped[int] = mapped_column(Integer, default=0)
    created: Mapped[float] = mapped_column(Float)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer as the server gave it."""

    id: str
    prompt: tuple[Message, ...]
    text: str
    model: str
    weights: str
    finish_reason: str = "stop"
    created: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Collected:
    """Rankings made from the feedback, and how much of it they use."""

    rankings: list[Ranking]
    counts: dict[str, int]


class UnknownAnswer(Exception):
    """No such answer: mistyped, or given before the server was last started."""


def prompt_key(prompt: tuple[Message, ...]) -> str:
    """One name per prompt: sha256 of roles and texts, and of what belongs to tools where there is any."""
    rows = [
        [m.role, m.content] if m == Message(m.role, m.content) else list(row_of(m).items()) for m in prompt
    ]
    text = json.dumps(rows, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class FeedbackStore:
    """Votes and choices in any database SQLAlchemy knows. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        """`url`: an SQLAlchemy URL, `sqlite://` for memory. UserError when it cannot be opened."""
        try:
            memory = url in ("sqlite://", "sqlite:///:memory:")
            options: dict[str, Any] = (
                {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}} if memory else {}
            )
            self._engine = create_engine(url, **options)
            if url.startswith("sqlite"):
                event.listen(self._engine, "connect", _sqlite_pragmas)
            _Base.metadata.create_all(self._engine)
        except (ArgumentError, SQLAlchemyError, ImportError) as problem:
            raise UserError(
                f"the feedback database cannot be opened: {type(problem).__name__}",
                "give an SQLAlchemy URL such as sqlite:///feedback.db, and see that the folder is writable",
            ) from problem
        self._recent: OrderedDict[str, Answer] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def remember(self, answer: Answer) -> None:
        """Keep an answer in memory, so that it can be voted on."""
        with self._lock:
            self._recent[answer.id] = answer
            while len(self._recent) > REMEMBERED_ANSWERS:
                self._recent.popitem(last=False)

    def vote(self, answer_id: str, vote: int) -> None:
        """Record a thumb: +1, -1 or 0. Raises UnknownAnswer."""
        assert vote in (-1, 0, 1)
        with Session(self._engine) as session, session.begin():
            self._keep(session, answer_id)
            session.add(VoteRow(answer_id=answer_id, vote=vote, created=time.time()))

    def choose(self, chosen_id: str, rejected_id: str, tie: bool = False) -> None:
        """Record which of two answers to the same prompt was better. Raises UnknownAnswer, ValueError."""
        if chosen_id == rejected_id:
            raise ValueError("an answer cannot be preferred to itself")
        with Session(self._engine) as session, session.begin():
            chosen, rejected = self._keep(session, chosen_id), self._keep(session, rejected_id)
            if chosen.prompt_key != rejected.prompt_key:
                raise ValueError("the two answers are to different prompts")
            session.add(
                ChoiceRow(chosen_id=chosen_id, rejected_id=rejected_id, tie=int(tie), created=time.time())
            )

    def _keep(self, session: Session, answer_id: str) -> AnswerRow:
        """The answer's row, written now if it is only in memory."""
        row = session.get(AnswerRow, answer_id)
        if row is not None:
            return row
        with self._lock:
            answer = self._recent.get(answer_id)
        if answer is None:
            raise UnknownAnswer(f"no answer {answer_id!r} is known")
        row = AnswerRow(
            id=answer.id,
            prompt_key=prompt_key(answer.prompt),
            prompt=json.dumps([row_of(m) for m in answer.prompt], ensure_ascii=False),
            text=answer.text,
            model=answer.model,
            weights=answer.weights,
            finish_reason=answer.finish_reason,
            created=answer.created,
        )
        session.add(row)
        session.flush()
        return row

    def collect(self) -> Collected:
        """All feedback as rankings, in the order of the first answer to each prompt."""
        with Session(self._engine) as session:
            answers = list(session.scalars(select(AnswerRow).order_by(AnswerRow.created, AnswerRow.id)))
            votes = {
                row.answer_id: row.vote for row in session.scalars(select(VoteRow).order_by(VoteRow.number))
            }
            choices = list(session.scalars(select(ChoiceRow).order_by(ChoiceRow.number)))
        counts = {
            "answers": len(answers),
            "votes": sum(1 for vote in votes.values() if vote),
            "choices": len(choices),
            "ties": 0,
            "votes_without_counterpart": 0,
            "same_text_both_ways": 0,
        }
        by_prompt: dict[str, list[AnswerRow]] = {}
        for row in answers:
            by_prompt.setdefault(row.prompt_key, []).append(row)
        rankings: list[Ranking] = []
        for group in by_prompt.values():
            rankings += _rankings(group, votes, choices, counts)
        counts["rankings"] = len(rankings)
        counts["pairs"] = sum(1 for ranking in rankings for _ in ranking.pairs())
        return Collected(rankings, counts)


def _rankings(
    group: list[AnswerRow], votes: dict[str, int], choices: list[ChoiceRow], counts: dict[str, int]
) -> Iterator[Ranking]:
    """Rankings of one prompt: its explicit choices, then thumbs up against thumbs down."""
    texts = {row.id: row.text for row in group}
    better: dict[frozenset[str], tuple[str, str]] = {}
    for choice in choices:
        if choice.chosen_id not in texts:
            continue
        pair = (texts[choice.chosen_id], texts[choice.rejected_id])
        if choice.tie or pair[0] == pair[1]:
            counts["ties"] += 1
            better.pop(frozenset(pair), None)
        else:
            better[frozenset(pair)] = pair
    disputed = set().union(*better) if better else set()
    up, down = _sides(group, votes, counts)
    # A choice speaks about exactly these texts, so thumbs that contradict it step back, and those that only
    # repeat it would count it twice.
    spoken = {text for text in disputed if text in up or text in down}
    contradicted = {
        text
        for winner, loser in better.values()
        if winner in down and loser in up
        for text in (winner, loser)
    }
    repeated = len(up) + len(down) == 2 and spoken == set(up) | set(down)
    up = [text for text in up if text not in contradicted]
    down = [text for text in down if text not in contradicted]
    prompt = messages_of(json.loads(group[0].prompt))
    source = "feedback:" + "+".join(sorted({f"{row.model}@{row.weights[:12]}" for row in group}))
    key = group[0].prompt_key[:16]
    for number, pair in enumerate(better.values()):
        yield Ranking(prompt, pair, (0, 1), f"choice-{key}-{number}", source)
    if up and down and not repeated:
        ranks = (0,) * len(up) + (1,) * len(down)
        yield Ranking(prompt, (*up, *down), ranks, f"votes-{key}", source)
    elif not repeated:
        counts["votes_without_counterpart"] += sum(1 for text in (*up, *down) if text not in spoken)


def _sides(
    group: list[AnswerRow], votes: dict[str, int], counts: dict[str, int]
) -> tuple[list[str], list[str]]:
    """Distinct texts voted up and down; a text with votes both ways says nothing and is counted."""
    up = dict.fromkeys(row.text for row in group if votes.get(row.id, 0) > 0)
    down = dict.fromkeys(row.text for row in group if votes.get(row.id, 0) < 0)
    both = set(up) & set(down)
    counts["same_text_both_ways"] += len(both)
    return [text for text in up if text not in both], [text for text in down if text not in both]


def _sqlite_pragmas(connection: Any, _record: Any) -> None:
    """Readers do not block the writer, and two servers on one file wait for each other instead of failing."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA busy_timeout=5000")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()

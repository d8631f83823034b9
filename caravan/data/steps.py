"""Documents in batches through named, pure steps: in one process or in several, with the same answers in
order.

A step looks at a batch and says of each document whether it must go, and why. It may put a new text or what
it found out into the item, nothing else: what it says depends on the documents alone, so that the number of
processes, or another engine, changes nothing. What needs all documents at once (duplicates) comes after, in
one place and in the order of arrival.

    class TooShort:
        name = "length"
        def __call__(self, items: Sequence[Item]) -> list[Rejection | None]: ...

    for outcome in mapped(Steps((Clean(), TooShort())), batches(items), workers=8): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from caravan.data.clean import Rejection
from caravan.data.pool import mapped, workers
from caravan.types import Document

__all__ = ["Item", "Step", "Steps", "batches", "item_batches", "mapped", "workers"]

A = TypeVar("A")


@dataclass(slots=True)
class Item:
    """A document on its way, with the split its record asks for and what steps found out about it."""

    document: Document
    split: str = ""
    found: dict[str, Any] = field(default_factory=dict)


class Step(Protocol):
    """Something that looks at a batch. A step must survive being sent to another process."""

    name: str

    def __call__(self, items: Sequence[Item]) -> Sequence[Rejection | None]: ...


@dataclass(frozen=True)
class Steps:
    """Steps one after another: batch -> (item, why it goes or None), in the order of the batch."""

    steps: tuple[Step, ...]

    def __call__(self, items: Sequence[Item]) -> list[tuple[Item, Rejection | None]]:
        verdicts: list[Rejection | None] = [None] * len(items)
        left = list(range(len(items)))
        for step in self.steps:
            found = step([items[i] for i in left])
            assert len(found) == len(left), f"{step.name} must say something about every document"
            for i, verdict in zip(left, found, strict=True):
                verdicts[i] = verdict
            left = [i for i in left if verdicts[i] is None]
        return list(zip(items, verdicts, strict=True))


def batches(items: Iterable[A], size: Callable[[A], int], most: int = 1 << 20) -> Iterator[list[A]]:
    """Lists of items whose sizes add up to about `most`; what is in a list depends on the items alone."""
    batch: list[A] = []
    used = 0
    for item in items:
        batch.append(item)
        used += size(item) + 64  # an empty text costs something too
        if used >= most:
            yield batch
            batch, used = [], 0
    if batch:
        yield batch


def item_batches(items: Iterable[Item], most: int = 1 << 20) -> Iterator[list[Item]]:
    """Batches of about a million characters."""
    return batches(items, lambda item: len(item.document.text), most)

"""How many questions of a benchmark stand in the text a model was trained on.

Compared as `caravan decontaminate` does (caravan/data/decontaminate.py): a question is *seen* if any 13 of
its words in a row are in the training text (GPT-3, appendix C of arXiv 2005.14165); a shorter question must
be there as a whole, and one of fewer than 4 words says nothing and is left out. An answer is counted the same
way. Seeing the answer is what teaching means; seeing the question with it is memorising, and the accuracy
then measures that."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from caravan.data.decontaminate import Index
from caravan.evals.items import Item

FEWEST = 4
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Seen:
    """Ids of the items found, and how many were long enough to look for."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    both: tuple[str, ...]
    """Question and answer in one text: what a model can have learned by heart."""
    checked: int
    texts: int


def contamination(items: Sequence[Item], texts: Iterable[str]) -> Seen:
    """Look for every item in every text; one pass over the texts, memory in proportion to the items."""
    index = Index(fewest=FEWEST)
    checked = 0
    for item in items:
        checked += index.add(item.row.get("context") or item.messages[-1].content)
        index.add(item.reference)
    hits: tuple[set[int], set[int], set[int]] = (set(), set(), set())
    count, left = 0, iter(texts)
    while batch := list(itertools.islice(left, _BATCH)):
        count += len(batch)
        for found in index.search(batch):
            owners = {owner for hit in found for owner in index.owners(hit.gram)}
            asked = {owner // 2 for owner in owners if owner % 2 == 0}
            answered = {owner // 2 for owner in owners if owner % 2}
            for known, new in zip(hits, (asked, answered, asked & answered), strict=True):
                known |= new
    questions, answers, both = (tuple(items[i].id for i in sorted(found)) for found in hits)
    return Seen(questions, answers, both, checked, count)

"""How many questions of a benchmark stand in the text a model was trained on.

Words are compared after NFKC and lower case: runs of letters, numbers, and every operator and CJK character
by itself. A question is *seen* if any 13 of its words in a row are in the training text (GPT-3, appendix C
of arXiv 2005.14165); a shorter question must be there as a whole, and one of fewer than 4 words says
nothing and is left out. An answer is counted the same way. Seeing the answer is what teaching means; seeing
the question with it is memorising, and the accuracy then measures that.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from caravan.evals.items import Item

NGRAM = 13
FEWEST = 4
_WORD = re.compile(r"\d+|[\u3400-\u9fff]|[^\W\d\u3400-\u9fff]+|[+\-*/=<>%]")


@dataclass(frozen=True, slots=True)
class Seen:
    """Ids of the items found, and how many were long enough to look for."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    both: tuple[str, ...]
    """Question and answer in one text: what a model can have learned by heart."""
    checked: int
    texts: int


def words(text: str) -> list[str]:
    """What is compared."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _grams(parts: Sequence[str]) -> set[tuple[str, ...]]:
    n = min(NGRAM, len(parts))
    return {tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)} if n >= FEWEST else set()


def contamination(items: Sequence[Item], texts: Iterable[str]) -> Seen:
    """Look for every item in every text; one pass over the texts, memory in proportion to the items."""
    wanted: dict[tuple[str, ...], set[tuple[str, int]]] = {}
    checked = 0
    for index, item in enumerate(items):
        asked = item.row.get("context") or item.messages[-1].content
        grams = {"question": _grams(words(asked)), "answer": _grams(words(item.reference))}
        checked += bool(grams["question"])
        for part, found in grams.items():
            for gram in found:
                wanted.setdefault(gram, set()).add((part, index))
    by_first: dict[str, set[int]] = {}
    for gram in wanted:
        by_first.setdefault(gram[0], set()).add(len(gram))
    hits: dict[str, set[int]] = {"question": set(), "answer": set(), "both": set()}
    count = 0
    for text in texts:
        count += 1
        here: dict[str, set[int]] = {"question": set(), "answer": set()}
        for part, index in _occurring(words(text), wanted, by_first):
            here[part].add(index)
        hits["question"] |= here["question"]
        hits["answer"] |= here["answer"]
        hits["both"] |= here["question"] & here["answer"]
    ids = {part: tuple(items[i].id for i in sorted(found)) for part, found in hits.items()}
    return Seen(ids["question"], ids["answer"], ids["both"], checked, count)


def _occurring(
    parts: list[str], wanted: dict[tuple[str, ...], set[tuple[str, int]]], by_first: dict[str, set[int]]
) -> Iterable[tuple[str, int]]:
    """(question or answer, item) for each wanted run of words in `parts`; only runs that begin alike are
    cut out."""
    for at, word in enumerate(parts):
        for n in by_first.get(word, ()):
            yield from wanted.get(tuple(parts[at : at + n]), ())

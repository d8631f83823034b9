"""Long and hostile texts: the answers of a slow search, and work that grows as the text does."""

from __future__ import annotations

import random
import sys
import unicodedata
from typing import Any

import pytest

from caravan.data import decontaminate as grams
from caravan.data import nfkc as forms
from caravan.data.decontaminate import Index
from caravan.data.nfkc import Places, nfkc

HAN = [chr(c) for c in range(0x4E00, 0x4E00 + 600)]
MARKS = "\u0301\u0323\u0308\u0331"
ODD = [
    *"ﬁﬀＡｂ３，。！①Ⅷ㎏", "e\u0301", "e\u0323\u0301", "n\u0303", "\u1112\u1161\u11ab", "ㄱㅏ",
    "\u09c7\u09be", "\uff76\uff9e", "\u0b95\u0bca", "\u0b95\u0bc6\u0bbe", "Å", "\U0002f800",
]  # fmt: skip
"""What NFKC joins, splits or shortens: ligatures, full width, accents, Hangul, Bengali, Tamil, kana."""


def slow(wanted: list[str], text: str, fewest: int = 8) -> list[tuple[int, tuple[str, ...]]]:
    """(number of the first word, words) of every n-gram of the wanted texts that stands in a text."""
    here, out = grams.words(text), set()
    for one in wanted:
        own = grams.words(one)
        n = min(13, len(own))
        for place in range(len(own) - n + 1) if len(own) >= fewest else ():
            gram = tuple(own[place : place + n])
            out |= {(at, gram) for at in range(len(here) - n + 1) if tuple(here[at : at + n]) == gram}
    return sorted(out)


def fast(wanted: list[str], texts: list[str]) -> list[list[tuple[int, tuple[str, ...]]]]:
    index = Index()
    index.extend(wanted)
    return [
        sorted((len(grams.words(text[: hit.start])), tuple(grams.words(text[hit.start : hit.stop])))
               for hit in hits)
        for text, hits in zip(texts, index.search(texts), strict=True)
    ]  # fmt: skip


def random_text(rng: random.Random, size: int) -> str:
    """Few different words, so that they repeat; English, Chinese and spellings that NFKC changes."""
    words = [*"abcd", "two", "12", "+", *HAN[:5], *ODD]
    return "".join(f"{rng.choice(words)}{rng.choice(('', ' ', '，', ' . '))} " for _ in range(size))


@pytest.mark.parametrize("seed", range(12))
def test_random_texts_give_the_answers_of_a_slow_search(seed: int) -> None:
    rng = random.Random(seed)
    texts = [random_text(rng, 60) for _ in range(6)]
    wanted = [random_text(rng, rng.randrange(3, 40)) for _ in range(8)]
    for k in range(6):  # pieces of wanted texts inside others, also of one word's length over the edge
        piece = wanted[k][: rng.randrange(20, 200)]
        texts[k] += rng.choice(("", " ", "，")) + piece + " " + random_text(rng, 10)
    texts += ["", "a " * 100, "一" * 90, texts[0] + texts[1]]
    wanted += ["a " * 13, "一" * 20, "a " * 8]
    assert fast(wanted, texts) == [slow(wanted, text) for text in texts]


def test_a_long_chinese_line_is_searched_to_its_end() -> None:
    """5 MB in one line; the question stands at the very end, in full width, and once across the middle."""
    rng = random.Random(5)
    question = "".join(rng.choices(HAN, k=24)) + "，Ａ12+3？"
    size = 5_000_000 // 3
    line = "".join(rng.choices([*HAN, "，", "。"], k=size))
    text = line[: size // 2] + question + line[size // 2 :] + question
    index = Index()
    index.add(question)
    (hits,) = index.search([text])
    at = [size // 2, size + len(question)]
    assert grams.merged(hits) == [(a, a + len(question) - 1) for a in at], "the question mark is no word"
    assert len(hits) == 2 * len(index)


def test_every_spelling_has_its_place() -> None:
    """Pieces are normalised one by one: together they are the text's NFKC, and a span holds what it held."""
    rng = random.Random(0)
    odd = [chr(c) for c in range(forms.TOP) if unicodedata.decomposition(chr(c))]
    odd += [*ODD, *MARKS, *"ab 一", *map(chr, range(0x1100, 0x1200))]
    for _ in range(3000):
        text = "".join(rng.choices(odd, k=rng.randrange(1, 12)))
        whole = unicodedata.normalize("NFKC", text)
        assert nfkc(text) == whole
        places = Places(text)
        a = rng.randrange(len(whole))
        b = rng.randrange(a, len(whole)) + 1
        start, stop = places.span(a, b)
        before, inside = (unicodedata.normalize("NFKC", t) for t in (text[:start], text[start:stop]))
        assert before + inside + unicodedata.normalize("NFKC", text[stop:]) == whole
        assert len(before) <= a and len(before) + len(inside) >= b


def test_nothing_changes_beyond_the_tables() -> None:
    for c in range(forms.TOP, sys.maxunicode + 1):
        assert not unicodedata.decomposition(chr(c)) and not unicodedata.combining(chr(c)), hex(c)


@pytest.mark.parametrize("letters", ["\u0301\u0323", "\u0323\u0308", "\u0344\u0323", "\uff9e\u0301"])
def test_endless_marks_are_sorted_once(letters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """unicodedata.normalize sorts marks by insertion: it never gets a long run out of order."""
    short = "a" + letters * 400
    assert nfkc(short) == unicodedata.normalize("NFKC", short)
    original, worst = unicodedata.normalize, [0]

    def watched(form: Any, text: str) -> str:
        classes = [unicodedata.combining(c) for c in text]
        moves, run = 0, list[int]()
        for one in classes:
            run = [*run, one][-200:] if one else []
            moves += sum(other > one for other in run) if one else 0
        worst[0] = max(worst[0], moves)
        return original(form, text)

    monkeypatch.setattr(unicodedata, "normalize", watched)
    text = "一二三 a" + letters * 5_000 + " 四五六"
    assert nfkc(text).endswith(" 四五六")
    assert worst[0] <= forms.LONG**2, "marks moved one by one"


def test_a_page_of_marks_does_not_hang() -> None:
    n = 100_000
    assert nfkc("a" + "\u0301\u0323" * n) == "ạ" + "\u0323" * (n - 1) + "\u0301" * n
    index = Index()
    index.add("one two three four five six seven eight nine")
    text = "x" + "\u0301\u0323" * n + " One two three four five six seven eight nine"
    ((hit,),) = index.search([text])
    assert text[hit.start : hit.stop] == "One two three four five six seven eight nine"


def calls(index: Index, text: str) -> int:
    """Functions called, Python's and C's, by one search."""
    count = 0

    def note(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        index.search([text])
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", ["plain", "full width", "all hits", "one word", "accents"])
def test_work_grows_as_the_text_does(kind: str) -> None:
    rng = random.Random(1)
    made = {
        "plain": "".join(rng.choices(HAN, k=4000)),
        "full width": "".join(rng.choices([*HAN[:50], *"，。！Ａ３"], k=4000)),
        "all hits": "".join(rng.choices(HAN, k=4000)),
        "one word": "一" * 4000,
        "accents": "e\u0301 ﬁ x\u0323\u0301 " * 500,
    }[kind]
    index = Index()
    index.extend(
        ["".join(rng.choices(HAN, k=50)), "一" * 30, made[:200], *([made] if kind == "all hits" else [])]
    )
    index.search([made])  # tables are made at the first search
    once, eight = calls(index, made), calls(index, made * 8)
    assert eight <= 8.5 * once + 200, (once, eight)


def test_many_texts_at_once_are_wanted_as_one_by_one() -> None:
    rng = random.Random(3)
    texts = [random_text(rng, rng.randrange(1, 60)) for _ in range(50)]
    one, many = Index(), Index()
    assert [one.add(text) for text in texts] == many.extend(texts)
    assert len(one) == len(many) and one.texts == many.texts
    found = [(text, one.search([text])[0]) for text in texts]
    assert [hits for _, hits in found] == many.search(texts)
    for number, (_, hits) in enumerate(found):
        assert one.covered(number, {hit.gram for hit in hits}) == (1 if len(one.texts[number]) >= 8 else 0)
        assert one.grams(number) == many.grams(number)

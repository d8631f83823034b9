"""Copied spans: planted ones are found, nothing else is, and a hash alone removes nothing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from caravan.data.dedup import substring
from caravan.data.dedup.keepers import Ranks
from caravan.data.dedup.substring import Spans, without
from caravan.data.dedup.units import EVERYTHING, Units, portions, units


def fresh(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [f"t{draw.randrange(10**9)}" for _ in range(count)]


def search(
    folder: Path, texts: list[str], span: int = 50, memory: int = 1 << 30, batch: int = 1 << 16
) -> list[tuple[int, int, int, int, int]]:
    """The first text is ranked best."""
    one, ranks = Spans(folder, span, memory), Ranks()
    for part in portions(texts, batch):
        one.add(units(part, EVERYTHING))
    ranks.add(np.arange(len(texts)), np.ones(len(texts)))
    found = one.found(ranks)
    one.close()
    assert not list(folder.iterdir())
    return [(s.place, s.start, s.stop, s.origin, s.origin_start) for s in found]


def slow(texts: list[str], span: int) -> set[tuple[int, int]]:
    """Every (text, token) inside a later copy; a copy that overlaps its origin spares the origin."""
    first: dict[tuple[str, ...], tuple[int, int]] = {}
    marked = set()
    for d, text in enumerate(texts):
        starts, ends = units([text], EVERYTHING).spans(0)
        tokens = [text[a:b] for a, b in zip(starts, ends, strict=True)]
        for i in range(len(tokens) - span + 1):
            d0, i0 = first.setdefault(tuple(tokens[i : i + span]), (d, i))
            if (d0, i0) != (d, i):
                low = max(i, i0 + span) if d0 == d else i
                marked |= {(d, t) for t in range(low, i + span)}
    return marked


def planted(seed: int = 0) -> list[str]:
    texts = [fresh(k, 300) for k in range(12)]
    texts[5][100:150] = texts[2][40:90]  # exactly 50
    texts[7][10:59] = texts[2][200:249]  # 49: one too few
    texts[8][:120] = texts[3][180:300]  # to the end, at the beginning
    texts[8][200:260] = texts[8][20:80]  # thrice
    texts[9] = texts[4][:]
    return [" ".join(t) for t in texts]


def test_planted_spans_are_found_and_nothing_else(tmp_path: Path) -> None:
    assert search(tmp_path, planted()) == [
        (5, 100, 150, 2, 40), (8, 0, 120, 3, 180), (8, 200, 260, 3, 200), (9, 0, 300, 4, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(("memory", "batch"), [(1 << 30, 100), (40_000, 1 << 16), (30_000, 700)])
def test_memory_and_batches_change_nothing(tmp_path: Path, memory: int, batch: int) -> None:
    assert search(tmp_path, planted(), memory=memory, batch=batch) == search(tmp_path, planted())


def test_more_parts_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(substring, "_OPEN_FILES", 3)
    assert search(tmp_path, planted(), memory=20_000) == search(tmp_path, planted())


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = search(tmp_path, planted())
    monkeypatch.setattr(substring, "_CHUNK", 97)
    assert search(tmp_path, planted()) == wanted


@pytest.mark.parametrize("seed", range(6))
def test_tokens_are_those_of_a_slow_search(tmp_path: Path, seed: int) -> None:
    """Few words, so that everything overlaps everything."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices("ab", k=draw.randrange(0, 60))) for _ in range(10)]
    texts += ["a " * 40, " ".join("abc" * 20), ""]
    found = search(tmp_path, texts, span=6)
    marked = {(d, t) for d, low, high, _, _ in found for t in range(low, high)}
    assert marked == slow(texts, 6)
    assert len(marked) == sum(high - low for _, low, high, _, _ in found), "spans do not overlap"
    tokens = [text.split() for text in texts]
    for d, low, high, origin, at in found:
        assert tokens[d][low:high] == tokens[origin][at : at + high - low]


def test_a_weak_hash_removes_nothing_and_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = search(tmp_path, planted())
    true = substring.windows
    monkeypatch.setattr(substring, "windows", lambda h, n: true(h, n) % np.uint64(64))
    assert search(tmp_path, planted()) == wanted


def test_tokens_with_one_hash_are_compared_by_their_letters(tmp_path: Path) -> None:
    texts = planted()
    other = texts[2].split()[60]
    copied = texts[5].replace(other, "x" * len(other), 1)
    assert copied != texts[5]
    wrong, ranks = Spans(tmp_path, 50), Ranks()
    good, bad = units([texts[2], texts[5]], EVERYTHING), units([texts[2], copied], EVERYTHING)
    wrong.add(Units(bad.codes_N, bad.text_D, bad.start_U, bad.end_U, good.hash_U, bad.range_D))
    ranks.add([1, 2], [1, 1])
    assert wrong.found(ranks) == []
    wrong.close()


def test_white_space_says_nothing_and_case_does(tmp_path: Path) -> None:
    base = " ".join(fresh(1, 60))
    assert search(tmp_path, [base, base.replace(" ", "\n  ")]) == [(1, 0, 60, 0, 0)]
    assert search(tmp_path, [base, base.upper()]) == []
    chinese = "".join(chr(0x4E00 + 7 * k % 2000) for k in range(80))
    assert search(tmp_path, [chinese, "前" + chinese[5:70] + "后"]) == [(1, 1, 66, 0, 5)]


def test_rules_and_dots_are_no_copies(tmp_path: Path) -> None:
    texts = [f"{' '.join(fresh(k, 20))}\n{'=' * 79}\n{'.' * 60}\n{'哈' * 60}" for k in range(3)]
    assert search(tmp_path, texts) == []
    cut = units(["== = -==? a__"], EVERYTHING)
    assert (cut.end_U - cut.start_U).tolist() == [2, 1, 1, 2, 1, 3]


def test_the_best_ranked_text_keeps_the_span(tmp_path: Path) -> None:
    texts, one, ranks = planted(), Spans(tmp_path), Ranks()
    one.add(units(texts, EVERYTHING))
    ranks.add(np.arange(12)[::-1], np.ones(12))
    pairs = {(s.place, s.origin) for s in one.found(ranks)}
    assert {(2, 5), (3, 8), (4, 9), (8, 8)} == pairs
    one.close()


def test_cutting_a_text() -> None:
    text = "Keep this. Cut that now! And, keep."
    assert without(text, [(11, 25)]) == "Keep this. And, keep."
    assert without(text, [(25, 35), (0, 11)]) == "Cut that now!"
    assert without(text, [(11, 20), (15, 25), (12, 14)]) == "Keep this. And, keep.", "cuts may overlap"
    assert without("One, two three", [(3, 8)]) == "One three", "words stay apart"
    assert without("One, two three four", [(3, 8), (9, 14)]) == "One four"
    assert without("One, two three four", [(3, 8), (5, 14)]) == "One four", "also where cuts overlap"


def test_spans_are_joined_across_the_ranges_they_are_sorted_in(tmp_path: Path) -> None:
    texts = [" ".join(fresh(1, 900)), " ".join(fresh(2, 50) + fresh(1, 900))]
    for memory in (2_000, 5_000, 1 << 30):
        assert search(tmp_path, texts, memory=memory) == [(1, 50, 950, 0, 0)]


def test_a_text_that_repeats_itself_is_a_few_spans(tmp_path: Path) -> None:
    """One window at a time they would take minutes, and kilobytes each."""
    verse, other = fresh(1, 7), fresh(2, 70)
    texts = [other + verse * 20, ["la"] * 30_000, verse * 3_000 + other, ["la"] * 200]
    found = search(tmp_path, [" ".join(t) for t in texts])
    assert len(found) <= 8
    for d, low, high, origin, at in found:
        assert texts[d][low:high] == texts[origin][at : at + high - low]
    marked = {(d, t) for d, low, high, _, _ in found for t in range(low, high)}
    kept = [[token for t, token in enumerate(text) if (d, t) not in marked] for d, text in enumerate(texts)]
    assert [len(text) for text in kept] == [70 + 50, 50, 0, 0]

"""Languages: scripts, the models' arithmetic, and accuracy by length of passage on texts not built from."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.data import langid

PEER = "en fr de es pt it nl sv da nb fi et hu pl cs sk sl ro tr id vi ru uk bg el ar fa hi zh ja ko th"


@pytest.mark.parametrize(
    ("text", "lang", "script"),
    [
        ("Where have all the young people gone today?", "en", "LATIN"),
        ("Où sont passés tous les jeunes gens aujourd'hui ?", "fr", "LATIN"),
        ("Wo sind heute nur all die jungen Leute geblieben?", "de", "LATIN"),
        ("Kam dnes odešli všichni mladí lidé?", "cs", "LATIN"),
        ("Куда сегодня ушли все молодые люди?", "ru", "CYRILLIC"),
        ("Куди сьогодні пішли всі молоді люди?", "uk", "CYRILLIC"),
        ("این روزها همه جوانان کجا رفته‌اند؟", "fa", "ARABIC"),
        ("आज हमारे गाँव के सभी युवा लोग कहाँ चले गए हैं?", "hi", "DEVANAGARI"),
        ("今天的年轻人都到哪里去了？ABC", "zh", "HAN"),
        ("今日の若者はどこへ行ったのか", "ja", "KANA"),
        ("오늘 젊은이들은 모두 어디로 갔을까", "ko", "HANGUL"),
        ("Πού πήγαν σήμερα όλοι οι νέοι;", "el", "GREEK"),
        ("วันนี้คนหนุ่มสาวไปไหนกันหมด", "th", "THAI"),
        ("12 + 29 = 41 !!", "", ""),
        ("", "", ""),
    ],
)
def test_sentences(text: str, lang: str, script: str) -> None:
    found = langid.guess(text)
    assert (found.lang, found.script) == (lang, script)
    assert langid.guesses([text])[0].lang == lang


def test_probabilities_by_hand() -> None:
    """Two languages, one letter each: interpolated from the uniform distribution upward."""
    model = langid.fit({"x": [("a", 1.0)], "y": [("b", 1.0)]})
    prior, letters = 3.0, 260
    one = {c: ((c in "a ") + prior / letters) / (2 + prior) for c in "ab "}
    assert model.languages == ("x", "y")
    grams = [
        {
            chr(int(k) & 0xFFFF): model.rows_GL[model.first[0] + i]
            for i, k in enumerate(model.keys[0].tolist())
        }
    ]
    assert np.exp(grams[0]["a"][0]) == pytest.approx(one["a"], rel=1e-5)
    assert np.exp(grams[0]["b"][0]) == pytest.approx(one["b"], rel=1e-5)
    # "   a": after three spaces x has seen only "a", once.
    two = (1 + prior * one["a"]) / (1 + prior)
    three = (1 + prior * two) / (1 + prior)
    four = (1 + prior * three) / (1 + prior)
    scores = model.scores([langid.padded("a")])
    last = (1 + prior * one[" "]) / (1 + prior)
    for _ in range(2):
        last = (1 + prior * last) / (1 + prior)
    assert scores[0, 0] == pytest.approx(np.log(four) + np.log(last), rel=1e-5)
    assert scores[0, 0] > scores[0, 1]


@settings(max_examples=30)
@given(st.lists(st.text(max_size=80), min_size=1, max_size=6))
def test_neighbours_change_nothing(texts: list[str]) -> None:
    together = langid.guesses(texts)
    assert together == [langid.guesses([t])[0] for t in texts]


def test_every_language_knows_its_own_sentences() -> None:
    wrong = [lang for lang, parts in langid.texts().items() if langid.guess(parts[0][0]).lang != lang]
    assert not wrong
    assert len(langid.texts()) >= 88
    assert all(len(parts[0][0]) > 150 and len(parts) > 15 for parts in langid.texts().values())


def passages(kit: Path, size: int) -> list[tuple[str, str]]:
    """(language, passage of `size` characters) of every translation whose language and script we have, twelve
    from its second half. Whoever sharpens the models may look at the first."""
    texts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in (kit / "langid" / "udhr_two_thirds.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts[row["lang"], row["file"]].append(row["text"])
    ours = {lang: langid.guess(parts[0][0]).script for lang, parts in langid.texts().items()}
    ours |= {lang: script for script, lang in langid.ALONE.items() if lang not in ours}
    out = []
    for (lang, _), parts in texts.items():
        base = lang.split("-")[0]
        text = " ".join(parts)
        if ours.get(base) == langid.scripts([text])[0]:
            ends = np.linspace(len(text) // 2 + size, len(text), 12).astype(int).tolist()
            out += [(base, text[end - size : end]) for end in ends if end - size >= len(text) // 2]
    return out


@pytest.mark.parametrize(
    ("size", "all_languages", "peer_languages"),
    [(20, 0.80, 0.80), (50, 0.91, 0.92), (100, 0.945, 0.94), (200, 0.96, 0.96)],
)
def test_accuracy_by_length(kit: Path, size: int, all_languages: float, peer_languages: float) -> None:
    right, seen = Counter[str](), Counter[str]()
    for lang, text in passages(kit, size):
        seen[lang] += 1
        right[lang] += langid.guess(text, size).lang == lang
    common = PEER.split()
    assert len(seen) > 95
    assert sum(right.values()) >= all_languages * sum(seen.values())
    assert sum(right[k] for k in common) >= peer_languages * sum(seen[k] for k in common)


def test_web_pages_are_english(kit: Path) -> None:
    rows = (kit / "pretrain" / "web" / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    found = langid.guesses([json.loads(row)["text"] for row in rows])
    assert sum(g.lang == "en" and g.score > 0.65 for g in found) >= 299

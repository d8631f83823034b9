"""Cleaning and the rules of repetition, with numbers worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caravan.data import clean
from caravan.data.dedup import WordHashes


def judged(text: str, lang: str = "en") -> clean.Rejection | None:
    words = clean.WORD.findall(text.lower())
    return clean.repetition(text, words, WordHashes()(words), lang)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("\ufeffa\x00b\x1b[0m", "ab[0m"),
        ("a  \t\nb", "a\nb"),
        ("\n\na\n\n\n\n\n\nb\n\n", "a\n\n\nb"),
        ("    indented\n\tkeep", "    indented\n\tkeep"),
        ("\u200bé e\u0301", "\u200bé e\u0301"),
    ],
)
def test_normalise(raw: str, cleaned: str) -> None:
    assert clean.normalise(raw) == cleaned


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = clean.normalise(text)
    assert clean.normalise(once) == once


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("It is a truth that the man is in want of a wife.", "en"),
        ("Der Hund schläft unter dem großen alten Baum", "latin"),
        ("学而时习之，不亦说乎？Python 3", "zh"),
        ("これはペンです。漢字も", "ja"),
        ("日本語文章中漢字多用", "zh"),
        ("日本語の文章は漢字が多い", "ja"),
        ("안녕하세요 세계", "ko"),
        ("Привет, мир", "cyrillic"),
        ("12 + 29 = 41", "none"),
    ],
)
def test_language(text: str, lang: str) -> None:
    assert clean.language(text) == lang


def test_repeated_lines_by_number_and_by_length() -> None:
    lines = [" ".join(f"word{i}{k}" for k in range(5)) + " of" for i in range(10)]
    assert judged("\n".join(lines)) is None
    short = [*lines, "x", "x", "x", "x", "x"]  # 4 copies of 15 lines: 27 %, and nearly no characters
    assert judged("\n".join(short)) is None
    assert judged("\n".join([*short, "x", "x"])).rule == "repeated_lines"  # 6 of 17: 35 %
    long = [*lines, *["x" * 100] * 3]  # 2 copies of 13 lines, but 200 of 620 characters
    assert judged("\n".join(long)).rule == "repeated_lines"
    assert judged("\n".join(long), "code") is None
    assert judged("\n".join(["x"] * 7)) is None, "a short refrain is nothing odd"


def test_most_frequent_ngram() -> None:
    """30 times "aa bb" among 100 words of 2 characters: the 2-gram covers 60 %."""
    text = " ".join(["aa bb " + f"{i:02d}" for i in range(30)] + [f"z{i}" for i in range(10)])
    found = judged(text)
    assert found is not None and found.rule == "repeated_ngrams" and "2-gram" in found.reason
    assert judged(" ".join(f"w{i}" for i in range(200))) is None


def test_repeated_long_ngrams_count_later_copies() -> None:
    """A passage three times: two later copies are 20 of 110 words, or 12 of 98 (limits 15 to 10 %)."""
    passage = [f"p{i:02d}" for i in range(10)]
    rest = [f"r{i:02d}" for i in range(80)]
    found = judged(" ".join(passage + rest[:40] + passage + rest[40:] + passage))
    assert found is not None and "5-grams cover 18%" in found.reason
    passage = passage[:6]
    assert judged(" ".join(passage + rest[:40] + passage + rest[40:] + passage)) is None


def test_long_texts_are_judged_page_by_page() -> None:
    """A book that repeats one page is not a page that repeats itself."""
    page = " ".join(f"w{i}" for i in range(2000))
    assert judged(page + " " + page) is None
    broken = " ".join(["the same words again and again"] * 330)
    assert judged(" ".join([page, broken, page])) is None, "one bad page in three"
    assert judged(" ".join(["the same words again and again"] * 1000)).rule == "repeated_ngrams"


def test_scripts_without_spaces_are_compared_by_line_only() -> None:
    assert judged("学而时习之不亦说乎" * 100, "zh") is None

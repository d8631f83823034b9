"""Signals against slow definitions written out line by line; nothing leaks between documents of a batch."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.data import lines, signals
from caravan.data.signals import View, refinedweb
from caravan.types import UserError

WORDS = [
    *(
        "the",
        "The",
        "be,",
        "that",
        "have",
        "(with)",
        "and",
        "of",
        "to",
        "cat's",
        "x",
        "#",
        "...",
        "…",
        "-",
        "•",
    ),
    *("12", "A.", "sat.", '"end."', "ok!", "[3]", "{", "don't", "ÉTÉ", "学而", "时习"),
    *("javascript", "privacy policy", "lorem ipsum", "ab ab ab"),
]
GAPS = st.sampled_from([" ", " ", " ", "\n", "\n\n"])
TEXT = st.lists(st.tuples(st.sampled_from(WORDS) | st.text(max_size=4), GAPS), max_size=60).map(
    lambda pairs: "".join(word + gap for word, gap in pairs).strip()
)


def measured(texts: Sequence[str], families: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    return signals.compute(View(texts), families)


def letters(word: str) -> str:
    return "".join(c for c in word if unicodedata.category(c)[0] not in "PS")


def share(part: float, whole: float) -> np.float32:
    return np.float32(part / whole) if whole else np.float32(0)


def lines_of(text: str) -> list[str]:
    return [s for line in text.split("\n") if (s := line.strip())]


def gopher(text: str) -> dict[str, float]:
    words = text.split()
    solid = [w for w in words if letters(w)]
    rows = lines_of(text)
    stop = {"the", "be", "to", "of", "and", "that", "have", "with"}
    return {
        "gopher_words": len(solid),
        "gopher_mean_word_length": share(sum(len(letters(w)) for w in solid), len(solid)),
        "gopher_hash_ratio": share(text.count("#"), len(solid)),
        "gopher_ellipsis_ratio": share(text.count("...") + text.count("…"), len(solid)),
        "gopher_bullet_lines": share(sum(r[0] in "•-" for r in rows), len(rows)),
        "gopher_ellipsis_lines": share(sum(r.endswith(("...", "…")) for r in rows), len(rows)),
        "gopher_alpha_words": share(sum(any(c.isalpha() for c in w) for w in words), len(words)),
        "gopher_stop_words": len({letters(w) for w in words} & stop),
    }


def repetition(text: str) -> dict[str, float]:
    words = [low for w in text.split() if (low := lower(letters(w)))]
    total = sum(map(len, words))
    out: dict[str, float] = {}
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        times = Counter(grams)
        if n <= 4:
            top, count = times.most_common(1)[0] if grams else ((), 0)
            out[f"top_{n}gram"] = share(sum(map(len, top)) * count if count > 1 else 0, total)
        else:
            inside = {i + k for i, g in enumerate(grams) if times[g] > 1 for k in range(n)}
            out[f"repeated_{n}grams"] = share(sum(len(words[i]) for i in inside), total)
    rows = lines_of(text)
    parts = [s for p in text.split("\n\n") if (s := p.strip())]
    for name, group in (("line", rows), ("paragraph", parts)):
        copies = [g for i, g in enumerate(group) if g in group[:i]]
        out[f"copied_{name}s"] = share(len(copies), len(group))
        out[f"copied_{name}_chars"] = share(sum(map(len, copies)), len(text))
    return out


def lower(word: str) -> str:
    """Character by character, as the table of hashes does."""
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in word)


def fineweb(text: str) -> dict[str, float]:
    rows = lines_of(text)
    copies = [r for i, r in enumerate(rows) if r in rows[:i]]
    return {
        "fineweb_ended_lines": share(sum(r.endswith((".", "?", "!", '"', "'")) for r in rows), len(rows)),
        "fineweb_short_lines": share(sum(len(r) <= 30 for r in rows), len(rows)),
        "fineweb_copied_line_chars": share(sum(map(len, copies)), len(text.replace("\n", ""))),
        "fineweb_newlines": share(text.count("\n"), len(text.split())),
    }


def c4(text: str) -> dict[str, float]:
    out: dict[str, float] = {}
    for prefix, rules in (
        ("c4", lines.C4_PAPER),
        ("c4_code", lines.C4_CODE),
        ("c4_any_end", lines.C4_ANY_END),
    ):
        found = lines.c4(text, rules)
        out[f"{prefix}_kept_lines"] = share(len(found.lines), len(lines_of(text)))
        out[f"{prefix}_sentences"] = found.sentences
        out[f"{prefix}_lorem"] = found.lorem
        out[f"{prefix}_braces"] = found.braces
    del out["c4_any_end_kept_lines"]
    return out


def tidy(text: str) -> str:
    """Texts as `clean.normalise` leaves them: one kind of newline, one kind of white space at line ends."""
    return "".join(
        c if c == "\n" or not c.isspace() else " "
        for c in text
        if unicodedata.category(c) != "Cc" or c == "\n"
    )


@settings(max_examples=60)
@given(st.lists(TEXT.map(tidy), min_size=1, max_size=5))
def test_definitions(texts: list[str]) -> None:
    found = measured(texts)
    for d, text in enumerate(texts):
        for name, value in {**gopher(text), **repetition(text), **fineweb(text), **c4(text)}.items():
            assert found[name][d] == pytest.approx(value, rel=1e-6), f"{name} of {text!r}"


@settings(max_examples=40)
@given(st.lists(TEXT, min_size=2, max_size=6))
def test_neighbours_change_nothing(texts: list[str]) -> None:
    together = measured(texts)
    for d, text in enumerate(texts):
        alone = measured([text])
        for name, values in together.items():
            assert values[d] == alone[name][0], f"{name} of {text!r}"


def test_every_signal_is_described_and_nothing_is_nan() -> None:
    for texts in (["", " ", "\n", "学", "a", "\ud800", "\U000f0000 b"], ["word " * 300_000]):
        found = measured(texts)
        assert found.keys() == signals.columns().keys() and all(signals.columns().values())
        for name, values in found.items():
            assert len(values) == len(texts), name
            assert values.dtype in (np.dtype(np.float32), np.dtype(np.int64), np.dtype(object)), name
            assert values.dtype.kind != "f" or np.isfinite(values).all(), name
    with pytest.raises(UserError, match="no signals called"):
        measured(["a"], ["gofer"])


def test_of_equally_frequent_ngrams_the_first_counts() -> None:
    """ "aa bb" and "dddd ee" come twice; the first covers 8 of 21 letters."""
    found = measured(["aa bb aa bb c dddd ee dddd ee"])
    assert found["top_2gram"][0] == share(8, 21)


def test_families_of_signals() -> None:
    assert signals.families_of(["top_2gram", "c4_lorem", "nothing"]) == ("c4", "repetition")


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("One. Two! Three?", 3),
        ('He said "no." Then he left', 1),
        ("J. R. Smith came.", 1),
        ("no mark", 1),
        ("e.g. this (or that.) and", 2),
    ],
)
def test_sentences(line: str, count: int) -> None:
    assert lines.sentences(line.split()) == count


@pytest.mark.parametrize(
    ("line", "flagged"),
    [
        ("SALE ENDS ON THURSDAY at noon", True),
        ("12 345 6", True),
        ("3 likes", True),
        ("1,204 Comments", True),
        ("Menu", True),
        ("Sign in to continue", True),
        ("You can read more", True),
        ("There are 2 items in cart now", True),
        ("We took our time and walked home.", False),
        ("Read more books than you did last year, said the teacher to all of us", False),
        ("3 little pigs", False),
        ("They sign in the morning and leave when the evening bell has rung twice", False),
    ],
)
def test_lines_refinedweb_removes(line: str, flagged: bool) -> None:
    assert refinedweb.flagged_lines(View([line])).tolist() == [flagged]
    text = f"A line that nobody minds at all.\n{line}\n  Another one, indented, that is fine."
    left = text if not flagged else text.replace(line + "\n", "")
    assert lines.edit(text, "refinedweb") == left
    words = len(line.split()) if flagged else 0
    assert measured([text])["refinedweb_flagged_words"][0] == share(words, len(text.split()))


def test_line_filters_of_c4() -> None:
    text = (
        "A line that ends well.\n\n  Another one [12] here.[edit]\nno mark here\nTwo words.\nand so on...\n"
        "Enable javascript to see this.\nOur privacy policy has changed.\n" + "x" * 1001 + " is far too long."
    )
    assert lines.edit(text, "c4_paper") == "A line that ends well.\nAnother one  here."
    assert lines.edit(text, "c4_code") == "A line that ends well."
    assert lines.edit(text, "c4_any_end").split("\n")[2:] == ["no mark here", "and so on..."]
    with pytest.raises(UserError, match="no line filter"):
        lines.edit(text, "c5")


def test_code_and_markup() -> None:
    found = measured(
        ["int main() {\n  return 0;\n}", "<p>hi</p> &amp; a < b", "A plain sentence, nothing else."]
    )
    assert found["code_lines"][0] == 1 and found["code_lines"][2] == 0
    assert found["markup_share"][1] == share(len("<p></p>&amp;"), len("<p>hi</p> &amp; a < b"))
    assert found["markup_share"][2] == 0 and found["symbol_share"][2] == 0


def test_chinese() -> None:
    good = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？"
    again = good * 3
    menu = "首页\n新闻\n点击查看\n版权所有\n上一篇\n下一篇"
    old = "學而時習之，不亦說乎？有朋自遠方來，不亦樂乎？"
    found = measured([good, again, menu, old, "nothing Chinese here"])
    han = [sum("\u4e00" <= c <= "\u9fff" for c in t) for t in (good, again, menu, old)]
    assert found["zh_chars"].tolist() == [*han, 0]
    assert found["zh_mark_share"][0] == share(sum(c in "，？" for c in good), len(good))
    assert found["zh_longest_clause"].tolist() == [6, 6, 4, 6, 0]
    assert found["zh_repeated_10grams"].tolist()[:2] == [0.0, 1.0]
    assert found["zh_top_4gram"][1] == share(4 * 3, han[1])
    assert found["zh_short_lines"].tolist() == [0, 0, 1, 0, 0]
    assert found["zh_boilerplate_lines"][2] == share(4, 6)
    assert found["zh_ended_lines"].tolist() == [1, 1, 0, 1, 0]
    assert found["zh_traditional"][3] > 0.2 and found["zh_traditional"][0] == 0
    assert found["zh_simplified"][0] > 0.1 and found["zh_simplified"][3] == 0


def test_repeated_characters_by_definition() -> None:
    """10-grams of Han characters, counted slowly."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        text = "".join(draw.choice(list("天地玄黄宇宙"), 40)) + "，" + "".join(draw.choice(list("天地"), 40))
        han = re.sub("，", "", text)
        grams = [han[i : i + 10] for i in range(len(han) - 9)]
        inside = {i + k for i, g in enumerate(grams) if grams.count(g) > 1 for k in range(10)}
        fours = Counter(han[i : i + 4] for i in range(len(han) - 3)).most_common(1)[0][1]
        found = measured([text, text + "完"])
        assert found["zh_repeated_10grams"][0] == share(len(inside), len(han))
        assert found["zh_top_4gram"][0] == np.minimum(share(4 * fours, len(han)), 1)

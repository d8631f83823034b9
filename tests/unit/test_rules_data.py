"""Rule files say what was published, keep what lies at a limit and drop what lies beyond it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from caravan.data import lines, rules, signals
from caravan.data.measure import CLASSIFIED, Measure
from caravan.stages import filter as filter_stage
from caravan.types import Document, UserError

PUBLISHED = {
    # Rae et al. 2021, appendix A.1.1
    "gopher_words": (50, 100_000),
    "gopher_word_length": (3, 10),
    "gopher_hashes": (None, 0.1),
    "gopher_ellipses": (None, 0.1),
    "gopher_bullets": (None, 0.9),
    "gopher_cut_lines": (None, 0.3),
    "gopher_alphabetic": (0.8, None),
    "gopher_stop_words": (2, None),
    # the same, table A1
    "gopher_copied_lines": (None, 0.30),
    "gopher_copied_paragraphs": (None, 0.30),
    "gopher_copied_line_chars": (None, 0.20),
    "gopher_copied_paragraph_chars": (None, 0.20),
    **{f"gopher_top_{n}gram": (None, x) for n, x in {2: 0.20, 3: 0.18, 4: 0.16}.items()},
    **{
        f"gopher_repeated_{n}grams": (None, x)
        for n, x in {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}.items()
    },
    # Raffel et al. 2020, section 2.2; and c4_utils.py
    "c4_lorem": (None, 0),
    "c4_braces": (None, 0),
    "c4_sentences": (5, None),
    "c4_code_language_score": (0.99, None),
    "c4_code_length": (None, 190_000),
    "c4_code_lorem": (None, 0),
    "c4_code_braces": (None, 0),
    "c4_code_sentences": (3, None),
    # Penedo et al. 2024
    "fineweb_language_score": (0.65, None),
    "fineweb_lorem": (None, 0),
    "fineweb_braces": (None, 0),
    "fineweb_sentences": (5, None),
    "fineweb_ended_lines": (0.12, None),
    "fineweb_short_lines": (None, 0.67),
    "fineweb_copied_line_chars": (None, 0.01),
    "fineweb_newlines": (None, 0.3),
    # Penedo et al. 2023, appendix G.2
    "refinedweb_flagged_words": (None, 0.05),
}
OURS = ("zh_", "pareto_")
SETS = {name: rules.load([name])[0] for name in rules.names()}
ALL = [rule for one in SETS.values() for rule in one.rules]


def judged(text: str, *names: str, lang: str = "") -> tuple[str, set[str]]:
    """(the first rule a text breaks or "", all of them)."""
    table = Measure(signals.names())([Document("1", text, lang=lang)])
    found = rules.judge([r for one in rules.load(names) for r in one.rules], table)
    first = found.first[0]
    return (first.rule if first else ""), {name for name, n in found.broken.items() if n}


def test_limits_are_those_published() -> None:
    limits = {r.name: (r.at_least, r.at_most) for r in ALL if not r.one_of and not r.name.startswith(OURS)}
    assert limits == PUBLISHED
    assert {r.name: r.one_of for r in ALL if r.one_of} == dict.fromkeys(
        ["c4_code_language", "fineweb_language"], ("en",)
    )
    assert SETS["pareto"].rules[0].pareto == 9
    assert {n: s.lines for n, s in SETS.items() if s.lines} == {
        "c4": "c4_paper", "c4_code": "c4_code", "fineweb": "c4_any_end", "refinedweb": "refinedweb",
    }  # fmt: skip
    assert (
        lines.C4(3, ".?!\"'"),
        lines.C4(5, '.?!"'),
        1000,
    ) == (lines.C4_PAPER, lines.C4_CODE, lines.LONG_WORD)


def test_changed_rule_files_raise_the_version_of_the_stage() -> None:
    """The store's key knows the names of rule sets, not their contents: raise filter.VERSION with them."""
    state = hashlib.sha256()
    for path in sorted(rules.FOLDER.glob("*.toml")):
        state.update(path.name.encode() + path.read_bytes())
    pinned = (2, "1565ac2021cd7a09")
    assert (filter_stage.VERSION, state.hexdigest()[:16]) == pinned


@pytest.mark.parametrize("rule", ALL, ids=lambda r: r.name)
def test_every_rule_at_its_limit_and_beyond(rule: rules.Rule) -> None:
    known = {**signals.columns(), **dict.fromkeys(CLASSIFIED, "")}
    assert rule.signal in known and rule.why
    lang = rule.languages[0] if rule.languages else "en"
    if rule.one_of or rule.pareto:
        return
    for limit, beyond in ((rule.at_least, -np.inf), (rule.at_most, np.inf)):
        if limit is None:
            continue
        at = np.array([limit, np.nextafter(np.float32(limit), np.float32(beyond))], np.float32)
        table = {rule.signal: at, "lang": np.array([lang] * 2, object), "id": np.array(["a", "b"], object)}
        assert rule.breaks(table, 0).tolist() == [False, True]
        foreign = {
            **table,
            "lang": np.array([rule.skip_languages[0] if rule.skip_languages else "en"] * 2, object),
        }
        if rule.skip_languages or rule.languages:
            assert not rule.breaks(foreign, 0).any(), "not judged in languages the set leaves out"


def prose(words: int, width: int = 12) -> str:
    """Sentences in which no word comes twice but for two stop words at the head."""
    first, second, third = "bcdfghjklm", "aeiou", "npqrstvwxz"
    stems = [first[k % 10] + second[k // 10 % 5] + third[k // 50 % 10] + "e" for k in range(words)]
    rows = [stems[k : k + width] for k in range(0, words - 3, width)]
    return "the and to.\n" + "\n".join(" ".join(row) + "." for row in rows)


@pytest.mark.parametrize(
    ("kept", "removed", "rule"),
    [
        (" ".join(prose(50).split()[:50]), " ".join(prose(50).split()[:49]), "gopher_words"),
        (prose(60), "the of to be an " * 12, "gopher_word_length"),
        (prose(100) + " #" * 10, prose(100) + " #" * 11, "gopher_hashes"),
        (prose(100) + "\n" + "... " * 10 + "a", prose(100) + "\n" + "... " * 11 + "a", "gopher_ellipses"),
        (prose(93, 10).replace("\n", "\n- "), "- " + prose(93, 10).replace("\n", "\n- "), "gopher_bullets"),
        (prose(72) + " " + "1 " * 18, prose(72) + " " + "1 " * 19, "gopher_alphabetic"),
        (prose(60), prose(60).replace("the and to", "The and To"), "gopher_stop_words"),
    ],
)
def test_documents_on_either_side_of_gopher(kept: str, removed: str, rule: str) -> None:
    assert rule not in judged(kept, "gopher", lang="")[1], kept
    found = rules.judge(
        [r for r in SETS["gopher"].rules if r.name == rule],
        Measure(("gopher",))([Document("1", removed)]) | {"lang": np.array(["en"], object)},
    )
    assert found.first[0] is not None and found.first[0].rule == rule


def test_repetition_on_either_side() -> None:
    """Ten lines of which three, then four, are copies; and their characters."""
    rows = [f"line number {k} is quite another line {k * 7}" for k in range(10)]
    table = Measure(("repetition",))(
        [Document("1", "\n".join([*rows[:7], *rows[:3]])), Document("2", "\n".join([*rows[:6], *rows[:4]]))]
    ) | {"lang": np.array(["en"] * 2, object)}  # fmt: skip
    found = rules.judge([r for r in SETS["gopher"].rules if r.name == "gopher_copied_lines"], table)
    assert found.first[0] is None and found.first[1] is not None
    assert found.first[1].reason == "copied_lines is 0.4 (at most 0.3)"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("This one is fine. " * 5, ""),
        ("This one is fine. " * 4 + "and no end", "c4_sentences"),
        ("This one is fine. " * 5 + "\nAnd Lorem Ipsum here too.", "c4_lorem"),
        ("This one is fine. " * 5 + "\nlorem ipsum", ""),  # the line has gone before: too few words
        ("This one is fine. " * 5 + "\nHere is { a brace.", "c4_braces"),
        ("This one is fine. " * 5 + "\nSome javascript { in here.", ""),
    ],
)
def test_documents_on_either_side_of_c4(text: str, rule: str) -> None:
    table = Measure(("c4",))([Document("1", text.strip())]) | {"lang": np.array(["en"], object)}
    first = rules.judge(SETS["c4"].rules, table).first[0]
    assert (first.rule if first else "") == rule


def test_documents_on_either_side_of_fineweb() -> None:
    body = "Here is a sentence that has more than thirty letters in all."
    bare = body.rstrip(".")
    three = [r for r in SETS["fineweb"].rules if r.name == "fineweb_ended_lines"]
    for ended, broken in ((3, False), (2, True)):  # of 25 lines: 0.12, 0.08
        text = "\n".join([body] * ended + [f"{bare} {k}" for k in range(25 - ended)])
        table = Measure(("fineweb",))([Document("1", text)]) | {"lang": np.array(["en"], object)}
        assert bool(rules.judge(three, table).broken["fineweb_ended_lines"]) is broken


def test_order_counts_and_reasons() -> None:
    table = {
        "id": np.array(["a", "b", "c"], object),
        "lang": np.array(["en", "en", "en"], object),
        "words": np.array([1, 100, 5]),
        "lines": np.array([1, 9, 3]),
    }
    both = [
        rules.Rule(name="words", signal="words", at_least=10),
        rules.Rule(name="lines", signal="lines", more_than=1, less_than=9),
    ]
    found = rules.judge(both, table)
    assert [f.rule if f else "" for f in found.first] == ["words", "lines", "words"]
    assert found.broken == {"words": 2, "lines": 2} and found.alone == {"words": 1, "lines": 1}
    assert found.first[1].reason == "lines is 9 (more than 1, less than 9)"  # type: ignore[union-attr]


def test_what_is_not_known_is_not_judged() -> None:
    table = {
        "id": np.array(["a", "b"], object),
        "lang": np.array(["en", "en"], object),
        "bits_per_byte": np.array([np.nan, 9.0], np.float32),
    }
    rule = rules.Rule(name="odd", signal="bits_per_byte", at_most=3)
    assert rule.breaks(table, 0).tolist() == [False, True]
    draw = rules.Rule(name="draw", signal="bits_per_byte", pareto=9)
    assert not draw.breaks(table | {"bits_per_byte": np.full(2, np.nan, np.float32)}, 0).any()


def test_limits_can_be_changed_and_rules_left_out() -> None:
    (gopher,) = rules.changed(
        rules.load(["gopher"]), ["gopher_words.at_least=30", "gopher_words.at_most=9"], ["gopher_hashes"]
    )
    assert "gopher_hashes" not in [r.name for r in gopher.rules]
    assert (gopher.rules[0].at_least, gopher.rules[0].at_most) == (30, 9)
    for limits, off, said in (
        (["gopher_word.at_least=1"], [], "no rule is called `gopher_word`"),
        ([], ["gopher_word"], "no rule is called"),
        (["gopher_words=1"], [], "sets no limit"),
        (["gopher_words.why=1"], [], "sets no limit"),
        (["gopher_words.at_least=x"], [], "is not a number"),
        (["gopher_words.at_least=nan"], [], "is not a number"),
        (["gopher_words.pareto=-9"], [], "is not a number above 0"),
    ):
        with pytest.raises(UserError, match=said):
            rules.changed(rules.load(["gopher"]), limits, off)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = ", "cannot read the rules"),
        ("about = 'x'", "holds no"),
        ("rules = 1", "`rules` means nothing"),
        ("[[rule]]\nname = 'x'", "needs a signal"),
        ("[[rule]]\nname = 'x'\nsignal = 'words'", "has no limit"),
        ("[[rule]]\nname = 'x'\nsignal = 'words'\nat_least = '3'", "must be a number"),
        ("[[rule]]\nname = 'x'\nsignal = 'words'\natleast = 3", "`atleast` means nothing"),
    ],
)
def test_rule_files_with_mistakes(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        rules.load(["mine"], tmp_path)


def test_own_rules_and_names_that_clash(tmp_path: Path) -> None:
    mine = "[[rule]]\nname = '{}'\nsignal = 'words'\nat_least = 3\n"
    (tmp_path / "mine.toml").write_text(mine.format("few"))
    (tmp_path / "yours.toml").write_text(mine.format("few"))
    assert rules.load(["mine"], tmp_path / "mine.toml")[0].rules[0].name == "few"
    with pytest.raises(UserError, match="both mine and yours"):
        rules.load(["mine", "yours"], tmp_path)
    with pytest.raises(UserError, match="no rules called `gofer`"):
        rules.load(["gofer"])


def test_chinese_books_stay_and_planted_rubbish_goes(kit: Path) -> None:
    from caravan.data import clean

    books = []
    for path in sorted((kit / "pretrain" / "zh_books").glob("*.txt"))[:6]:
        text = clean.normalise(path.read_text(encoding="utf-8")[:60_000])
        books += [text[k : k + 3000] for k in range(0, len(text) - 3000, 3000)]
    rubbish = []
    for text in books:
        han = "".join(c for c in text if "\u4e00" <= c <= "\u9fff")
        rubbish.append(han[:600])  # no punctuation: a list of keywords
        rubbish.append((text[:60] + "。") * 20)  # one sentence over and over
        rubbish.append("\n".join(han[k : k + 4] for k in range(0, 400, 4)))  # a menu
        rubbish.append(
            "\n".join(text[k : k + 30] + "。" for k in range(0, 300, 30)) + "\n版权所有 转载请注明\n上一篇："
        )
    verdicts = []
    for texts in (books, rubbish):
        table = Measure(("chinese", "language"))([Document(str(k), t) for k, t in enumerate(texts)])
        verdicts.append(rules.judge(SETS["chinese"].rules, table).first)
    assert sum(v is not None for v in verdicts[0]) <= 0.01 * len(books)
    assert sum(v is not None for v in verdicts[1]) >= 0.97 * len(rubbish)

"""Pages with listed words go: what counts as a word, lists by language, the stage and its command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan import cli, stage
from caravan.data import badwords, records
from caravan.data.badwords import Words
from caravan.stages import corpus as corpus_stage
from caravan.stages import filter as filter_stage
from caravan.store import Store
from caravan.types import UserError

LIST = ["turnip", "sour milk", "c3po", "b@d", "🥦", "mother-in-law", "été"]
CHINESE = ["萝卜", "酸奶"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A turnip.", "turnip"),
        ("TURNIP", "turnip"),
        ("turnips and turnip_s", ""),
        ("(turnip)", "turnip"),
        ("Sour  milk,\nthen sour\nmilk", "sour milk"),
        ("sour, milk", ""),
        ("sourmilk", ""),
        ("he met C3PO twice", "c3po"),
        ("xc3po c3po1", ""),
        ("a b@d thing", "b@d"),
        ("ab@d b@de", ""),
        ("eat 🥦 now", "🥦"),
        ("Mother-in-law!", "mother-in-law"),
        ("l'ÉTÉ", "été"),
        ("étés", ""),
        ("他吃turnip了", "turnip"),
        ("a mother-in-law, a turnip", "mother-in-law"),
        ("", ""),
    ],
)
def test_a_listed_word_counts_where_it_stands_alone(text: str, said: str) -> None:
    assert Words(LIST).find(text) == said


def test_chinese_entries_count_anywhere() -> None:
    assert Words(CHINESE).find("他每天喝酸奶吃饭") == "酸奶"
    assert Words(CHINESE).find("他每天喝牛奶，萝 卜") == ""


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([*LIST, "Turnip", "x", "1", "_", " ", " ", "-", ".", "été", "the"]), max_size=9)
)
def test_as_the_published_code_asks(parts: list[str]) -> None:
    """(?:\\W|^)(a|b|...)(?:\\W|$) on the lower-cased page; spaces of a phrase as they are."""
    text = "".join(parts)
    published = re.compile(rf"(?:\W|^)({'|'.join(map(re.escape, LIST))})(?:\W|$)")
    assert bool(Words(LIST).find(text)) == bool(published.search(text.lower()))


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return path


def test_lists_by_language(tmp_path: Path) -> None:
    lists = badwords.read(
        folder(tmp_path / "a", en="turnip\n\nsour milk\n", zh_txt="萝卜\n", README_md="turnip is not nice")
    )
    assert {name: len(words) for name, words in lists.lists.items()} == {"en": 2, "zh": 1}
    assert lists.find("one turnip", "en") == "turnip" and lists.find("one turnip", "fr") == ""
    assert lists.find("吃萝卜", "zh") == "萝卜" and lists.find("吃萝卜", "ja") == ""
    one = badwords.read(folder(tmp_path / "b", mine_txt="turnip\nTurnip\n"))
    assert (
        one.lists[""].find("a turnip") and one.find("a turnip", "fr") == "turnip" and len(one.lists[""]) == 1
    )


def test_lists_with_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine\.txt is empty"):
        badwords.read(folder(tmp_path / "a", mine_txt="\n \n"))
    with pytest.raises(UserError, match="no file is named by a language: README"):
        badwords.read(folder(tmp_path / "b", README_md="x", USERS_md="y"))
    folder(tmp_path / "c")
    (tmp_path / "c" / "en").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="cannot read the list of words en"):
        badwords.read(tmp_path / "c")


GOOD = "This is a sentence of seven words. " * 5


def test_the_stage_drops_such_pages_by_the_lines_that_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {
        "clean": GOOD + "She is a nice one.",
        "said": GOOD + "She ate a Turnip then.",
        "menu": GOOD + "\nturnip recipes",  # a line that the filter takes out
        "short": "No turnip.",  # goes by an earlier rule
    }
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": k, "text": t}) for k, t in rows.items()))
    (tmp_path / "words.txt").write_text("turnip\n")
    store = Store(tmp_path / "store")
    cfg = corpus_stage.Config(near_duplicates=0, repetition=False, heldout_share=0, min_chars=1)
    made = stage.execute(store, "corpus", cfg, {"raw": store.add(tmp_path / "a.jsonl")})
    inputs = {"corpus": made, "bad_words": store.add(tmp_path / "words.txt")}
    art = stage.execute(store, "filter", filter_stage.Config(rules=("c4",)), inputs)
    assert {d.id for d in records.read_documents(art / "train.jsonl.zst")} == {"clean", "menu"}
    assert art.facts["removed"] == {"bad_words": 1, "c4_sentences": 1} and art.facts["bad_words"] == {
        "all": 1
    }
    removed = {r["id"]: r["reason"] for r in records.read_lines(art / "removed.jsonl.zst")}
    assert removed["said"] == "says `turnip`, which is on the list"
    plain = stage.execute(store, "filter", filter_stage.Config(rules=("c4",)), {"corpus": made})
    assert plain.facts["removed"] == {"c4_sentences": 1} and plain.facts["bad_words"] == {}
    monkeypatch.setenv("CARAVAN_STORE", str(tmp_path / "store"))
    words = ["--corpus", made.ref, "--rules", "c4", "--bad-words", str(tmp_path / "words.txt")]
    assert cli.main(["filter", *words]) == 0
    assert len(store.ls("corpus")) == 3, "the command asks the same question"

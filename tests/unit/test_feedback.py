"""Thumbs and choices become rankings, lone thumbs do not, and the loop back to training closes."""

from __future__ import annotations

from pathlib import Path

import pytest

from caravan.serve import collect, feedback
from caravan.serve.feedback import Answer, FeedbackStore, UnknownAnswer
from caravan.stage import Runtime
from caravan.store import Store
from caravan.types import Message, UserError

ASKED = (Message("system", "be brief"), Message("user", "12+29=?"))


def answered(store: FeedbackStore, id: str, text: str, prompt: tuple[Message, ...] = ASKED) -> str:
    store.remember(
        Answer(
            id=id, prompt=prompt, text=text, model="ppo", weights="0123456789abcdef", created=float(ord(id))
        )
    )
    return id


@pytest.fixture
def store() -> FeedbackStore:
    made = FeedbackStore("sqlite://")
    for id, text in zip("abcd", ("41", "40", "I do not know", "forty-one"), strict=True):
        answered(made, id, text)
    return made


def test_up_against_down_is_one_ranking(store: FeedbackStore) -> None:
    for id, vote in (("a", 1), ("b", -1), ("c", -1), ("d", 1)):
        store.vote(id, vote)
    found = store.collect()
    (ranking,) = found.rankings
    assert ranking.prompt == ASKED
    assert ranking.responses == ("41", "forty-one", "40", "I do not know") and ranking.ranks == (0, 0, 1, 1)
    assert found.counts["pairs"] == 4 and ranking.source == "feedback:ppo@0123456789ab"


def test_a_lone_thumb_is_counted_and_not_used(store: FeedbackStore) -> None:
    store.vote("a", 1)
    store.vote("d", 1)
    found = store.collect()
    assert not found.rankings and found.counts["votes_without_counterpart"] == 2
    answered(store, "e", "40", (Message("user", "another question"),))
    store.vote("e", -1)
    found = store.collect()
    assert not found.rankings, "answers to different prompts are no comparison"
    assert found.counts["votes_without_counterpart"] == 3


def test_the_last_vote_counts_and_can_be_taken_back(store: FeedbackStore) -> None:
    store.vote("a", -1)
    store.vote("b", -1)
    store.vote("a", 1)
    assert store.collect().rankings[0].responses == ("41", "40")
    store.vote("a", 0)
    found = store.collect()
    assert not found.rankings and found.counts["votes"] == 1


def test_a_choice_is_a_pair_and_the_later_one_holds(store: FeedbackStore) -> None:
    store.choose("b", "a")
    store.choose("a", "b")
    assert [r.responses for r in store.collect().rankings] == [("41", "40")]
    store.choose("a", "b", tie=True)
    found = store.collect()
    assert not found.rankings and found.counts["ties"] == 1


def test_a_choice_outweighs_thumbs_and_is_not_counted_twice(store: FeedbackStore) -> None:
    store.vote("a", 1)
    store.vote("b", -1)
    store.choose("a", "b")
    assert len(store.collect().rankings) == 1
    store.choose("b", "a")
    assert [r.responses for r in store.collect().rankings] == [("40", "41")]
    store.vote("c", -1)
    store.vote("d", 1)
    assert [r.responses for r in store.collect().rankings] == [("40", "41"), ("forty-one", "I do not know")]


def test_one_text_voted_both_ways_says_nothing(store: FeedbackStore) -> None:
    answered(store, "e", "41")
    store.vote("a", 1)
    store.vote("e", -1)
    found = store.collect()
    assert not found.rankings and found.counts["same_text_both_ways"] == 1
    store.choose("a", "e")
    assert not store.collect().rankings, "equal texts cannot be ranked"


def test_strangers_and_nonsense_are_refused(store: FeedbackStore) -> None:
    with pytest.raises(UnknownAnswer):
        store.vote("nobody", 1)
    with pytest.raises(ValueError, match="itself"):
        store.choose("a", "a")
    answered(store, "e", "x", (Message("user", "another"),))
    with pytest.raises(ValueError, match="different prompts"):
        store.choose("a", "e")
    assert store.collect().counts["answers"] == 0, "a refused choice leaves nothing behind"


def test_memory_is_bounded_and_what_was_voted_on_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "REMEMBERED_ANSWERS", 2)
    url = f"sqlite:///{tmp_path / 'f.db'}"
    store = FeedbackStore(url)
    answered(store, "a", "41")
    store.vote("a", 1)
    for id in "bcd":
        answered(store, id, id)
    store.vote("a", 0)
    with pytest.raises(UnknownAnswer):
        store.vote("b", 1)
    store.vote("d", -1)
    store.close()
    again = FeedbackStore(url)
    again.vote("a", 1)
    assert again.collect().rankings[0].responses == ("41", "d")
    again.close()


def test_a_database_that_cannot_be_opened_is_a_sentence() -> None:
    for url in ("sqlite:////proc/nowhere/f.db", "nonsense", "cobol://x"):
        with pytest.raises(UserError, match="feedback database"):
            FeedbackStore(url)


def test_feedback_becomes_a_preferences_artefact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    house = Store(tmp_path / "store")
    cfg = collect.Config(jsonl=str(tmp_path / "out.jsonl"))
    with pytest.raises(UserError, match="no feedback yet"):
        collect.main(cfg, house, Runtime())
    house.root.mkdir(parents=True, exist_ok=True)
    store = FeedbackStore(f"sqlite:///{house.root / 'feedback.db'}")
    answered(store, "a", "41")
    store.vote("a", 1)
    with pytest.raises(UserError, match="compared"):
        collect.main(cfg, house, Runtime())
    for id, text in zip("bcd", ("40", "42", "39"), strict=True):
        answered(store, id, text)
        store.vote(id, -1)
    for n in range(12):
        prompt = (Message("user", f"{n}+1=?"),)
        answered(store, chr(200 + 2 * n), str(n + 1), prompt)
        answered(store, chr(201 + 2 * n), str(n), prompt)
        store.choose(chr(200 + 2 * n), chr(201 + 2 * n))
    store.close()
    capsys.readouterr()
    assert collect.main(cfg, house, Runtime()) == 0
    said = capsys.readouterr()
    made = house.open(said.out.strip())
    assert made.kind == "preferences" and "13 rankings, 15 pairs" in said.err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 13
    assert made.facts.get("quarantined", 0) == 0
    assert collect.main(cfg, house, Runtime()) == 0
    assert house.open(capsys.readouterr().out.strip()).id == made.id, "the same feedback is the same artefact"

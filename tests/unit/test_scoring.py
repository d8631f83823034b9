"""Scoring rules against answers worked out by hand."""

import json
from pathlib import Path

import pytest

from caravan.evals.items import item_of, read_questions
from caravan.evals.tasks import arithmetic, exact_match, kl, multiple_choice
from caravan.types import UserError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("41", "41"),
        ("2+9=11, 1+2+1=4, 12+29=41", "41"),
        ("52-19=33", "33"),
        ("It is -7.", "-7"),
        ("5-12=-7", "-7"),
        ("1,234 apples", "1234"),
        ("1, 2, 3", "3"),
        ("答案是４１。", "41"),
        ("3.50", "3.5"),
        ("41 of course, 12", "12"),
        ("none", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    found = arithmetic.last_number(text)
    assert (found is None) == (number is None)
    assert number is None or float(found) == float(number)  # type: ignore[arg-type]


def test_a_fact_must_be_held_word_for_word() -> None:
    item = item_of({"question": "q", "answer": "Return the size.", "match": "contains"}, "f:1")
    right = exact_match.score(item, "len:  Return the\nsize. That is all")["exact_match"]
    assert right == 1.0
    for wrong in ("Return the sizes", "return the size.", "Return a size.", "the size"):
        # "Return the size" is also in "Return the sizes": the words must end where the answer's do
        assert exact_match.score(item, wrong)["exact_match"] == 0.0, wrong


def test_without_contains_the_whole_text_counts() -> None:
    item = item_of({"question": "q", "answer": "Paris", "reference": "It is Paris."}, "f:1")
    assert exact_match.score(item, " Paris. ")["exact_match"] == 1.0
    assert exact_match.score(item, "It is  Paris")["exact_match"] == 1.0
    assert exact_match.score(item, "Paris or London")["exact_match"] == 0.0
    assert exact_match.score(item_of({"question": "q", "answer": "对。"}, "f:2"), "对")["exact_match"] == 1.0


def test_choice_lengths_are_characters_or_bytes_and_ties_go_to_the_first() -> None:
    item = item_of({"question": "q", "choices": ["ab", "商队吗"], "answer": 1}, "f:1")
    # sums -4 and -5; per character -2 and -1.67; per byte -2 and -0.56
    assert multiple_choice.score(item, [-4.0, -5.0]) == {
        "multiple_choice": 0.0,
        "multiple_choice.acc_norm": 1.0,
        "multiple_choice.acc_bytes": 1.0,
    }
    # per character -1 and -1.4; per byte -1 and -0.47: the two norms disagree
    assert multiple_choice.score(item, [-2.0, -4.2])["multiple_choice.acc_norm"] == 0.0
    assert multiple_choice.score(item, [-2.0, -4.2])["multiple_choice.acc_bytes"] == 1.0
    tie = item_of({"question": "q", "choices": ["aa", "bb"], "answer": 1}, "f:2")
    assert set(multiple_choice.score(tie, [-1.0, -1.0]).values()) == {0.0}


def test_plain_context_puts_one_space_before_the_choice() -> None:
    prompt = multiple_choice.prompt(item_of({"context": "Sky is", "choices": ["blue"], "answer": "A"}, "f:1"))
    assert (prompt.context, prompt.continuations) == ("Sky is", (" blue",))


def test_kl_sums_over_the_answer() -> None:
    assert kl.score([-1.0, -2.0], [-1.5, -1.0], [0.1, 0.3]) == pytest.approx({"kl": 0.4, "kl.sampled": -0.5})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "expected an object"),
        ({"answer": "x"}, "needs `question`"),
        ({"question": "q"}, "`answer` is missing"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "index"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "index"),
        ({"question": "q", "choices": "ab", "answer": 0}, "list of texts"),
        ({"messages": [{"role": "user"}], "answer": "x"}, "role and content"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "x"}, "turn of the user"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(row: object, words: str) -> None:
    with pytest.raises(UserError, match="f:9") as caught:
        item_of(row, "f:9")  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_reading_keeps_good_rows_and_quarantines_bad_ones(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    good = {"id": "1", "question": "q", "answer": "a"}
    lines = [json.dumps(good), "{broken", "", json.dumps(good), json.dumps(good | {"id": "2"})]
    (tmp_path / "eval_x.jsonl").write_text("\n".join(lines))
    items, refused = read_questions(tmp_path)
    assert [item.id for item in items] == ["1", "2"]
    assert [(r["line"], r["file"]) for r in refused] == [(2, "eval_x.jsonl"), (4, "eval_x.jsonl")]
    assert "twice" in refused[1]["reason"]
    with pytest.raises(UserError, match=r"eval_x\.jsonl:2"):
        read_questions(tmp_path, strict=True)


def test_no_question_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no question"):
        read_questions(tmp_path)

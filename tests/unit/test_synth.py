"""What the quickstart learns from: clean facts, splits that do not leak, the same bytes every time."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from caravan.synth import arithmetic, persona, preferences, pydocs, qa
from caravan.synth.arithmetic import Sum, held_out, solve
from caravan.synth.facts import facts, summary_of
from caravan.synth.seeds import Sizes, write_quickstart

SMALL = Sizes(
    text_bytes=200_000, per_fact=6, arithmetic=300, unknown=20, mixed=60, heldout_chats=40, preferences=200,
    heldout_preferences=60, prompts=100, eval_facts=50, eval_arithmetic=30,
)  # fmt: skip


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    write_quickstart(folder, sizes=SMALL)
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_in(text: str) -> set[tuple[int, int]]:
    """Every two numbers with an operator between them, in digits, words or Chinese."""
    found = re.findall(r"(?<!\d)(\d+)(?= ?(?:\+|-|plus|minus|加|减) ?(\d+))", text)
    return {(int(a), int(b)) for a, b in found}


def test_facts_are_short_unique_plain_and_hold_the_demo() -> None:
    found = facts()
    assert 300 <= len(found) <= 450
    assert len({f.name for f in found}) == len({f.summary for f in found}) == len(found)
    assert all(f.summary.isascii() and f.summary.endswith(".") and len(f.summary) <= 90 for f in found)
    assert all("\n" not in f.summary and "->" not in f.summary for f in found)
    demo = next(f for f in found if f.name == "textwrap.dedent")
    assert "leading whitespace from every line" in demo.summary
    assert {"os.path", "math", "json", "str", "list", "random", "re"} <= {f.module for f in found}


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        (
            "dedent(x) -> str\n\nRemove ``leading`` space\nfrom lines. More.",
            "Remove leading space from lines.",
        ),
        ("Return x, e.g. 3, to you.", "Return x, e.g. 3, to you."),
        ("Too short.", None),
        ("lower case start of a sentence.", None),
        ("Uses naïve characters all over.", None),
        ("Reverse *IN PLACE* of base**exp.", "Reverse IN PLACE of base**exp."),
    ],
)
def test_summary_is_the_first_sentence_without_markup(doc: str, summary: str | None) -> None:
    assert summary_of(doc) == summary


def test_phrasings_are_many_and_divided() -> None:
    assert len(set(qa.TRAIN_EN)) >= 24 and len(set(qa.TRAIN_ZH)) >= 12
    assert len(set(qa.HELD_OUT_EN)) >= 6 and len(set(qa.HELD_OUT_ZH)) >= 3

    def plain(template: str) -> str:
        return re.sub(r"[\W_]+", " ", template.replace("()", "")).strip().casefold()

    trained = {plain(t) for t in (*qa.TRAIN_EN, *qa.TRAIN_ZH)}
    assert not trained & {plain(t) for t in (*qa.HELD_OUT_EN, *qa.HELD_OUT_ZH)}
    assert qa.TRAIN_EN[0] == "What does {name} do?"


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Sum(12, "+", 29), "12+29: 2+9=11, 1+2+1=4 → 41"),
        (Sum(52, "-", 19), "52-19: 12-9=3, 5-1-1=3 → 33"),
        (Sum(3, "+", 4), "3+4=7"),
        (Sum(95, "+", 7), "95+7: 5+7=12, 9+0+1=10 → 102"),
        (Sum(100, "-", 1), "100-1: 10-1=9, 10-0-1=9, 1-0-1=0 → 99"),
    ],
)
def test_column_work_by_hand(problem: Sum, text: str) -> None:
    assert solve(problem) == text
    assert solve(problem, "direct") == str(problem.result)


def test_every_column_of_the_work_is_true_and_the_last_number_is_the_result() -> None:
    rng = random.Random(0)
    for split in ("train", "heldout"):
        for _ in range(500):
            problem = arithmetic.draw(rng, split=split, three_digit_share=0.2)
            text = solve(problem)
            assert text.startswith(f"{problem.a}{problem.op}{problem.b}")
            for column in text.split(": ")[-1].split(" → ")[0].split(", "):
                left, right = column.split("=")
                assert eval(left) == int(right), text
            assert int(re.findall(r"\d+", text)[-1]) == problem.result


def test_a_tenth_of_the_pairs_is_held_out_in_either_order() -> None:
    table = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    share = sum(held_out(a, b) for a, b in table) / len(table)
    assert 0.08 < share < 0.12
    assert all(held_out(a, b) == held_out(b, a) for a, b in table)
    assert not any(held_out(a, b) for a in range(20) for b in range(10))


def test_nothing_trained_shows_a_held_out_pair_or_phrasing(seeds: Path) -> None:
    asked = {row["question"] for path in seeds.glob("eval_*.jsonl") for row in rows(path)}
    trained = [
        m["content"]
        for row in rows(seeds / "chats.jsonl")
        if row["split"] == "train"
        for m in row["messages"]
    ]
    trained += [m["content"] for row in rows(seeds / "prompts.jsonl") for m in row["messages"]]
    for row in rows(seeds / "preferences.jsonl"):
        if row["split"] == "train":
            trained += [row["prompt"][0]["content"], *row["responses"]]
    for kind in ("arithmetic", "dialogue"):
        trained += [row["text"] for row in rows(seeds / "text" / f"{kind}.jsonl")]
    assert not asked & set(trained)
    seen = set().union(*map(pairs_in, trained))
    assert len(seen) > 500
    assert not [pair for pair in seen if held_out(*pair)]
    talk = {m.content for c in persona.conversations("heldout") for m in c.messages if m.role == "user"}
    assert not talk & set(trained)


def test_evaluation_asks_only_held_out_questions_about_taught_facts(seeds: Path) -> None:
    taught = {
        m["content"].removeprefix(qa.LEAD_ZH)
        for row in rows(seeds / "chats.jsonl") if row["split"] == "train"
        for m in row["messages"] if m["role"] == "assistant"
    }  # fmt: skip
    for row in rows(seeds / "eval_facts.jsonl"):
        assert row["reference"].removeprefix(qa.LEAD_ZH) in taught
        assert row["answer"] in row["reference"]
    for row in rows(seeds / "eval_arithmetic.jsonl"):
        a, b, *_ = map(int, re.findall(r"\d+", row["question"]))
        assert held_out(a, b)


def test_rankings_are_ordered_and_length_gives_nothing_away(seeds: Path) -> None:
    train = preferences.rankings(1500, facts(), seed=3)
    assert len({ranking.prompt for ranking in train}) == len(train)
    longer = total = 0.0
    for ranking in train:
        assert 2 <= len(ranking.responses) == len(set(ranking.responses)) <= 4
        assert ranking.ranks.count(0) == 1 and set(ranking.ranks) == set(range(max(ranking.ranks) + 1))
        for pair in ranking.pairs():
            if pair.chosen == ranking.responses[ranking.ranks.index(0)]:
                total += 1
                difference = len(pair.chosen) - len(pair.rejected)
                longer += 0.5 if difference == 0 else float(difference > 0)
    assert 0.42 < longer / total < 0.58
    split = {"train": set(), "heldout": set()}
    for row in rows(seeds / "preferences.jsonl"):
        split[row["split"]].add(row["prompt"][0]["content"])
    assert split["heldout"] and not split["train"] & split["heldout"]


def test_text_respects_its_limit_and_shares_and_ids_are_unique() -> None:
    found = list(pydocs.documents(limit_bytes=300_000))
    assert {d.source for d in found} == set(pydocs.KINDS)
    assert len({d.id for d in found}) == len(found)
    assert sum(len(d.text.encode()) for d in found) < 330_000


def test_fewer_facts_and_another_style_reach_the_text_too(tmp_path: Path) -> None:
    write_quickstart(tmp_path, sizes=replace(SMALL, facts=150, style="direct"))
    known = [f.name for f in facts()[:150]]
    lines = [line for row in rows(tmp_path / "text" / "facts.jsonl") for line in row["text"].splitlines()]
    assert {line.split(": ")[0] for line in lines if ": " in line} == set(known)
    sums = [row["text"] for row in rows(tmp_path / "text" / "arithmetic.jsonl")]
    assert sums and not any(", " in text for text in sums)


def test_same_seed_same_bytes_in_another_process(seeds: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from caravan.synth.seeds import *;"
        f"write_quickstart(Path(sys.argv[1]), sizes={SMALL!r})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"})
    names = sorted(str(p.relative_to(seeds)) for p in seeds.rglob("*.jsonl"))
    assert names == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jsonl"))
    for name in names:
        assert (seeds / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_conversations_are_in_turns_and_mixed_ones_have_several(seeds: Path) -> None:
    found = rows(seeds / "chats.jsonl")
    for row in found:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"].strip() for m in row["messages"])
    assert all(len(row["messages"]) >= 4 for row in found if row["source"] == "mixed")
    assert len({row["id"] for row in found}) == len(found)

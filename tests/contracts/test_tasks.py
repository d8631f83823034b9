"""Every file in evals/tasks keeps the contract of its KIND."""

import math
from typing import Any

import pytest

from caravan import stage
from caravan.evals.items import item_of
from caravan.evals.runner import RUN

TASKS = {name: stage.load("evals/tasks", name) for name in stage.names("evals/tasks")}
BY_KIND = {kind: [name for name, task in TASKS.items() if kind == task.KIND] for kind in RUN}


@pytest.mark.parametrize("name", TASKS)
def test_has_a_known_kind_a_version_and_a_docstring(name: str) -> None:
    task = TASKS[name]
    assert task.KIND in RUN and task.VERSION >= 1 and task.__doc__
    assert callable(task.score)


def examples(task: Any) -> list:
    return task.load([item_of(row, f"example:{n}") for n, row in enumerate(task.EXAMPLES)])


@pytest.mark.parametrize("name", BY_KIND["generate"])
def test_reference_answer_scores_one_and_the_empty_answer_zero(name: str) -> None:
    task = TASKS[name]
    items = examples(task)
    assert len(items) == len(task.EXAMPLES) and task.MAX_TOKENS > 0
    for item in items:
        assert item.reference and task.prompt(item) == item.messages
        assert set(task.score(item, item.reference).values()) == {1.0}
        assert set(task.score(item, item.answer).values()) == {1.0}
        assert set(task.score(item, "").values()) == {0.0}
        assert set(task.score(item, "I do not know.").values()) == {0.0}


@pytest.mark.parametrize("name", BY_KIND["choices"])
def test_sure_of_the_right_choice_scores_one_and_nothing_answered_zero(name: str) -> None:
    task = TASKS[name]
    items = examples(task)
    assert len(items) == len(task.EXAMPLES)
    for item in items:
        assert len(task.prompt(item).continuations) == len(item.choices)
        sure = [0.0 if c == item.gold else -1e4 for c in range(len(item.choices))]
        assert set(task.score(item, sure).values()) == {1.0}
        assert set(task.score(item, []).values()) == {0.0}
        wrong = [0.0 if c != item.gold else -1e4 for c in range(len(item.choices))]
        assert set(task.score(item, wrong).values()) == {0.0}


@pytest.mark.parametrize("name", BY_KIND["text"])
def test_certainty_costs_no_bits_and_a_guess_among_256_eight(name: str) -> None:
    task = TASKS[name]
    text = task.Text("t", (1, 2, 3, 4), 3)
    assert task.score(text, 0.0) == (0.0, 3.0)
    bits, size = task.score(text, 3 * math.log(256))
    assert bits / size == pytest.approx(8.0)


@pytest.mark.parametrize("name", BY_KIND["reward"])
def test_a_better_reward_scores_higher(name: str) -> None:
    score = TASKS[name].score
    assert score(0.0) == dict.fromkeys(score(1.0), 0.0)
    assert all(score(1.0)[metric] > score(-1.0)[metric] for metric in score(1.0))


@pytest.mark.parametrize("name", BY_KIND["compare"])
def test_no_distance_to_oneself(name: str) -> None:
    score = TASKS[name].score
    assert set(score([-1.0, -2.0], [-1.0, -2.0], [0.0, 0.0]).values()) == {0.0}
    assert all(v > 0 for v in score([-1.0, -2.0], [-3.0, -2.5], [0.2, 0.1]).values())


def test_all_kinds_have_a_task() -> None:
    assert all(BY_KIND.values())

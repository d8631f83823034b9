"""Batches through steps: order, named verdicts, several processes, and one that dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from caravan.data import steps
from caravan.data.clean import Rejection
from caravan.data.steps import Item
from caravan.types import Document, UserError


class Short:
    name = "short"

    def __call__(self, items: Sequence[Item]) -> list[Rejection | None]:
        return [Rejection("short", "few") if len(i.document.text) < 3 else None for i in items]


class Upper:
    name = "upper"

    def __call__(self, items: Sequence[Item]) -> list[Rejection | None]:
        for item in items:
            assert len(item.document.text) >= 3, "what went before is not seen again"
            item.found["upper"] = item.document.text.upper()
        return [Rejection("shout", "loud") if i.document.text.isupper() else None for i in items]


def test_steps_see_what_is_left_and_answers_keep_their_order() -> None:
    items = [Item(Document(str(k), text)) for k, text in enumerate(["ab", "abcd", "LOUD", "x", "wxyz"])]
    out = steps.Steps((Short(), Upper()))(items)
    assert [i.document.id for i, _ in out] == ["0", "1", "2", "3", "4"]
    assert [v.rule if v else "" for _, v in out] == ["short", "", "shout", "short", ""]
    assert out[1][0].found["upper"] == "ABCD"


def test_batches_depend_on_the_items_alone() -> None:
    sizes = [len(b) for b in steps.batches(["x" * 400] * 10, len, most=1000)]
    assert sizes == [3, 3, 3, 1]
    assert list(steps.batches([], len)) == []


def square(batch: list[int]) -> list[int]:
    return [x * x for x in batch]


def die_once(batch: list[str]) -> str:
    """Kill this process the first time the middle batch is seen."""
    flag = Path(batch[0])
    if flag.name == "3" and not flag.exists():
        flag.touch()
        os._exit(9)
    return flag.name


def die(batch: list[int]) -> int:
    os._exit(9)


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    work = [[k, k + 1] for k in range(12)]
    assert (
        list(steps.mapped(square, work, 3))
        == list(steps.mapped(square, work, 1))
        == [square(b) for b in work]
    )
    assert list(steps.mapped(square, work[:1], 3)) == [[0, 1]]
    assert list(steps.mapped(square, [], 3)) == []


def test_a_process_that_dies_is_replaced(tmp_path: Path) -> None:
    work = [[str(tmp_path / str(k))] for k in range(6)]
    assert list(steps.mapped(die_once, work, 2)) == ["0", "1", "2", "3", "4", "5"]
    with pytest.raises(UserError, match="died 3 times"):
        list(steps.mapped(die, [[1], [2]], 2))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = f"""
import os, pathlib, time
from caravan.data import steps

def work(batch):
    pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()
    time.sleep(60)

if __name__ == "__main__":
    list(steps.mapped(work, [[1], [2], [3]], 2))
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    until = time.monotonic() + 60
    while not (pids := [int(p.name) for p in tmp_path.iterdir()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert pids, "no worker started"
    parent.kill()
    parent.wait()
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_errors_of_a_worker_arrive() -> None:
    with pytest.raises(TypeError):
        list(steps.mapped(square, [["a"], ["b"]], 2))  # type: ignore[list-item]


def test_only_so_many_batches_are_on_their_way() -> None:
    """With 2 processes, at most five batches are read before the first answer has been taken."""
    read: list[int] = []

    def reader() -> list[int]:
        for k in range(30):
            read.append(k)
            yield [k]  # type: ignore[misc]

    answers = steps.mapped(square, reader(), 2)  # type: ignore[arg-type]
    assert next(answers) == [0] and len(read) <= 5
    answers.close()  # type: ignore[attr-defined]


def test_workers() -> None:
    assert steps.workers(3) == 3 and steps.workers(None) >= 1

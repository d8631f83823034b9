"""The stage protocol: a question is answered once, an interrupted one goes on, accidents leave nothing."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import counting

from caravan import config, progress, stage
from caravan.store import Artefact, Store
from caravan.types import UserError

NAME = "tiny.counting"
LINES = "to be or not to be\nthat is the question\nwhether tis nobler\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return fresh(tmp_path / "store")


def fresh(root: Path) -> Store:
    (root.parent / "lines.txt").write_text(LINES)
    return Store(root)


def count(store: Store, **settings: Any) -> Artefact:
    raw = store.add(store.root.parent / "lines.txt")
    return stage.execute(store, NAME, counting.Config(**settings), {"raw": raw})


def child(store: Store, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same stage in a process of its own."""
    code = f"""
from tiny import counting
from caravan import stage
from caravan.store import Store
store = Store({str(store.root)!r})
raw = store.add({str(store.root.parent / "lines.txt")!r})
print(stage.execute(store, {NAME!r}, counting.Config(), {{"raw": raw}}).id)
"""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_the_same_question_runs_once(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COUNTING_LOG", str(tmp_path / "log"))
    first = count(store)
    assert count(store).path == first.path
    assert (tmp_path / "log").read_text() == "from 0\n"
    assert first.facts == {"letters": 15, "alpha": 0.25}
    assert not list(store.root.glob("runs/*")) and not list(store.root.glob("locks/*")), (
        "nothing stays behind"
    )


def test_settings_and_inputs_make_different_questions(store: Store) -> None:
    keys = {count(store).manifest["key"], count(store, steps=7).manifest["key"]}
    (store.root.parent / "lines.txt").write_text("else\n")
    keys.add(count(store).manifest["key"])
    assert len(keys) == 3


@pytest.mark.parametrize("step", ["3", "12", "20"])
def test_killed_and_run_again_gives_the_undisturbed_id(store: Store, tmp_path: Path, step: str) -> None:
    straight = count(store).id
    (tmp_path / "other").mkdir()
    other = fresh(tmp_path / "other" / "store")
    log = str(tmp_path / "log")
    killed = child(other, COUNTING_DIES_AT=step, COUNTING_LOG=log)
    assert killed.returncode == -signal.SIGKILL
    assert not other.ls("corpus")
    again = child(other, COUNTING_LOG=log)
    assert again.stdout.strip() == straight, again.stderr
    assert Path(log).read_text().split("\n")[:2] == ["from 0", f"from {int(step) // 5 * 5}"]
    (art,) = other.ls("corpus")
    assert art.manifest["attempts"] == 2 and sorted(art.manifest["files"]) == ["counts.json", "metrics.jsonl"]


def test_twelve_jobs_in_four_processes_make_one_artefact(store: Store, tmp_path: Path) -> None:
    environment = {"COUNTING_LOG": str(tmp_path / "log"), "COUNTING_SLEEPS": "0.01"}
    with multiprocessing.get_context("spawn").Pool(
        4, _prepare, (str(Path(__file__).parent), environment)
    ) as pool:
        ids = pool.map(_job, [str(store.root)] * 12)
    assert len(set(ids)) == 1
    assert (tmp_path / "log").read_text() == "from 0\n"
    assert len(store.ls("corpus")) == len(store.ls("raw")) == 1


def _prepare(path: str, environment: Mapping[str, str]) -> None:
    sys.path.insert(0, path)
    os.environ.update(environment)


def _job(root: str) -> str:
    return count(Store(root)).id


@pytest.mark.parametrize("together", [True, False])
def test_two_ranks_give_one_answer(together: bool, store: Store, tmp_path: Path) -> None:
    """Run by both where the stage says that it can be, and by the first alone otherwise."""
    store.add(store.root.parent / "lines.txt")
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_stage; print(test_stage._job(sys.argv[1]))"
    )
    here = str(Path(__file__).parent)
    log = tmp_path / "log"
    ranks = []
    for rank in ("1", "0"):
        env = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": "1", "COUNTING_LOG": str(log)}
        env |= {"COUNTING_SLEEPS": "0.02", "PYTHONPATH": str(Path(here).parents[1])}
        env |= {"COUNTING_TOGETHER": "yes"} if together else {}
        words = [sys.executable, "-c", code, str(store.root), here]
        ranks.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    answers = {process.communicate(timeout=180)[0] for process in ranks}
    assert len(answers) == 1 and answers != {""}
    assert len(log.read_text().splitlines()) == (2 if together else 1)
    (art,) = store.ls("corpus")
    assert art.manifest["ranks"] == 2 and not list(store.root.glob("runs/*"))


def test_a_stage_whose_ranks_join_a_group_says_so() -> None:
    for path in sorted((stage.PACKAGE / "stages").glob("[a-z]*.py")):
        joins = "runtime.setup(" in path.read_text(encoding="utf-8")
        assert (stage.literal(path, "RANKS") is True) == joins, path.name


def test_a_full_disk_leaves_nothing_and_the_checkpoint(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTING_FAILS", "full")
    with pytest.raises(UserError, match=r"disk is full while running tiny.counting .*counts\.json"):
        count(store)
    (run,) = store.root.glob("runs/*")
    assert not (run / "out").exists() and (run / "state.json").exists() and not store.ls("corpus")
    monkeypatch.delenv("COUNTING_FAILS")
    assert count(store).manifest["attempts"] == 2


def test_a_disk_that_is_full_before_the_stage_begins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(work: Path) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(work / "attempts"))

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_count_attempt", full)
        with pytest.raises(UserError, match=r"disk is full while running tiny.counting"):
            count(store)
    assert not store.ls("corpus") and count(store).manifest["attempts"] == 1


def test_a_bug_in_a_stage_stays_a_bug(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTING_FAILS", "bug")
    with pytest.raises(KeyError, match="honest mistake"):
        count(store)


def test_the_manifest_says_where_it_came_from(store: Store) -> None:
    art = count(store, steps=7)
    m = art.manifest
    assert (m["stage"], m["version"], m["kind"]) == (NAME, 1, "corpus")
    assert m["asked"]["config"] == {"steps": 7}
    assert m["config"] == config.to_dict(counting.Config(steps=7))
    assert list(m["inputs"]) == ["raw"] and m["inputs"]["raw"].startswith("raw/")
    assert "peak_memory_children_bytes" not in m, "this stage has no children"
    assert m["seconds"] >= 0 and m["peak_memory_bytes"] > 1e6 and m["attempts"] == m["ranks"] == 1
    assert (
        m["caravan"]["version"]
        and m["libraries"]["torch"]
        and m["machine"]["cores"]
        and m["machine"]["python"]
    )
    assert m["runtime"]["device"] == "auto" and m["published"].startswith("20")
    assert set(m["files"]["counts.json"]) == {"size", "sha256"}
    assert not store.verify(art)
    assert list(m["facts"]) == ["letters", "alpha"], "the stage's order: telling ones first"


def test_no_clock_enters_the_files(store: Store, tmp_path: Path) -> None:
    art = count(store)
    assert json.loads((art / "metrics.jsonl").read_text()) == {"step": 20, "loss": 1.5}
    assert (art / "timing.jsonl").exists() and "timing.jsonl" not in art.manifest["files"]


@dataclass(frozen=True, kw_only=True)
class Grown(counting.Config):
    added: int = 3
    """A setting of a later version."""


@dataclass(frozen=True, kw_only=True)
class Shifted(counting.Config):
    steps: int = 7
    """The same setting with another default."""


def test_a_new_setting_at_its_default_changes_no_key(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = count(store)
    raw = {"raw": store.open(before.inputs["raw"])}
    assert stage.ask(NAME, Grown(), raw).key == before.manifest["key"]
    assert stage.execute(store, NAME, Grown(), raw).path == before.path
    assert stage.ask(NAME, Grown(added=4), raw).key != before.manifest["key"]


def test_a_changed_default_is_a_new_question(store: Store) -> None:
    before = count(store)
    raw = {"raw": store.open(before.inputs["raw"])}
    after = stage.execute(store, NAME, Shifted(), raw)
    assert after.id != before.id
    assert after.manifest["config"]["steps"] == 7
    assert stage.execute(store, NAME, Shifted(), raw).path == after.path, "and is answered once as well"
    assert count(store).path == before.path, "while the old one is still answered"
    assert not store.verify(after)


@pytest.mark.parametrize("attribute", ["VERSION", "OUTPUT"])
def test_a_raised_version_is_a_new_question(
    store: Store, monkeypatch: pytest.MonkeyPatch, attribute: str
) -> None:
    before = count(store)
    monkeypatch.setattr(counting, attribute, {"VERSION": 2, "OUTPUT": "shards"}[attribute])
    after = count(store)
    if attribute == "VERSION":
        assert len(list(store.root.glob("keys/*"))) == 3, "two questions and the raw file"
        assert after.path == before.path, "equal bytes stay the same input for what comes after"


def test_the_version_of_a_chosen_module_counts(store: Store, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    module = tmp_path / "mine" / "reader.py"
    monkeypatch.syspath_prepend(str(tmp_path))

    @dataclass(frozen=True, kw_only=True)
    class Config:
        format: Any = "mine.reader"

    monkeypatch.setattr(counting, "Config", Config)
    monkeypatch.setattr(counting, "USES", {"format": "data/formats"})
    raw = {"raw": store.add(tmp_path / "lines.txt")}
    keys = []
    for version in (1, 2):
        module.write_text(f'"""A reader."""\nVERSION = {version}\n')
        keys.append(stage.ask(NAME, Config(), raw).key)
    monkeypatch.setattr(counting, "USES", {})
    assert stage.ask(NAME, Config(), raw).key == keys[0] != keys[1], "version 1 is where all start"
    module.write_text("")
    monkeypatch.setattr(counting, "USES", {"format": "data/formats"})
    with pytest.raises(UserError, match="has no VERSION"):
        stage.ask(NAME, Config(), raw)
    with pytest.raises(UserError, match="there is no `nothing` in data/formats"):
        stage.ask(NAME, Config(format="nothing"), raw)
    module.write_text("VERSION = 3")
    assert stage.ask(NAME, Config(format=("mine.reader",)), raw).uses == {"format": {"mine.reader": 3}}
    assert stage.ask(NAME, Config(format=()), raw).uses == {"format": {}}


def test_inputs_are_checked(store: Store) -> None:
    raw = store.add(store.root.parent / "lines.txt")
    corpus = count(store)
    cfg = counting.Config()
    for inputs, words in (
        ({}, r"needs `raw`: an artefact of kind raw"),
        ({"raw": corpus}, r"needs a raw as `raw`, and corpus/\w+ is not one"),
        ({"raw": raw, "exta": raw}, "takes no `exta`"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            stage.execute(store, NAME, cfg, inputs)
        assert refused.value.hint
    plain = stage.execute(store, NAME, cfg, {"raw": raw, "extra": None})
    assert plain.path == corpus.path, "an absent optional role is no part of the question"
    more = stage.execute(store, NAME, cfg, {"raw": raw, "extra": corpus})
    assert more.path == corpus.path and len(list(store.root.glob("keys/*"))) == 3, (
        "equal bytes, another question"
    )


def test_modules_are_found_and_near_misses_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stage, "PACKAGE", tmp_path)
    (tmp_path / "algos" / "rl").mkdir(parents=True)
    for name in ("ppo", "rloo", "_shared", "__init__"):
        (tmp_path / "algos" / "rl" / f"{name}.py").write_text('"""One line.\n\nMore."""\nVERSION: int = 4\n')
    assert stage.names("algos/rl") == ["ppo", "rloo"]
    path = stage.source("algos/rl", "ppo")
    assert stage.summary(path) == "One line." and stage.literal(path, "VERSION") == 4
    assert stage.literal(path, "ABSENT") is None
    with pytest.raises(UserError) as refused:
        stage.load("algos/rl", "pop")
    assert refused.value.hint == "did you mean `ppo`?"
    with pytest.raises(UserError, match=r"no module `nowhere\.at\.all`"):
        stage.load("stages", "nowhere.at.all")


def test_facts_become_plain_json() -> None:
    numpy = pytest.importorskip("numpy")
    facts = {
        "a": numpy.float32(0.5),
        "b": (1, 2),
        "c": float("nan"),
        "d": float("-inf"),
        "e": Path("x"),
        3: None,
    }
    plain = {"a": 0.5, "b": [1, 2], "c": "nan", "d": "-inf", "e": "x", "3": None}
    assert stage._json(facts) == plain


def test_progress_is_shown_and_an_interruption_says_where_the_work_is(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {"raw": store.add(store.root.parent / "lines.txt")}
    rt = replace(stage.Runtime(), threads=1)
    monkeypatch.setenv("COUNTING_FAILS", "interrupted")
    with pytest.raises(KeyboardInterrupt, match=r"checkpoints in .*runs/tiny\.counting-"):
        progress.execute(store, NAME, counting.Config(), raw, rt)
    monkeypatch.delenv("COUNTING_FAILS")
    art = progress.execute(store, NAME, counting.Config(), raw, rt)
    assert progress.execute(store, NAME, counting.Config(), raw, rt).path == art.path
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"✓ {NAME} {art.ref}  letters 15  alpha 0.250") or art.ref in first
    assert second.endswith("from the store")
    assert art.manifest["runtime"]["threads"] == 1

"""What the store promises: content decides, publishing is all or nothing, nothing is taken on trust."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caravan import disk
from caravan.artefact import content_id
from caravan.store import Artefact, Store, digest
from caravan.types import UserError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def make(
    store: Store, text: str, kind: str = "corpus", question: object = None, **inputs: Artefact
) -> Artefact:
    """Publish one small file as the answer to `question`."""
    refs = {role: f"{art.kind}/{art.id}" for role, art in inputs.items()}
    asked = {"stage": "test", "question": question if question is not None else text, "inputs": refs}
    with store.work("test", digest(asked)) as work:
        (work / "out" / "text").write_text(text)
        record = {"stage": "test", "version": 1, "config": {}, "inputs": refs, "facts": {"size": len(text)}}
        return store.publish(work, kind=kind, asked=asked, record=record)


def test_the_same_content_is_the_same_artefact(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = store.add(tmp_path / "a.txt")
    assert store.add(str(tmp_path / "a.txt")).path == first.path
    (tmp_path / "a.txt").write_text("two")
    assert store.add(tmp_path / "a.txt").id != first.id
    assert (first / "a.txt").read_text() == "one"


def test_equal_answers_to_different_questions_share_one_artefact(store: Store) -> None:
    first, second = make(store, "same", question=1), make(store, "same", question=2)
    assert first.path == second.path
    assert len(store.ls("corpus")) == 1
    assert not store.verify(second)
    for question in (1, 2):
        found = store.find(digest({"stage": "test", "question": question, "inputs": {}}))
        assert found is not None and found.id == first.id


def test_add_takes_the_id_of_what_it_copied(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("before")
    copyfile = shutil.copyfile

    def edited_meanwhile(a: Path, b: Path) -> None:
        source.write_text("after")
        copyfile(a, b)

    monkeypatch.setattr(shutil, "copyfile", edited_meanwhile)
    art = store.add(source)
    assert (art / "a.txt").read_text() == "after"
    assert art.manifest["asked"]["files"] == {"a.txt": art.manifest["files"]["a.txt"]["sha256"]}
    assert not store.verify(art)
    assert Store(tmp_path / "other").add(source).id == art.id


def test_hidden_files_stay_outside_and_folders_keep_their_shape(store: Store, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "sub").mkdir(parents=True)
    (raw / ".git").mkdir()
    for name in ("sub/b.txt", "a.txt", ".hidden", ".git/config"):
        (raw / name).write_text(name)
    (raw / "link.txt").symlink_to(raw / "a.txt")
    art = store.add(raw)
    assert sorted(art.manifest["files"]) == ["a.txt", "link.txt", "sub/b.txt"]
    assert not (art / "link.txt").is_symlink()


@pytest.mark.parametrize(
    ("files", "kind", "words"),
    [
        ({}, "raw", "holds no files"),
        ({"manifest.json": "{}"}, "raw", "a name the store needs"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "model", "pickles only"),
        ({"config.json": "{}"}, "model", "no *.safetensors"),
        ({"model.safetensors": "x"}, "model", "no config.json"),
        ({"config.json": "{}"}, "tokenizer", "no tokenizer.json"),
    ],
)
def test_unfit_folders_are_refused_with_a_hint(
    store: Store, tmp_path: Path, files: dict[str, str], kind: str, words: str
) -> None:
    (tmp_path / "given").mkdir()
    for name, text in files.items():
        (tmp_path / "given" / name).write_text(text)
    with pytest.raises(UserError, match=words.replace("*", r"\*")) as refused:
        store.add(tmp_path / "given", kind=kind)
    assert refused.value.hint
    assert not store.ls()


def test_a_missing_path_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file or folder .*nowhere"):
        store.add(tmp_path / "nowhere")


def test_an_unreadable_file_is_named(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("secret")

    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("caravan.store.file_digest", denied)  # root may read everything; so it is played
    with pytest.raises(UserError, match=r"no permission while reading .*a\.txt"):
        store.add(tmp_path / "a.txt")


def test_of_a_model_folder_what_runs_it_and_its_licence_enter_and_no_program(
    store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    wanted = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "merges.txt",
        "spiece.model",
        "chat.jinja",
        "LICENSE",
        "LICENCE.apache",
        "NOTICE.txt",
        "README.md",
        "README_zh.md",
        "USE_POLICY.md",
    )
    for name in (
        *wanted,
        "pytorch_model.bin",
        "modeling_evil.py",
        "license.py",
        "readme.sh",
        "onnx/model.json",
    ):
        (folder / name).write_text(name)
    art = store.add(folder, kind="model")
    assert sorted(art.manifest["files"]) == sorted(wanted)


def test_an_exported_folder_comes_back_as_the_artefact_it_was(store: Store, tmp_path: Path) -> None:
    art = make(store, "weights", kind="corpus")
    shutil.copytree(art.path, tmp_path / "out")
    assert store.add(tmp_path / "out", kind="corpus").path == art.path
    other = Store(tmp_path / "other")
    back = other.add(tmp_path / "out", kind="corpus")
    assert back.id == art.id and back.manifest["asked"] == art.manifest["asked"] and not other.verify(back)
    (tmp_path / "out" / "text").chmod(0o644)
    (tmp_path / "out" / "text").write_text("changed")
    changed = store.add(tmp_path / "out", kind="corpus")
    assert changed.id != art.id and changed.manifest["stage"] == "add"


def test_what_a_killed_attempt_left_is_not_published(store: Store) -> None:
    with store.work("test", "k" * 64) as work:
        (work / "out" / "leftover").write_text("x")
        (work / "checkpoint").write_text("kept")
    with store.work("test", "k" * 64) as work:
        assert not list((work / "out").iterdir())
        assert (work / "checkpoint").read_text() == "kept"


@pytest.mark.parametrize("step", ["write_durably", "seal", "sync"])
def test_a_disk_full_while_publishing_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with monkeypatch.context() as broken:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        broken.setattr(f"caravan.store.{step}", full)
        with pytest.raises(UserError, match="disk is full") as refused:
            make(store, "text")
        assert "same command" in (refused.value.hint or "")
        assert store.find(digest({"stage": "test", "question": "text", "inputs": {}})) is None
        assert all(not store.verify(art) for art in store.ls()), "whole or not at all"
    assert make(store, "text").facts == {"size": 4}
    assert len(store.ls()) == 1


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(OSError, match="odd"), disk.plain_errors("testing"):
        raise OSError(errno.EIO, "odd")
    with pytest.raises(UserError, match="disk is full"), disk.plain_errors("testing"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")  # as safetensors says it


def test_a_key_without_its_artefact_counts_as_not_found(store: Store) -> None:
    art = make(store, "text")
    key = art.manifest["key"]
    (art / "text").unlink()
    assert store.find(key) is None, "a file is gone"
    assert make(store, "text").id == art.id, "published again over the damaged one"
    again = store.find(key)
    assert again is not None and not store.verify(again)
    shutil.rmtree(art.path)
    assert store.find(key) is None, "all of it is gone"
    (store.root / "keys" / key).write_text("{ cut sho")
    assert store.find(key) is None


def test_files_are_read_only_and_a_store_can_be_removed(store: Store) -> None:
    art = make(store, "text")
    for path in art.path.iterdir():
        assert not path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH), path
    shutil.rmtree(store.root)


def test_timing_lies_beside_the_files_and_does_not_move_the_id(store: Store) -> None:
    ids = []
    for now in ("1", "2"):
        with store.work("test", digest(now)) as work:
            (work / "out" / "text").write_text("same")
            (work / "timing.jsonl").write_text(now)
            art = store.publish(work, kind="corpus", asked={"now": now}, record={})
            ids.append(art.id)
    assert ids[0] == ids[1]
    assert (art / "timing.jsonl").read_text() == "1"
    assert not store.verify(art)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "text").write_text("other"), "text has changed"),
        (lambda p: (p / "text").unlink(), "text is missing"),
        (lambda p: (p / "more").write_text(""), "more is extra"),
        (lambda p: _edit(p, facts={"size": 5}), "manifest.json has changed"),
        (lambda p: _edit(p, asked={}), "key does not fit"),
        (lambda p: _edit(p, key="0" * 64), "key does not fit"),
        (lambda p: _edit(p, id="0" * 64), "id does not fit"),
        (lambda p: _edit(p, kind="model"), "id does not fit"),
        (lambda p: _edit(p, files={}), "id does not fit"),
    ],
)
def test_verify_sees_every_kind_of_damage(store: Store, damage: object, words: str) -> None:
    art = make(store, "text")
    assert store.verify(art) == []
    for path in art.path.iterdir():
        path.chmod(0o644)
    damage(art.path)  # type: ignore[operator]
    (damaged,) = store.ls()
    assert words in "; ".join(store.verify(damaged))


def _edit(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_references(store: Store) -> None:
    art = make(store, "text")
    store.name("my-base.v2", art)
    for ref in (art.ref, f"corpus/{art.id}", art.id[:6], art.id, "my-base.v2", f"corpus/{art.id[:4]}"):
        assert store.open(ref).path == art.path
    for i in range(20):
        make(store, f"text {i}")
    prefix = next(f"{i:x}" for i in range(16) if sum(a.id.startswith(f"{i:x}") for a in store.ls()) > 1)
    with pytest.raises(UserError, match="there is no"):
        store.open(prefix)  # too short to be an id
    with pytest.raises(UserError, match="there is no `model/"):
        store.open(f"model/{art.id}")


def test_an_ambiguous_reference_lists_what_it_could_be(store: Store) -> None:
    for kind in ("corpus", "model"):
        target = store.root / "artefacts" / kind / ("abcd" + "0" * 60)
        target.mkdir(parents=True)
        (target / "manifest.json").write_text(json.dumps({"id": target.name, "kind": kind}))
    with pytest.raises(UserError, match="any of 2") as refused:
        store.open("abcd")
    assert "corpus/abcd0000, model/abcd0000" in str(refused.value.hint)


@given(st.one_of(st.text(), st.text(alphabet="./*?[]ab0_-")))
def test_no_text_reaches_outside_the_store(text: str) -> None:
    with pytest.raises(UserError):
        Store("/nonexistent/store").open(text)


@pytest.mark.parametrize(
    "ref", ["", "?", "*", "corpus/*", "corpus/", "../store", "a/../b", "/etc", "Corpus/AB", "a b"]
)
def test_references_that_are_none(store: Store, ref: str) -> None:
    make(store, "text")
    with pytest.raises(UserError, match=r"is no reference|there is no"):
        store.open(ref)


def test_a_reference_cannot_climb_out_of_the_artefacts(store: Store) -> None:
    planted = store.root / ("abcd" + "0" * 60)
    planted.mkdir(parents=True)
    (store.root / "artefacts").mkdir()
    (planted / "manifest.json").write_text(json.dumps({"id": planted.name, "kind": "model"}))
    with pytest.raises(UserError, match="is no reference"):
        store.open("../abcd")


def test_names_move_and_keep_their_history(store: Store) -> None:
    one, two = make(store, "one"), make(store, "two")
    store.name("best", one)
    store.name("best", two)
    assert store.open("best").id == two.id
    path = store.root / "names" / "best"
    assert [line.split()[1] for line in path.read_text().splitlines()] == [
        f"corpus/{a.id}" for a in (one, two)
    ]
    with path.open("a") as f:
        f.write("2026-01-01T00:00:00Z corpus/12")  # a write cut short
    assert store.open("best").id == two.id
    for bad in ("cafe", "a/b", "..", "A", "", "-x", "a..b"):
        with pytest.raises(UserError, match="cannot be a name"):
            store.name(bad, one)
    with pytest.raises(UserError) as refused:
        store.open("bes")
    assert refused.value.hint == "did you mean `best`?"


def test_lineage_reaches_the_raw_files_once_each(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("raw")
    raw = store.add(tmp_path / "a.txt")
    left, right = make(store, "left", raw=raw), make(store, "right", raw=raw)
    top = make(store, "top", "model", a=left, b=right)
    found = [(depth, art.id) for depth, art in store.lineage(top)]
    assert found == [(0, top.id), (1, left.id), (2, raw.id), (1, right.id)]
    shutil.rmtree(raw.path)
    assert [art.id for _, art in store.lineage(top)] == [top.id, left.id, right.id]


def test_gc_removes_old_runs_and_keys_of_nothing(store: Store) -> None:
    gone, kept = make(store, "gone"), make(store, "kept")
    with store.work("test", "a" * 64) as work:
        (work / "checkpoint").write_text("x" * 100)
    with store.work("test", "b" * 64) as busy:
        shutil.rmtree(gone.path)
        assert store.gc(older_than_days=1) and work.exists(), "too young"
        for path in (*work.rglob("*"), work, *busy.rglob("*"), busy):
            os.utime(path, (0, 0))
        dry = store.gc(older_than_days=1, dry_run=True)
        assert work.exists() and [r.path for r in dry] == [work] and dry[0].size == 100
        store.gc(older_than_days=1)
        assert not work.exists() and busy.exists(), "a run under way stays"
    assert store.find(kept.manifest["key"]) and store.gc() == [] and not busy.exists()
    assert not (store.root / "keys" / gone.manifest["key"]).exists()


def test_gc_of_unnamed_keeps_what_names_and_open_runs_stand_on(store: Store) -> None:
    raw, loose, running = make(store, "raw"), make(store, "loose"), make(store, "running")
    model = make(store, "model", "model", base=raw)
    store.name("chat", model)
    with store.work("test", "a" * 64) as work:
        (work / "asked.json").write_text(json.dumps({"inputs": {"x": f"corpus/{running.id}"}}))
    removed = store.gc(unnamed=True)
    assert {r.path for r in removed} == {loose.path, store.root / "keys" / loose.manifest["key"]}
    assert {a.id for a in store.ls()} == {raw.id, running.id, model.id}


def test_a_waiting_process_is_told_and_gets_its_turn(store: Store) -> None:
    told: list[int] = []
    with store.work("test", "a" * 64):
        process = multiprocessing.get_context("fork").Process(target=_hold, args=(store, 0.0))
        process.start()
        process.join(0.3)
        assert process.is_alive()
    process.join(10)
    assert process.exitcode == 0
    with store.work("test", "a" * 64, waiting=lambda: told.append(1)):
        assert not told


def _hold(store: Store, seconds: float) -> None:
    told: list[int] = []
    with store.work("test", "a" * 64, waiting=lambda: told.append(1)):
        time.sleep(seconds)
    os._exit(0 if told else 1)


def test_an_orphaned_worker_does_not_keep_the_lock(store: Store) -> None:
    code = f"""
import multiprocessing, os, signal, time
from caravan.store import Store
with Store({str(store.root)!r}).work("test", "a" * 64):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
    worker.start()
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    # A file, not a pipe: the orphan would hold a pipe open until it ends.
    with (store.root.parent / "pid").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, cwd=Path(__file__).parents[2], check=False)
    orphan = int((store.root.parent / "pid").read_text())
    try:
        os.kill(orphan, 0)
        free, until = False, time.monotonic() + 10  # on a busy machine the worker may not have run yet
        while not free and time.monotonic() < until:
            with disk.locked(store.root / "locks" / ("test-" + "a" * 16), store.root, block=False) as free:
                time.sleep(0.02)
        assert free
    finally:
        os.kill(orphan, 9)


@given(st.dictionaries(st.text(min_size=1), st.text(min_size=1), min_size=1), st.text(min_size=1))
def test_the_id_depends_on_every_name_and_hash_and_not_on_order(files: dict[str, str], other: str) -> None:
    ident = content_id("corpus", files)
    assert content_id("corpus", dict(reversed(files.items()))) == ident
    assert content_id("model", files) != ident
    name = next(iter(files))
    assert (content_id("corpus", {**files, name: other}) == ident) == (files[name] == other)
    assert content_id("corpus", {k: v for k, v in files.items() if k != name}) != ident


def test_the_time_of_publishing_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of one moment with the fraction of another made an artefact look a second old."""
    from caravan import store as module

    ticks = iter([1_700_000_000_999_000_000, 1_700_000_001_000_000_000])
    monkeypatch.setattr(module.time, "time_ns", lambda: next(ticks))
    first, second = module._now(), module._now()
    assert first == "2023-11-14T22:13:20.999Z" and second == "2023-11-14T22:13:21.000Z"

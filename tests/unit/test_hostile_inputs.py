"""Names that are no text, files with nothing in them, damage in the middle: each is named for what it is."""

from __future__ import annotations

import bz2
import errno
import gzip
import os
import shutil
from pathlib import Path

import orjson
import pytest
from pages import STORY, read

from caravan import refs, stage
from caravan.data import records
from caravan.stages import corpus
from caravan.store import Store
from caravan.types import UserError


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A file system holds bytes: such a name is written out, and the file is read (or its problem told)."""
    folder = os.fsencode(tmp_path / "raw")
    os.mkdir(folder)
    text = "{} A sentence that is long enough to be a document of its own, and no other one.\n"
    for name, content in (
        (b"caf\xe9.txt", text.format("Old.")),
        (b"two\nlines.txt", "Nothing here resembles what stands in the other files of this folder."),
        (b"caf\xe9.html", "<html><body><p>" + " ".join(STORY)),
        (b"caf\xe9.epub", "no book"),
        (
            b"caf\xe9.jsonl",
            '{"text": "Whoever reads on finds a fourth text that is made of other words."}\nnot json',
        ),
    ):
        Path(os.fsdecode(folder + b"/" + name)).write_text(content)
    store = Store(tmp_path / "store")
    art = stage.execute(store, "corpus", corpus.Config(), {"raw": store.add(tmp_path / "raw")})
    quarantine = [orjson.loads(line) for line in (art / "quarantine.jsonl").read_bytes().splitlines()]
    assert {row["file"] for row in quarantine} == {"caf\\xe9.epub", "caf\\xe9.jsonl"}
    documents = [d for split in records.SPLITS for d in records.read_documents(art / f"{split}.jsonl.zst")]
    assert {d.source for d in documents} == {
        "caf\\xe9.txt", "two\nlines.txt", "caf\\xe9.html", "caf\\xe9.jsonl"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.json", b"[]"),
        ("a.csv", b"text,id\n"),
        ("a.txt", b" \n\t\n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_what_holds_nothing_is_said_to_be_empty(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("text")
    values, problems, _ = read(tmp_path)
    (problem,) = problems
    assert len(values) == 1 and problem.path.name == name
    assert problem.expected in ("a file that is not empty", "a file with text in it")


def test_a_file_that_cannot_be_read_at_all_says_why(tmp_path: Path) -> None:
    for name, content, word in (("a.jsonl", b"", "empty"), ("a.parquet", b"PAR1", "a parquet file")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert word in str(caught.value.hint) and len(str(caught.value.hint)) < 300
        (tmp_path / name).unlink()


def test_bzip2_with_a_damaged_stream_inside_is_named(tmp_path: Path) -> None:
    """Python's own reader takes what follows a whole stream for padding and loses it without a word."""
    streams = [bytearray(bz2.compress(b"Line %d of the text.\n" % i)) for i in range(3)]
    (tmp_path / "whole.txt.bz2").write_bytes(b"".join(streams))
    streams[1][:3] = b"bad"
    (tmp_path / "damaged.txt.bz2").write_bytes(b"".join(streams))
    values, problems, _ = read(tmp_path)
    assert [v.text.count("Line") for v in values] == [1, 3]
    assert [(p.path.name, p.expected[:21]) for p in problems] == [
        ("damaged.txt.bz2", "a complete .bz2 file ")
    ]


def test_what_is_left_out_of_a_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Links to folders may lead in a circle and are not followed; who linked to the data must hear of it."""
    raw = tmp_path / "raw"
    (raw / "below").mkdir(parents=True)
    (raw / "a.txt").write_text("A sentence that is long enough to be a document of its own.\n")
    (raw / "linked.txt").symlink_to("a.txt")
    (raw / "books").symlink_to(tmp_path)
    (raw / "below" / "loop").symlink_to("..")
    (raw / "gone.txt").symlink_to("nowhere")
    (raw / ".hidden").symlink_to("nowhere")
    os.mkfifo(raw / "pipe")
    store = Store(tmp_path / "store")
    art = refs.resolve(store, str(raw), "raw", lambda name, made: made)
    said = capsys.readouterr().err
    for name in (
        "books (a link to a folder)",
        "below/loop (a link",
        "gone.txt (a link that",
        "pipe (a pipe,",
    ):
        assert name in said
    assert "hidden" not in said
    assert sorted(art.manifest["files"]) == ["a.txt", "linked.txt"] and art.facts["passed_over"] == 4


def test_a_copy_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills while data are copied into the store must not stay full of half a copy."""
    (tmp_path / "a.txt").write_text("text")

    def full(source: Path, to: Path) -> None:
        to.write_text("te")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    store = Store(tmp_path / "store")
    with pytest.raises(UserError, match="disk is full"):
        store.add(tmp_path / "a.txt")
    assert not list((tmp_path / "store" / "runs").iterdir()) and not store.ls()


def test_a_pattern_takes_what_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--raw 'data/**/*.jsonl'`: names below the fixed part, folders whole, nothing hidden."""
    names = ("a/1.jsonl", "a/2.txt", "a/b/3.jsonl", "a/.c/4.jsonl", "d[1].jsonl", "e/5.jsonl")
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "store")

    def taken(text: str) -> list[str]:
        return sorted(refs.resolve(store, text, "raw", lambda name, made: made).manifest["files"])

    assert taken("data/a/*.jsonl") == ["1.jsonl"]
    assert taken("data/**/*.jsonl") == ["a/1.jsonl", "a/b/3.jsonl", "d[1].jsonl", "e/5.jsonl"]
    assert taken("data/[ae]") == ["a/1.jsonl", "a/2.txt", "a/b/3.jsonl", "e/5.jsonl"]
    assert taken(str(tmp_path / "data/e/?.jsonl")) == ["5.jsonl"]
    assert taken("data/d[1].jsonl") == ["d[1].jsonl"], "a file so named comes before the pattern"
    with pytest.raises(UserError, match=r"no file matches data/\*\.csv"):
        taken("data/*.csv")
    with pytest.raises(UserError, match="no file matches"):
        taken("nowhere/*.csv")

"""What a slip of the hand is answered with: the nearest name, the bad line, and never silence."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from caravan import cli
from caravan.data.loader import ExampleLoader
from caravan.data.render import Rendered
from caravan.report import page
from caravan.store import Store
from caravan.systems.loop import LoopConfig
from caravan.types import UserError


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty conversations, the third of which is cut short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CARAVAN_STORE", str(tmp_path / "store"))
    turns = [[("user", f"what {n}"), ("assistant", f"this {n}")] for n in range(20)]
    rows = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in turns]
    rows[2] = rows[2][:30]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path / "chats.jsonl"


def test_a_malformed_line_is_named_where_it_is_seen(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # the second time from the store
        assert cli.main(["conversations", "--raw", str(chats)]) == 0
        said = capsys.readouterr()
        assert "1 put into quarantine.jsonl; first: chats.jsonl, line 3: expected one JSON object" in said.err
        assert said.out.startswith("conversations/") and said.out.count("\n") == 1


def test_strict_holds_for_an_answer_of_the_store_too(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["conversations", "--raw", str(chats)]) == 0
    ref = capsys.readouterr().out.strip()
    assert cli.main(["conversations", "--raw", str(chats), "--strict"]) == 2
    said = capsys.readouterr()
    assert "error: chats.jsonl, line 3: expected one JSON object" in said.err and ref in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (("sft", "--bas", "x"), "--base"),
        (("sft", "--base", "x", "--dta", "y"), "--data"),
        (("gc", "--drry-run"), "--dry-run"),
        (("gc", "--older-then-days", "3"), "--older-than-days"),
        (("ls", "--stroe", "x"), "--store"),
        (("show", "x", "--jsno"), "--json"),
    ],
)
def test_a_misspelt_flag_is_named_before_anything_else(
    words: tuple[str, ...], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: unknown flag") and f"did you mean `{near}`?" in said


def test_the_nearest_name_is_the_one_that_looks_alike(
    chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store()
    raw = store.add(chats)
    for name in ("quickstart-base", "quickstart-dpo", "quickstart-ppo", "quickstart-sft"):
        store.name(name, raw)
    assert cli.main(["show", "quickstart-pppo"]) == 2
    assert "did you mean `quickstart-ppo`?" in capsys.readouterr().err
    assert cli.main(["show", "my-model"]) == 2
    assert "`caravan ls`" in capsys.readouterr().err


def test_a_missing_input_says_that_a_file_will_do(chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "--base", "x"]) == 2
    said = capsys.readouterr().err
    assert "error: sft needs --data: conversations\n" in said and "a file or folder to make it of" in said


def test_what_ends_the_quickstart_is_looked_at_before_its_first_stage(
    chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chats.parent / "file").write_text("no folder")
    for words, said in (
        (("--size", "tinny"), "unknown size 'tinny'"),
        (("--report", "file/report.html"), "--report file/report.html cannot be written"),
        (("--report", "."), "--report . cannot be written"),
    ):
        assert cli.main(["quickstart", "--no-serve", *words]) == 2
        assert said in capsys.readouterr().err
    assert not (chats.parent / "store").exists()


def test_a_page_that_cannot_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(draft: str, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page.os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        page.write("text", tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_no_tokens_are_no_batch() -> None:
    with pytest.raises(UserError, match="trains nothing"):
        ExampleLoader([Rendered(ids=[1, 2, 3], mask=[False, True, True])], 0)
    with pytest.raises(UserError, match="pass of -1 tokens"):
        LoopConfig(steps=1, micro_tokens=-1)

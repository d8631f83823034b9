"""The command line: answers at once, says what is wrong and how to mend it, keeps results and words apart."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny import counting

import caravan
from caravan import cli, refs, stage
from caravan.cli import help as pages
from caravan.store import Store
from caravan.types import UserError

ROOT = Path(__file__).parents[2]
COUNT = "tiny.counting"
Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command in an empty folder with one text file; code, out and err come back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CARAVAN_STORE", str(tmp_path / "store"))
    (tmp_path / "text.txt").write_text("to be or not\nto be\n")

    def command(*words: str) -> SimpleNamespace:
        capsys.readouterr()
        code = cli.main(list(words))
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err, ref=said.out.strip())

    return command


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", **environment}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False)


def test_help_is_there_at_once() -> None:
    spent = []
    for _ in range(3):  # processor time: other processes on this machine do not count
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = python("-m", "caravan", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert shown.returncode == 0 and not shown.stderr
    assert min(spent) < 0.3, f"{min(spent):.2f} s"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["ls"], [COUNT, "--help"], ["no-such-command"]])
def test_nothing_heavy_is_imported_to_speak(words: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
from caravan.cli import main
main({words!r})
heavy = {{"torch", "numpy", "tyro", "rich", "transformers", "tokenizers"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", code, CARAVAN_STORE=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_help_shows_the_road_in_order(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    for name in ("sft", "corpus", "zebra", "rl"):
        (tmp_path / "stages" / f"{name}.py").write_text(f'"""What {name} does."""\n')
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "run.py").write_text('"""Open the doors."""\n')
    monkeypatch.setattr(stage, "PACKAGE", tmp_path)
    text = run("--help").out
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert rows[:5] == ["corpus", "sft", "rl", "zebra", "serve"] and rows[-1] == "gc"
    assert "What rl does." in text and "Open the doors." in text and "quickstart" not in text
    assert run().out == text


def test_version(run: Run) -> None:
    assert run("--version").out == f"caravan {caravan.__version__}\n"


def test_an_unknown_command_suggests_the_nearest(run: Run) -> None:
    for wrong, near in (("linage", "lineage"), ("verfy", "verify")):
        said = run(wrong)
        assert (said.code, said.out) == (2, "")
        assert said.err.startswith(f"error: there is no command `{wrong}`\nhint: did you mean `{near}`?")
    assert run("--storee").code == 2
    assert run("no.such.stage").err.startswith("error: there is no module `no.such.stage`")


def test_a_stage_run_gives_its_reference_on_stdout(run: Run, tmp_path: Path) -> None:
    first = run(COUNT, "--raw", "text.txt", "--steps", "1e1", "--smooth.alpha=0.5", "--upper")
    assert first.code == 0 and first.ref.startswith("corpus/") and len(first.out.splitlines()) == 1
    assert "✓ tiny.counting" in first.err and first.ref in first.err
    again = run(COUNT, "--raw", "text.txt", "--upper", "--smooth.alpha", "0.5", "--steps", "10")
    assert again.ref == first.ref and "from the store" in again.err
    asked = Store().open(first.ref).manifest["asked"]["config"]
    assert asked == {"steps": 10, "smooth": {"alpha": 0.5}, "upper": True}


def test_run_flags_change_no_answer(run: Run, tmp_path: Path) -> None:
    plain = run(COUNT, "--raw", "text.txt").ref
    flags = (
        "--threads",
        "2",
        "--device=cpu",
        "--save-seconds",
        "0.5",
        "--save-steps",
        "3",
        "--strict",
        "--engine=ray",
    )
    other = run(COUNT, "--raw", "text.txt", *flags, "--store", str(tmp_path / "other"))
    assert other.ref == plain
    runtime = Store(tmp_path / "other").open(plain).manifest["runtime"]
    saves = {"save_seconds": 0.5, "save_steps": 3}
    assert runtime == {"device": "cpu", "threads": 2, **saves, "strict": True, "engine": "ray"}


def test_only_the_first_of_several_ranks_speaks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = run(COUNT, "--raw", "text.txt").ref
    assert ref
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = run(COUNT, "--raw", "text.txt", "--name", "mine")
    assert (said.code, said.out, said.err) == (0, "", "")
    assert not Store().names()


def test_output_copies_the_folder_out(run: Run, tmp_path: Path) -> None:
    ref = run(COUNT, "--raw", "text.txt", "--output", "out/here").ref
    there = tmp_path / "out" / "here"
    assert json.loads((there / "manifest.json").read_text())["kind"] == "corpus"
    (there / "counts.json").write_text("mine to edit")
    assert run(COUNT, "--raw", "text.txt", "--output", str(there)).code == 0, "an earlier export is replaced"
    assert (there / "counts.json").read_bytes() == (Store().open(ref) / "counts.json").read_bytes()
    assert [p.name for p in there.parent.iterdir()] == ["here"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for bad in ("full", "text.txt"):
        said = run(COUNT, "--raw", "text.txt", "--steps", "3", "--output", bad)
        assert said.code == 2 and f"--output {bad}" in said.err
    assert len(Store().ls("corpus")) == 1, "refused before anything is run"


def test_names_are_references(run: Run) -> None:
    ref = run(COUNT, "--raw", "text.txt", "--name", "first-count").ref
    assert run("show", "first-count").out.splitlines()[0] == f"{ref}  (first-count)"
    assert run(COUNT, "--raw", "text.txt", "--extra", "first-count").code == 0
    said = run(COUNT, "--raw", "text.txt", "--name", "Bad/Name", "--steps", "3")
    assert said.code == 2 and "cannot be a name" in said.err


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ((), "needs --raw: raw data", "give a file or a folder"),
        (("--raw", "nowhere.txt"), "no file or folder nowhere.txt", "current folder"),
        (("--raw", "text.txt", "--stepz", "3"), "unknown flag `--stepz`", "did you mean `--steps`?"),
        (("--raw", "text.txt", "--save-second", "3"), "`--save-second`", "did you mean `--save-seconds`?"),
        (("--raww", "text.txt"), "unknown flag `--raww`", "did you mean `--raw`?"),
        (("text.txt",), "`text.txt` stands alone", "--name value"),
        (("--raw", "text.txt", "--ex", "x"), "`--ex`", "--extra"),
        (("--raw",), "`--raw` needs a value", "--raw VALUE"),
        (("--raw", "text.txt", "--raw", "text.txt"), "`--raw` is given twice", "keep one"),
        (("--raw", "text.txt", "--threads", "many"), "`--threads many`", "a whole number"),
        (("--raw", "text.txt", "--threads", "0"), "`--threads 0`", "above zero"),
        (("--raw", "text.txt", "--device", "gpu"), "`--device gpu`", "cuda"),
        (("--raw", "text.txt", "--smooth.kind", "x"), "'add', 'none'", "--help"),
        (("--raw", "text.txt", "--extra", "model/1234"), "there is no `model/1234`", "caravan ls"),
        (("--raw", "hf:a/b/c"), "is not a data set's Hub id", "write hf:ORG/NAME"),
        (("text.txt", "--raw", "text.txt"), "`text.txt` stands alone", "--name value"),
    ],
)
def test_mistakes_get_a_sentence_and_a_hint(run: Run, words: tuple[str, ...], error: str, hint: str) -> None:
    said = run(COUNT, *words)
    assert (said.code, said.out) == (2, "")
    first, second = said.err.splitlines()
    assert first.startswith("error: ") and error in first
    assert second.startswith("hint: ") and hint in second


def test_help_of_a_stage_explains_every_flag(run: Run) -> None:
    text = run(COUNT, "--help").out
    for words in ("--raw REF", "--steps int", "Lines to read. (default: 20)", "--smooth.alpha float"):
        assert words in text
    assert "Added to each count. (default: 0.25)" in text, (
        "the default of the parent, not of the nested class"
    )
    assert (
        "--limit int, none" in text
        and "add|none" in text
        and "--words str ..." in text
        and "raw or corpus (optional)" in text
    )
    assert "--output DIR" in text and text.startswith("usage: caravan tiny.counting --raw REF")
    assert run("help", COUNT).out == text
    assert {s.flag for s in pages.settings(Path(counting.__file__), "Config")} == {
        *("steps", "smooth.alpha", "smooth.kind", "words", "upper", "limit")
    }


def test_ls_show_lineage_verify(run: Run, tmp_path: Path) -> None:
    assert run("ls").err.startswith("nothing in ")
    ref = run(COUNT, "--raw", "text.txt", "--steps", "3", "--name", "mine").ref
    rows = run("ls").out.splitlines()
    assert [row.split()[0].split("/")[0] for row in rows] == ["raw", "corpus"] and rows[1].endswith("mine")
    assert run("ls", "raw").out.splitlines() == rows[:1]
    shown = run("show", ref).out
    for words in (
        "setting   steps = 3  (chosen)",
        "setting   upper = false\n",
        "from      raw: raw/",
        "fact      ",
    ):
        assert words in shown
    assert json.loads(run("show", ref, "--json").out)["id"] == Store().open(ref).id
    tree = run("lineage", "mine").out.splitlines()
    assert tree[0].startswith(f"{ref}  by tiny.counting") and tree[1].startswith("└─ raw: raw/")
    assert run("verify").out.splitlines() == [f"ok   {row.split()[0]}" for row in rows]
    damaged = Store().open(ref) / "counts.json"
    damaged.chmod(0o644)
    damaged.write_text("x" * damaged.stat().st_size)
    said = run("verify", ref)
    assert (
        said.code == 1 and "counts.json has changed on disk" in said.out and "run their commands" in said.err
    )


def test_gc(run: Run, tmp_path: Path) -> None:
    ref = run(COUNT, "--raw", "text.txt").ref
    said = run("gc", "--unnamed", "--dry-run")
    assert said.code == 0 and ref.split("/")[1] in said.out and "would free" in said.err
    assert len(Store().ls()) == 2
    assert run("gc", "--older-than-days", "0.5", "--unnamed").code == 0
    assert not Store().ls()
    assert run("gc", "--older-than-days", "soon").code == 2
    assert "unknown flag `--all`" in run("gc", "--all").err
    assert run("show").code == 2 and run("lineage", "a", "b").code == 2


def test_a_path_becomes_what_is_wanted(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    made: list[str] = []

    def make(name: str, raw: Any) -> Any:
        made.append(name)
        return raw

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    (model / "model.safetensors").write_text("weights")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "read.py").write_text(
        'INPUTS = {"raw": "raw", "x": "raw?"}\nOUTPUT = "conversations"\n'
    )
    (tmp_path / "stages" / "other.py").write_text(
        'INPUTS = {"raw": "raw", "x": "raw"}\nOUTPUT = "preferences"\n'
    )
    monkeypatch.setattr(stage, "PACKAGE", tmp_path)
    assert refs.resolve(store, "text.txt", "raw", make).kind == "raw"
    assert refs.resolve(store, str(model), "model", make).kind == "model"
    assert refs.resolve(store, "./model", "model|reward", make).kind == "reward"
    assert refs.resolve(store, "model", "reward", make).kind == "reward"
    assert made == []
    refs.resolve(store, "text.txt", "conversations|shards?", make)
    assert made == ["read"]
    with pytest.raises(UserError, match="cannot become a preferences"):
        refs.resolve(store, "text.txt", "preferences", make)
    with pytest.raises(UserError, match="is a file; a model is a folder"):
        refs.resolve(store, "text.txt", "model", make)


def test_an_exported_folder_is_taken_for_what_it_is(run: Run) -> None:
    ref = run(COUNT, "--raw", "text.txt", "--output", "out").ref
    assert refs.resolve(Store(), "out", "raw|corpus?", lambda *_: None).ref == ref  # type: ignore[arg-type,return-value]


def test_a_model_of_the_hub_enters_as_a_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "cache"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("{}")
    hub = ModuleType("caravan.model.hub")
    hub.fetch = lambda ref: model if ref == "hf:org/name" else None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "caravan.model.hub", hub)
    monkeypatch.setattr("caravan.model.hub", hub, raising=False)
    art = refs.resolve(Store(), "hf:org/name", "model", lambda *_: None)  # type: ignore[arg-type,return-value]
    assert art.kind == "model" and sorted(art.manifest["files"]) == ["config.json", "model.safetensors"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    model: str
    """Which model."""
    port: int = 8000
    """Where."""
    device: str = "mine"
    """A field of the program comes before the run flag of that name."""


def test_a_program_gets_config_store_and_runtime(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []
    module = ModuleType("caravan.serve.run")
    module.Config = ServeConfig  # type: ignore[attr-defined]
    module.main = lambda cfg, store, rt: got.append((cfg, store, rt)) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "caravan.serve.run", module)
    monkeypatch.setattr(pages, "file_of", lambda command: Path(__file__))
    ref = run(COUNT, "--raw", "text.txt", "--name", "mine").ref
    assert run("serve", "mine", "--port", "81", "--threads", "1", "--device", "x").code == 3
    cfg, store, rt = got[0]
    assert cfg == ServeConfig(model=f"corpus/{Store().open(ref).id}", port=81, device="x")
    assert store.root == Store().root and rt.threads == 1 and rt.device == "auto"
    assert "stands alone" in run("serve", "mine", "again").err
    assert "caravan serve needs --model" in run("serve").err
    assert "did you mean `--port`" in run("serve", "mine", "--prt", "3").err


def test_a_page_is_made_of_an_exported_folder_of_any_kind_that_has_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("Ships lie in the harbour until the wind turns in the evening.")
    assert run("corpus", "--raw", "long.txt", "--output", "out", "--store", "elsewhere").code == 0
    assert run("report", "out", "--page", "corpus.html").code == 0
    assert "until the wind turns" in (tmp_path / "corpus.html").read_text()
    refused = run("serve", "out")
    assert refused.code == 2 and "no *.safetensors weights" in refused.err
    assert run("report", "long.txt").code == 2


def test_an_unexpected_error_is_short_and_keeps_its_trace(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTING_FAILS", "bug")
    said = run(COUNT, "--raw", "text.txt")
    assert said.code == 1 and said.err.startswith("error: unexpected KeyError: 'an honest mistake'")
    path = Path(said.err.split("the traceback is in ")[1].split(";")[0])
    assert "raise KeyError" in path.read_text()
    path.unlink()
    monkeypatch.setenv("CARAVAN_DEBUG", "1")
    with pytest.raises(KeyError):
        run(COUNT, "--raw", "text.txt")


def test_a_full_disk_exits_with_two(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTING_FAILS", "full")
    said = run(COUNT, "--raw", "text.txt")
    assert said.code == 2 and "the disk is full" in said.err and "hint: free some space" in said.err


def test_control_c_says_where_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not\n")
    path = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
    env = {**os.environ, "PYTHONPATH": path, "COUNTING_SLEEPS": "0.05", "COUNTING_LOG": str(tmp_path / "log")}
    words = [sys.executable, "-m", "caravan", COUNT, "--raw", "text.txt", "--steps", "1000"]
    running = subprocess.Popen(
        words, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    until = time.monotonic() + 20
    while not (tmp_path / "log").exists() and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "interrupted; tiny.counting keeps its checkpoints in" in said and "run the same command" in said
    assert "Traceback" not in said


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = f"{sys.executable} -m caravan --help | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("command", sorted(pages.SHOWING))
def test_help_explains_every_flag_of_its_usage(command) -> None:
    shown = pages.page(command, Path())
    for flag in re.findall(r"--[a-z-]+", pages.SHOWING[command][0]):
        assert re.search(rf"^  {flag}\b.*\S \S", shown, re.MULTILINE), flag

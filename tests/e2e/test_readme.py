"""The commands of the README are run as they stand there, shrunk to seconds where they are meant to take
minutes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHRINK = "--scale 0.02 --size nano --no-serve --report report.html"
NUMBERS = {"small": "nano", "8192": "512"}
"""Settings that only cost time are made small."""


def blocks(page: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


def commands(page: str) -> list[str]:
    return [line for block in blocks(page) for line in block.strip().splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's own data under the names the README uses, and a `caravan` command."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my-texts").mkdir()
    topics = ["rivers", "trains", "bread", "stars", "winter", "music", "maps", "cats"]
    for index in range(160):
        a, b, c = (topics[(index * step + shift) % 8] for step, shift in ((1, 0), (3, 1), (5, 2)))
        text = (
            f"Page {index} is about {a}. People who like {b} write {index * 7} letters on {c} every year.\n"
            * 2
        )
        (folder / "my-texts" / f"{index}.txt").write_text(text + f"The end of page {index}, on {b} and {a}.")
    with (folder / "my-chats.jsonl").open("w") as chats, (folder / "my-preferences.jsonl").open("w") as prefs:
        for index in range(120):
            ask, good = f"Where is page {index}?", f"It lies {index} steps behind the house."
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": good}]
            chats.write(json.dumps({"messages": messages}) + "\n")
            prefs.write(json.dumps({"prompt": ask, "chosen": good, "rejected": "No idea. " * 3}) + "\n")
    (folder / "bin").mkdir()
    launcher = folder / "bin" / "caravan"
    launcher.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m caravan "$@"\n')
    launcher.chmod(0o755)
    return folder


def run(script: str, place: Path, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "CARAVAN_STORE": str(place / "store"),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=place,
        env=env,
        text=True,
        capture_output=True,
        timeout=timeout,
    )


def shrunk(line: str) -> str:
    for long, short in NUMBERS.items():
        line = re.sub(rf"(?<= ){long}\b", short, line)
    line = line.replace("--text FOLDER", "--text my-texts").replace("--chats FILE", "--chats my-chats.jsonl")
    line = line.replace("--preferences FILE", "--preferences my-preferences.jsonl")
    line = re.sub(r"--base hf:\S+", "--base tiny-qwen2", line)
    line = line.replace(
        "pretrain --shards", "pretrain --context 64 --tokens 20000 --batch-tokens 2048 --shards"
    )
    return f"{line} {SHRINK}" if "caravan quickstart" in line else line


def test_readme_has_the_two_commands_and_ci_calls_the_second() -> None:
    for page in ("README.md", "README.zh.md"):
        assert commands(page)[:2] == ["bin/caravan quickstart", "bin/test"], page
    assert "bin/test" in (ROOT / ".ci" / "run").read_text()
    for script in ("bin/caravan", "bin/test", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK), f"{script} is not executable"


def test_both_readmes_show_the_same_commands() -> None:
    assert commands("README.md") == commands("README.zh.md")


def tiny_qwen2(place: Path) -> None:
    """A random Qwen2-type checkpoint with a tokenizer, standing in for one from the Hub."""
    script = """
import torch
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
from caravan.data.tokenizer import train
torch.manual_seed(0)
out = Path("tiny-qwen2")
config = Qwen2Config(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
Qwen2ForCausalLM(config).save_pretrained(out)
train((p.read_text() for p in Path("my-texts").glob("*.txt")), 512).save(out)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_quickstart_walks_the_whole_road_and_then_answers_from_the_store(place: Path) -> None:
    line = shrunk("caravan quickstart")
    first = run(line, place)
    assert first.returncode == 0, first.stderr
    for row in ("base", "SFT vs base", "DPO vs SFT", "PPO vs SFT", "int8 vs PPO", "int4 vs PPO"):
        assert row in first.stdout
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "Did each stage help" in page and "http://" not in page.replace("http://www.w3.org", "")
    again = run(line, place)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    ticks = [text for text in again.stderr.splitlines() if text.startswith("✓")]
    assert len(ticks) >= 15 and all("from the store" in text for text in ticks), again.stderr


def test_your_own_data_and_an_existing_base(place: Path) -> None:
    pytest.importorskip("transformers")
    tiny_qwen2(place)
    lines = [line for line in commands("README.md") if line.startswith("caravan quickstart --")]
    assert len(lines) == 2
    for line in lines:
        done = run(shrunk(line), place)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert "PPO vs SFT" in done.stdout


def test_stages_compose_as_shown(place: Path) -> None:
    block = next(b for b in blocks("README.md") if b.startswith("corpus="))
    lines = [shrunk(line) for line in block.strip().splitlines()]
    served = [line for line in lines if line.startswith("caravan serve")]
    assert len(served) == 1, "the block ends by serving"
    # A server does not end by itself; its terminal sibling answers once and ends.
    script = (
        "\n".join(line for line in lines if line not in served)
        + "\necho 'Where is page 7?' | caravan chat $chat"
    )
    done = run(script, place)
    assert done.returncode == 0, done.stderr
    files = {p.name for p in (place / "my-model").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "manifest.json",
    } <= files


def test_commands_in_the_stage_pages_name_existing_settings() -> None:
    from caravan.cli import help as pages

    seen = 0
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                for command in re.findall(r"(?:^|\$\()\s*(?:bin/)?caravan ([^()|>;]*)", line):
                    words = shlex.split(command, comments=True)
                    if not words or words[0].startswith("-"):
                        continue
                    text = pages.page(words[0], pages.file_of(words[0]))
                    for flag in (w.split("=")[0] for w in words[1:] if w.startswith("--")):
                        positive = flag.replace("--no-", "--", 1)
                        assert flag in text or positive in text, f"{page.name}: caravan {command}: no {flag}"
                    seen += 1
    assert seen >= 8

"""Ten times the text, chats and pairs in the same memory, every stage in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCH = Path(__file__).parents[2] / "bench" / "memory.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_ten_times_the_text_in_the_same_memory(tmp_path: Path) -> None:
    call = [sys.executable, str(BENCH), "--output", str(tmp_path / "found.json")]
    subprocess.run(call, check=True)
    ratio = json.loads((tmp_path / "found.json").read_text())["ratio"]
    assert ratio.keys() == {
        "corpus", "signals", "filter", "dedup", "meanings", "decontaminate", "unseen", "tokenizer", "shards",
        "mix", "conversations", "preferences",
    }  # fmt: skip
    # Runs differ by 3 %, and columns of a megabyte each, which the smaller corpus leaves half empty, make up
    # to 8 %. A digest and an id of every conversation in memory gave 1.36, a Parquet file that is held 1.27.
    assert {name: r for name, r in ratio.items() if r > 1.15} == {}, "these grow with the text"

"""What is recorded about a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FRAGMENTED = """
from caravan import provenance
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) // 1024
before = resident()
blocks = [bytearray(60_000) for _ in range(5_000)]
kept = blocks[::50]
del blocks
held = resident()
provenance.Memory()
print(before, held, resident())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_the_stage_before_is_given_back() -> None:
    """300 MB of small blocks, one in fifty still in use: glibc would keep them all."""
    done = subprocess.run([sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, check=True)
    before, held, after = map(int, done.stdout.split())
    if held - before < 100:
        pytest.skip("this C library holds nothing back")
    assert after - before < 60


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_is_that_of_the_stage() -> None:
    code = """
from caravan import provenance
def peak(size):
    memory = provenance.Memory()
    bytearray(size << 20)
    return memory.peak()["peak_memory_bytes"] >> 20
print(peak(300), peak(1))
"""
    ballast = b"x" * (400 << 20)  # a child starts with the peak of its parent in the portable count
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del ballast
    first, second = map(int, done.stdout.split())
    assert first > 300 and second < 200

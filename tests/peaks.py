"""What loading a model takes at most, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MEASURABLE = os.access("/proc/self/clear_refs", os.W_OK)

STREAM = """
import sys, torch
from pathlib import Path
from caravan.model import checkpoint
def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
dtype = getattr(torch, sys.argv[3])
checkpoint.load_model(Path(sys.argv[2]), dtype)  # imports and pools are no part of the weights
Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest water starts anew
start = kilobytes("VmRSS")
model = checkpoint.load_model(Path(sys.argv[1]), dtype)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, (kilobytes("VmHWM") - start) * 1024)
"""
"""Not `ru_maxrss`, which a process inherits from the larger one that starts it."""


def of_loading(folder: Path, small: Path, dtype: str) -> tuple[int, int]:
    """(bytes of the weights, bytes at most above what was there before) of loading `folder` in `dtype`.

    `small`: another model folder, loaded first.
    """
    run = [sys.executable, "-c", STREAM, str(folder), str(small), dtype]
    size, peak = map(int, subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    return size, peak

"""Checkpoints that survive a kill at any moment: safetensors and json only.

A checkpoint is a folder `step-00000120/` with `tensors.safetensors` and `state.json` (which holds the size of
the former, so a torn write is noticed). It is written beside, flushed to the disk and renamed; the last
`keep` stay.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from caravan.types import UserError


@dataclass(frozen=True)
class Saved:
    """What a checkpoint held."""

    step: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write checkpoint `step` under `folder` atomically, with torch's CPU random state, and drop older ones.

    `scalars` is any JSON value tree; floats come back bit-equal (shortest round trip), NaN and infinity
    included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    part = folder / f".part-{step:08d}-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    everything = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    everything["rng.cpu"] = torch.get_rng_state()
    try:
        part.mkdir()
        save_file(everything, part / "tensors.safetensors")
        size = (part / "tensors.safetensors").stat().st_size
        (part / "state.json").write_text(
            json.dumps({"step": step, "tensor_bytes": size, "scalars": dict(scalars)})
        )
        for name in ("tensors.safetensors", "state.json", "."):
            _flush(part / name)
    except (OSError, SafetensorError) as failure:
        shutil.rmtree(part, ignore_errors=True)
        size = sum(tensor.nbytes for tensor in everything.values())
        raise UserError(
            f"cannot write the checkpoint of step {step} ({size / 1e6:.0f} MB) to {folder}: {failure}",
            "free some space or check permissions, then run the same command: it resumes where it last saved",
        ) from failure
    if final.exists():  # a resumed run reaches the same step again
        shutil.rmtree(final)
    part.rename(final)
    _flush(folder)
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    for stale in folder.glob(".part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return final


def load_latest(folder: Path, at_most: int | None = None, restore_rng: bool = True) -> Saved | None:
    """The newest whole checkpoint (not after step `at_most`), or None. Broken ones are named on stderr and
    passed over.

    Restores torch's CPU random state unless told not to.
    """
    for step in reversed(_steps(folder)):
        if at_most is not None and step > at_most:
            continue
        path = folder / f"step-{step:08d}"
        try:
            record = json.loads((path / "state.json").read_text())
            file = path / "tensors.safetensors"
            if file.stat().st_size != record["tensor_bytes"]:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes, not {record['tensor_bytes']}")
            tensors = load_file(file)
        except (OSError, ValueError, KeyError, SafetensorError) as broken:
            print(f"checkpoint {path} is broken and passed over: {broken}", file=sys.stderr)
            continue
        rng = tensors.pop("rng.cpu")
        if restore_rng:
            torch.set_rng_state(rng)
        return Saved(record["step"], tensors, record["scalars"])
    return None


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint folder (whole or not); -1 if there is none."""
    steps = _steps(folder)
    return steps[-1] if steps else -1


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

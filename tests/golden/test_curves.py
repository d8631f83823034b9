"""Every training stage must still learn along the curve it learned along when the curve was recorded.

The toys are tiny and in fp32, so a curve moves only when the mathematics moves: a changed initialisation,
data order, loss, schedule or optimiser shows here even when every other test still passes. After a change
that is meant to move a curve, look at the difference, then record again and say so in the change:

    CARAVAN_RECORD=1 python -m pytest tests/golden
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rlhf_toy
import training_toys

from caravan import stage
from caravan.stages import prefer, reward, rl

FOLDER = Path(__file__).parent
RT = stage.Runtime(threads=1, device="cpu")
REWARD = reward.Config(epochs=2, batch_tokens=512, micro_tokens=256, lr=3e-3, precision="fp32")
PREFER = prefer.Config(epochs=2, batch_tokens=512, micro_tokens=256, lr=1e-3, precision="fp32")
RL = rl.Config(
    steps=5, batch_prompts=8, samples=2, max_new_tokens=6, temperature=0.7, epochs=2, minibatches=2,
    micro_tokens=64, ptx_tokens=128, lr=1e-3, precision="fp32", kl=rl.KLConfig(coefficient=0.1, target=1.0),
)  # fmt: skip

Curve = dict[str, list[float]]


def _training(name: str, optimizer: str) -> Callable[[Path], Path]:
    def run(root: Path) -> Path:
        training_toys.write_inputs(root)
        changes = {"precision": "fp32", "optimizer": optimizer, "keep": "last"}
        return training_toys.execute(root / "store", root, name, changes=changes).path

    return run


def _aligning(name: str, cfg: Any, **roles: str) -> Callable[[Path], Path]:
    def run(root: Path) -> Path:
        store, art = rlhf_toy.world(root)
        return stage.execute(store, name, cfg, {role: art[kind] for role, kind in roles.items()}, RT).path

    return run


RL_ROLES = {"policy": "model", "reward": "reward", "prompts": "conversations", "ptx": "conversations"}
RUNS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "pretrain-adamw": (_training("pretrain", "adamw"), ("loss", "grad_norm")),
    "pretrain-muon": (_training("pretrain", "muon"), ("loss", "grad_norm")),
    "sft": (_training("sft", "adamw"), ("loss", "grad_norm")),
    "reward": (_aligning("reward", REWARD, base="model", data="preferences"), ("loss", "grad_norm")),
    "prefer-dpo": (_aligning("prefer", PREFER, policy="model", data="preferences"), ("loss", "grad_norm")),
    "rl-ppo": (_aligning("rl", RL, **RL_ROLES), ("score", "kl", "policy_loss", "value_loss")),
    "rl-ppo-decoupled": (
        _aligning("rl", replace(RL, whiten=False, ptx_weight=1.0, epochs=1), **RL_ROLES),
        ("score", "kl", "policy_loss", "value_loss"),
    ),
}
TOLERANCE = {"pretrain-muon": 3e-3}
"""Relative to the largest value of a series, 5e-5 where nothing is said. Two threads, AVX2 and no vector
units at all gave 5e-4 with Muon, whose Newton-Schulz steps magnify last bits, and 5e-6 elsewhere."""


def curve(name: str, root: Path) -> Curve:
    """Run a toy from nothing and read its numbers."""
    run, keys = RUNS[name]
    rows = [json.loads(line) for line in (run(root) / "metrics.jsonl").read_text().splitlines()]
    return {key: [float(row[key]) for row in rows if key in row] for key in keys}


@pytest.mark.parametrize("name", RUNS)
def test_learns_along_the_recorded_curve(name: str, tmp_path: Path) -> None:
    if os.environ.get("CARAVAN_RECORD"):
        (FOLDER / f"{name}.json").write_text(json.dumps(curve(name, tmp_path), indent=1) + "\n")
        pytest.skip("recorded")
    recorded: Curve = json.loads((FOLDER / f"{name}.json").read_text())
    for key, got in curve(name, tmp_path).items():
        want = recorded[key]
        assert len(got) == len(want) > 1, (key, got)
        scale = max(map(abs, want))
        off = max(abs(g - w) for g, w in zip(got, want, strict=True)) / scale
        assert off < TOLERANCE.get(name, 5e-5), (
            f"{key} is off by {off:.1e} of its largest value:\n{got}\n{want}"
        )

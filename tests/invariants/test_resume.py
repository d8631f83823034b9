"""kill -9 at any moment, run the same command again: the same artefact id as the run that was never killed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import training_toys

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    training_toys.write_inputs(folder)
    return folder


def ids(store, inputs, stage, kills):
    """What a child prints: one id per attempt that got to the end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(
        [sys.executable, HERE / "training_toys.py", store, inputs, stage, json.dumps(kills)],
        capture_output=True, text=True, env=env, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_killed_at_any_moment_the_same_artefact_comes_out(tmp_path, inputs, stage):
    draw = random.Random(stage)
    kills = [["step", 1], ["fsync", draw.randint(1, 4)], ["step", draw.randint(3, 6)], ["fsync", draw.randint(5, 12)],
             ["step", draw.randint(7, 9)], ["none", 0]]  # fmt: skip
    whole = ids(tmp_path / "whole", inputs, stage, [["none", 0]])
    assert ids(tmp_path / "killed", inputs, stage, kills) == whole

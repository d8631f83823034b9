"""kill -9 at any moment, run the same command again: the artefact id of the run that was never killed."""

import random

import pytest
import training_toys


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    training_toys.write_inputs(folder)
    return folder


@pytest.mark.parametrize("stage", ["pretrain", "pretrain-base", "sft"])
def test_killed_at_any_moment_the_same_artefact_comes_out(tmp_path, inputs, stage):
    draw = random.Random(stage)
    moments = [
        ("step", 1),
        ("fsync", draw.randint(1, 4)),
        ("step", draw.randint(3, 6)),
        ("fsync", draw.randint(5, 12)),
        ("step", draw.randint(7, 9)),
        ("none", 0),
    ]
    runs = [[str(tmp_path / "whole"), stage, {}, "none", 0]]
    runs += [[str(tmp_path / "killed"), stage, {}, kind, at] for kind, at in moments]
    whole, killed = training_toys.finish(training_toys.start(inputs, runs))
    assert whole.name == killed.name and whole != killed

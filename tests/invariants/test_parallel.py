"""Two ranks (gloo, two processes, the whole stage) against one: the same run up to the order of additions."""

import json
import os
import socket

import pytest
import training_toys
from safetensors.torch import load_file

from caravan.systems import parallel


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize("stage", ["pretrain"])
def test_two_ranks_are_one_rank(tmp_path, stage):
    inputs = tmp_path / "in"
    inputs.mkdir()
    training_toys.write_inputs(inputs)
    changes = {"precision": "fp32", "optimizer": "adamw"}
    run = [[str(tmp_path / "two"), stage, changes, "none", 0]]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [training_toys.start(inputs, run, RANK=str(r), LOCAL_RANK=str(r), **env) for r in range(2)]
    alone = training_toys.start(inputs, [[str(tmp_path / "one"), stage, changes, "none", 0]])
    (two,), (follower,), (one,) = (training_toys.finish(p) for p in (*ranks, alone))
    assert two == follower
    weights, wanted = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    for name, tensor in wanted.items():
        # Adam divides by the root of tiny second moments, which magnifies last bits; hence 1e-3, not 1e-6.
        assert (weights[name] - tensor).norm() < 1e-3 * tensor.norm(), name
    for got, want in zip(lines(two), lines(one), strict=True):
        assert got["tokens"] == want["tokens"] and got["lr"] == want["lr"]
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    assert os.path.getsize(two / "timing.jsonl") > 0


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_alone_everything_is_a_no_op():
    assert parallel.rank_world() == (0, 1)
    assert parallel.mine([1, 2, 3]) == [1, 2, 3]
    assert parallel.any_rank(True) and not parallel.any_rank(False)
    assert parallel.equal_everywhere("x") and parallel.union({"b": 1, "a": 2}) == ["a", "b"]


def test_shares_are_disjoint_and_whole(monkeypatch):
    items = list(range(7))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank_world", lambda rank=rank: (rank, 3))
        shares.append(list(parallel.mine(items)))
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]

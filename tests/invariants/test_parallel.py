"""Two ranks (gloo, two processes, the whole stage) against one: the same run up to the order of additions."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rlhf_toy
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


RL_RANK = """
import sys
from pathlib import Path
from caravan import stage
from caravan.stages import rl
from caravan.store import Store
root = Path(sys.argv[1])
store = Store(root / "store")
art = {kind: store.add(root / kind, kind=kind) for kind in ("model", "reward", "conversations")}
roles = {"policy": "model", "reward": "reward", "prompts": "conversations", "ptx": "conversations"}
cfg = rl.Config(steps=3, batch_prompts=6, samples=2, max_new_tokens=6, temperature=0.7, epochs=2,
                minibatches=2, micro_tokens=64, ptx_tokens=128, lr=1e-3, precision="fp32")
rt = stage.Runtime(threads=1, device="cpu")
print(stage.execute(store, "rl", cfg, {role: art[kind] for role, kind in roles.items()}, rt).path)
"""


def test_two_ranks_of_rl_are_one(tmp_path):
    """Rollouts are drawn by number, losses are normalised over all ranks: only the order of additions may
    differ."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(folder, **more):
        command = [sys.executable, "-c", RL_RANK, str(tmp_path / folder)]
        return subprocess.Popen(command, env={**env, **more}, stdout=subprocess.PIPE, text=True)

    for folder in ("one", "two"):
        rlhf_toy.world(tmp_path / folder)
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [start("two", RANK=str(r), LOCAL_RANK=str(r), **together) for r in range(2)]
    alone = start("one")
    paths = []
    for process in (*ranks, alone):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        paths.append(Path(out.strip().splitlines()[-1]))
    assert paths[0] == paths[1]
    for got, want in zip(lines(paths[0]), lines(paths[2]), strict=True):
        assert (got["responses"], got["tokens"]) == (want["responses"], want["tokens"])
        for key in ("score", "kl", "length", "policy_loss", "value_loss", "ptx_loss", "grad_norm"):
            assert got[key] == pytest.approx(want[key], rel=1e-3, abs=1e-6), key
    weights, wanted = (load_file(path / "model.safetensors") for path in (paths[0], paths[2]))
    for name, tensor in wanted.items():
        assert (weights[name] - tensor).norm() < 1e-3 * tensor.norm(), name

"""Loss-free balancing in training: experts come into balance, a step that is not applied moves nothing, a run
that was cut goes on bit for bit, and ranks share their counts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import balancing
import pytest
import torch
from balancing import batches, biases, lopsided, train, trainee

from caravan.algos.optim import OptimConfig
from caravan.algos.schedule import Schedule
from caravan.kernels.attention import Segments
from caravan.model.ffn.moe import expert_counts, moved_bias
from caravan.systems import loop
from caravan.systems.train import Trainee, lm_loss, train_step
from caravan.types import Batch, Loss


@torch.no_grad()
def uneven(model: Any) -> float:
    """Largest count over mean count of unseen text, the worst layer's."""
    (batch,) = batches(999, 1)
    attend = Segments(batch.lengths)
    model(batch.ids_N, batch.pos_N, attend)
    counts = [expert_counts(chosen, balancing.EXPERTS) for _, chosen in attend.routed.values()]
    return max(float(count.max() / count.mean()) for count in counts)


def test_a_lopsided_model_becomes_balanced() -> None:
    ours, left = trainee(), trainee(rate=0.0)
    before = uneven(ours.model)
    assert before > 2.5
    for subject in (ours, left):
        train(subject, 40)
    assert uneven(ours.model) < 1.6 < 2.5 < uneven(left.model)
    assert not any(map(any, biases(left)))


def test_the_move_is_that_of_the_whole_step() -> None:
    """Counts of both micro batches, with and without recomputed activations, held-out passes left out."""
    plain, again = trainee(), trainee()
    again.model.checkpoint_every = 1
    counts = [torch.zeros(balancing.EXPERTS) for _ in plain.model.blocks]
    for batch in batches(0):
        attend = Segments(batch.lengths)
        with torch.no_grad():
            plain.model(batch.ids_N, batch.pos_N, attend)
        counts = [
            count + expert_counts(attend.routed[i][1], balancing.EXPERTS) for i, count in enumerate(counts)
        ]
    want = [moved_bias(torch.zeros(balancing.EXPERTS), count, 0.02).tolist() for count in counts]
    train(plain, 1)
    train(again, 1)
    assert biases(plain) == want == biases(again)
    assert all(block.ffn.seen is None for block in plain.model.blocks)


def test_a_refused_step_moves_nothing_and_leaves_no_counts() -> None:
    subject, other = trainee(), trainee()

    def poisoned(batch: Batch) -> Loss:
        one = lm_loss(subject.model, batch, 192.0)
        return Loss(one.value * float("nan"), one.stats)

    assert not train_step(subject, batches(7), poisoned, 1e-5).applied
    assert not any(map(any, biases(subject)))
    train(subject, 1)
    train(other, 1)
    assert biases(subject) == biases(other)


def test_a_router_that_is_not_trained_keeps_its_bias() -> None:
    model = lopsided()
    model.blocks[0].ffn.router.weight.requires_grad_(False)
    subject = Trainee(model, OptimConfig(lr=1e-5))
    assert list(subject.balance.tensors()) == ["blocks.1.ffn.router_bias"]


class Data:
    def micro_batches(self, step: int, micro_tokens: int) -> list[Batch]:
        return batches(step)

    def normaliser(self, step: int) -> float:
        return 192.0


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_that_was_cut_ends_with_the_same_biases(tmp_path: Path, keep: Any) -> None:
    plan = loop.LoopConfig(
        steps=9, optim=OptimConfig(lr=1e-5), schedule=Schedule(kind="constant"), keep=keep, eval_steps=2
    )

    def going(work: Path, losses: list[float], stop: int = 99) -> Trainee:
        def report(done: int, *rest: Any, **numbers: Any) -> None:
            if done == stop:
                raise InterruptedError

        rt: Any = SimpleNamespace(report=report, work=work, save_seconds=1e9, save_steps=3)
        subject, left = trainee(), iter(losses)
        loop.run(subject, Data(), lm_loss, plan, rt, lambda model: {"loss": next(left)})
        return subject

    whole = going(tmp_path / "whole", [3.0, 1.0, 2.0, 2.0, 2.0])
    with pytest.raises(InterruptedError):
        going(tmp_path / "cut", [3.0, 1.0], stop=5)
    again = going(tmp_path / "cut", [1.0, 2.0, 2.0, 2.0])
    assert biases(again) == biases(whole) and any(map(any, biases(whole)))
    assert torch.equal(again.optimiser.master, whole.optimiser.master)
    straight = trainee()
    train(straight, 9 if keep == "last" else 4)  # the second evaluation is the best
    assert biases(straight) == biases(whole)


def test_two_ranks_move_as_one() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    root = Path(__file__).parents[2]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(root)}
    ranks = [
        subprocess.Popen(
            [sys.executable, balancing.__file__],
            env={**os.environ, **group, "RANK": str(r)},
            stdout=subprocess.PIPE,
        )
        for r in range(2)
    ]
    said = [json.loads(process.communicate(timeout=240)[0]) for process in ranks]
    alone = trainee()
    train(alone, 5)
    assert said[0] == said[1] == biases(alone)

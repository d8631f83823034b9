"""Every audit finds the bug it is named after, and keeps quiet otherwise."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from caravan.algos.optim import OptimConfig
from caravan.systems import audit
from caravan.systems.train import Trainee, train_step
from caravan.types import Batch, Loss, UserError


def batch(weights=(1.0, 0.0, 1.0)):
    n = len(weights)
    return Batch(
        torch.arange(n), torch.arange(n), (n,), torch.zeros(n, dtype=torch.int64), torch.tensor(weights)
    )


def test_supervised_tokens():
    audit.normaliser(1.0, 0)
    for bad in (0.0, math.nan):
        with pytest.raises(UserError, match="supervised-tokens"):
            audit.normaliser(bad, 3)


def test_batch_shape():
    audit.batches([batch()], 0)
    with pytest.raises(UserError, match="no supervised token"):
        audit.batches([batch(), batch((0.0, 0.0))], 0)
    with pytest.raises(AssertionError, match="lengths"):
        audit.batches([replace(batch(), lengths=(2, 2))], 0)


def test_fresh_loss():
    assert audit.fresh_loss(math.log(4096) + 0.1, 4096) is None
    assert "fresh-loss" in audit.fresh_loss(math.log(4096) + 2.0, 4096)
    assert "fresh-loss" in audit.fresh_loss(1.0, 4096)


def test_gradient_reach():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    trainee = Trainee(model, OptimConfig())
    trainee.grad.fill_(7.0)  # what a reused buffer might hold
    train_step(trainee, [None], lambda _: Loss(model["used"](torch.ones(2)).sum()), 0.0)
    assert "idle.weight" in audit.gradients(trainee)
    idle = [s for s in trainee.slots if s.name.startswith("idle")]
    assert all((s.of(trainee.grad) == 0).all() for s in idle)
    train_step(trainee, [None], lambda _: Loss(sum(m(torch.ones(2)).sum() for m in model.values())), 0.0)
    assert audit.gradients(trainee) is None


def test_equal_ranks_alone_is_quiet():
    audit.ranks_agree(Trainee(nn.Linear(1, 1), OptimConfig()), 0)

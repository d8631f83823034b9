"""The training loop part on a two-weight regression: order of events, skipping, rolling back, resuming."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from caravan.algos.optim import OptimConfig
from caravan.algos.schedule import Schedule
from caravan.systems import loop, state
from caravan.systems.guard import Guard, GuardConfig
from caravan.systems.train import Trainee, train_step
from caravan.types import Loss, UserError


@dataclass
class Points:
    """y = 3x - 1 with a poisoned step now and then."""

    poison: tuple[int, ...] = ()
    value: float = math.nan

    def micro_batches(self, step, micro_tokens):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(8, 1, generator=g)
        y = 3 * x - 1
        if step in self.poison:
            y = y + self.value
        return [(x[i : i + micro_tokens], y[i : i + micro_tokens]) for i in range(0, 8, micro_tokens)]

    def normaliser(self, step):
        return 8.0


def squared(model, batch, normaliser):
    x, y = batch
    error = (model(x) - y).square().sum()
    return Loss(error / normaliser, {"squares": error})


def trainee(seed=0, **fields):
    torch.manual_seed(seed)
    return Trainee(nn.Linear(1, 1), OptimConfig(**{"lr": 0.1, "weight_decay": 0.0, **fields}))


def runtime(path, **fields):
    fields = {"work": Path(path), "save_seconds": 1e9, "save_steps": None, **fields}
    return SimpleNamespace(report=lambda *a, **k: None, **fields)


def config(steps, **fields):
    return loop.LoopConfig(
        **{"steps": steps, "micro_tokens": 4, "optim": OptimConfig(lr=0.1, weight_decay=0.0),
           "schedule": Schedule(kind="constant"), **fields}
    )  # fmt: skip


def test_it_learns_and_writes_one_line_per_step(tmp_path):
    t = trainee()
    history = loop.run(t, Points(), squared, config(60), runtime(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(60))
    assert lines[-1]["loss"] < 0.05 * lines[0]["loss"]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", "squares"}
    assert lines[0]["squares"] == pytest.approx(lines[0]["loss"] * 8)
    assert (
        history.tokens == 480
        and history.first_loss == lines[0]["loss"]
        and history.last_loss == lines[-1]["loss"]
    )


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    t = trainee()
    words = []
    history = loop.run(t, Points(poison=(5,)), squared, config(10), runtime(tmp_path), say=words.append)
    assert history.skipped == [5] and history.tokens == 72 and len(words) == 1
    assert t.optimiser.steps == 9
    assert torch.isfinite(t.optimiser.master).all()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[5])
    assert line["event"] == "skip" and line["loss"] == "nan"


def test_a_spike_rolls_back_to_the_anchor_and_skips_its_data(tmp_path):
    cfg = config(60, anchor_steps=40, guard=GuardConfig(least=20, patience=2))
    t = trainee()
    history = loop.run(t, Points(poison=(50, 51), value=1000.0), squared, cfg, runtime(tmp_path / "a"))
    assert history.skipped == [50, 51] and history.rolled_back == [[51, 40]]
    plain = trainee()
    loop.run(plain, Points(), squared, config(40), runtime(tmp_path / "b"))  # the state of step 40 ...
    for step in range(52, 60):  # ... goes on with the data after the spike
        train_step(plain, Points().micro_batches(step, 4), lambda b: squared(plain.model, b, 8.0), 0.1)
    assert torch.equal(t.optimiser.master, plain.optimiser.master)


def test_divergence_stops_with_a_sentence(tmp_path):
    cfg = config(40, guard=GuardConfig(patience=2, max_rollbacks=1))
    with pytest.raises(UserError, match="diverged") as failure:
        loop.run(trainee(), Points(poison=tuple(range(5, 40))), squared, cfg, runtime(tmp_path))
    assert "learning rate" in failure.value.hint


@pytest.mark.parametrize("spike", [(), (22, 23)])
@pytest.mark.parametrize("stop", [1, 7, 21, 23, 24, 29])
def test_resume_is_exact(tmp_path, stop, spike):
    def evaluate(model):
        return {"loss": float((model(torch.ones(1, 1)) - 2).square())}

    cfg = config(30, eval_steps=4, keep="best", anchor_steps=10, guard=GuardConfig(least=15, patience=2))
    data = Points(poison=spike, value=500.0)

    class Killed(Exception):
        pass

    def kill(done, *rest, **numbers):
        if done == stop + 1:
            raise Killed

    whole, killed, again = trainee(), trainee(), trainee()
    want = loop.run(whole, data, squared, cfg, runtime(tmp_path / "whole"), evaluate)
    with pytest.raises(Killed):
        rt = runtime(tmp_path / "cut", save_steps=3)
        rt.report = kill
        loop.run(killed, data, squared, cfg, rt, evaluate)
    got = loop.run(again, data, squared, cfg, runtime(tmp_path / "cut", save_steps=5), evaluate)
    assert vars(got) == vars(want)
    assert torch.equal(again.optimiser.master, whole.optimiser.master)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_best_weights_come_out(tmp_path):
    seen = []

    def evaluate(model):
        seen.append(next(model.parameters()).detach().clone())
        return {"loss": abs(len(seen) - 2.0)}

    t = trainee()
    history = loop.run(
        t, Points(), squared, config(20, eval_steps=5, keep="best"), runtime(tmp_path), evaluate
    )
    assert history.best_step == 10 and history.best_eval == {"loss": 0.0}
    assert torch.equal(next(t.model.parameters()), seen[1])


def test_a_step_without_supervision_is_refused(tmp_path):
    data = Points()
    data.normaliser = lambda step: 0.0
    with pytest.raises(UserError, match="supervised-tokens"):
        loop.run(trainee(), data, squared, config(2), runtime(tmp_path))


def test_clipping_limits_the_norm():
    t = trainee(max_grad_norm=1e-3)
    seen = {}
    t.optimiser.step = lambda grad, lr, scale: seen.update(norm=float((grad * scale).norm()))
    result = train_step(t, Points().micro_batches(0, 8), lambda b: squared(t.model, b, 8.0), 0.1)
    assert result.grad_norm > 0.1 and seen["norm"] == pytest.approx(1e-3, rel=1e-3)


def test_a_step_that_is_not_finite_is_refused_even_without_a_guard():
    t = trainee()
    before = t.optimiser.master.clone()
    bad = train_step(t, Points(poison=(0,)).micro_batches(0, 8), lambda b: squared(t.model, b, 8.0), 0.1)
    assert not bad.applied and torch.equal(t.optimiser.master, before) and t.optimiser.steps == 0


def test_after_a_rollback_the_new_level_is_the_one_to_judge_by():
    guard = Guard(GuardConfig(least=2, patience=2))
    for _ in range(5):
        guard.record(1.0, 1.0, True)
    assert not guard.judge(9.0, 1.0)
    assert [guard.record(9.0, 1.0, False) for _ in range(2)] == ["skip", "rollback"]
    assert guard.judge(9.0, 1.0)


def test_guard_ignores_ordinary_noise_and_drops_old_values():
    guard = Guard(GuardConfig(least=4, window=8))
    for i in range(50):
        assert guard.judge(1.0 + 0.01 * (i % 2), 1.0)
        guard.record(1.0 + 0.01 * (i % 2), 1.0, True)
    assert guard.judge(1.4, 2.5) and not guard.judge(1.6, 1.0) and not guard.judge(1.0, 3.1)
    assert len(guard.losses) == 8


def test_state_in_the_work_folder_stays_small(tmp_path):
    loop.run(trainee(), Points(), squared, config(50, anchor_steps=10), runtime(tmp_path, save_steps=3))
    assert len(list((tmp_path / "state").iterdir())) == 2 and len(list((tmp_path / "anchor").iterdir())) == 2
    assert state.newest_step(tmp_path / "anchor") == 50

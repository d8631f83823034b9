"""The one training loop part, used by pretrain, sft, reward and prefer: `run` is the order of events on one
screen.

A run can be killed at any moment and started again: it goes on from the last checkpoint and ends with the
same bytes as a run that was never killed. That holds because the data of a step is a pure function of the
step number, and all else (masters, moments, running statistics, best step, random state) is in the
checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch

from caravan.algos.optim import OptimConfig
from caravan.algos.schedule import Schedule, lr_at
from caravan.systems import audit, parallel, state
from caravan.systems.guard import Guard, GuardConfig
from caravan.systems.metrics import Journal
from caravan.systems.train import Trainee, train_step
from caravan.types import Batch, Loss, UserError

if TYPE_CHECKING:
    from caravan.stage import Runtime

M = TypeVar("M", bound=torch.nn.Module)
B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class Loader(Protocol[B_co]):
    """Data as a pure function of the step number."""

    def micro_batches(self, step: int, micro_tokens: int) -> Sequence[B_co]: ...

    def normaliser(self, step: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how to train. Every field can change the bytes that come out."""

    steps: int
    """Optimiser steps."""
    micro_tokens: int = 4096
    """Tokens per forward pass (memory); the order in which a step is summed changes last bits."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = field(default_factory=Schedule)
    eval_steps: int = 0
    """Evaluate every so many steps and after the last; 0 after the last only."""
    keep: Literal["best", "last"] = "last"
    """Which weights come out: those of the lowest evaluated loss, or the last."""
    anchor_steps: int = 200
    """A checkpoint to roll back to is kept every so many steps; 0 never."""
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        if self.micro_tokens < 1:
            raise UserError(f"a pass of {self.micro_tokens} tokens is none", "give --micro-tokens above 0")


@dataclass
class History:
    """What happened; all of it deterministic. Numbers only, so that it fits into a checkpoint."""

    step: int = 0
    """Steps done."""
    tokens: float = 0.0
    """Supervised tokens seen (sum of weights) in applied steps."""
    first_loss: float | None = None
    last_loss: float | None = None
    last_eval: dict[str, float] = field(default_factory=dict)
    best_eval: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    skipped: list[int] = field(default_factory=list)
    """Steps whose update was not applied."""
    rolled_back: list[list[int]] = field(default_factory=list)
    """[step, anchor step it went back to]."""


def run(
    trainee: Trainee,
    loader: Loader[B],
    loss: Callable[[Any, B, float], Loss],
    cfg: LoopConfig,
    rt: Runtime,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    fresh_vocab: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    about: Callable[[int], Mapping[str, Any]] = lambda step: {},
) -> History:
    """Train for `cfg.steps` steps; afterwards the trainee holds the weights `cfg.keep` asks for.

    `loss(model, micro_batch, normaliser)` is divided by the step's normaliser already. `evaluate(model)` runs
    on every rank, returns the same numbers everywhere, and `loss` among them is what `keep="best"` minimises.
    `fresh_vocab` is given for an untrained model (audit of the first loss); `say` gets warnings and events as
    sentences; `about(step)` adds numbers of the data to a step's metrics. Raises UserError when training
    diverges or a step has no supervised token.
    """
    work, first = Path(rt.work), parallel.rank_world()[0] == 0
    history, guard = _resume(trainee, Guard(cfg.guard), work, say)
    metrics = Journal(work / "metrics.jsonl", history.step, first)
    timing = Journal(work / "timing.jsonl", history.step, first)
    saved_at, model = time.monotonic(), trainee.model
    while history.step < cfg.steps:
        step, started = history.step, time.monotonic()
        batches, total = loader.micro_batches(step, cfg.micro_tokens), loader.normaliser(step)
        audit.normaliser(total, step)
        lr = lr_at(step, cfg.steps, cfg.optim.lr, cfg.schedule)
        of_batch = partial(_loss_of, loss, model, total)
        done = train_step(trainee, parallel.mine(batches), of_batch, lr, guard.judge)
        if history.first_loss is None:
            _first_step_audit(trainee, batches, done.loss, fresh_vocab, say)
        verdict = guard.record(done.loss, done.grad_norm, done.applied)
        history.step = step + 1
        numbers: dict[str, Any] = {"loss": done.loss, "lr": lr, "grad_norm": done.grad_norm, **done.stats}
        numbers.update(about(step))
        if verdict == "ok":
            history.tokens += total
            history.last_loss = done.loss
            history.first_loss = done.loss if history.first_loss is None else history.first_loss
        else:
            history.skipped.append(step)
            say(f"step {step}: loss {done.loss:.4g}, gradient norm {done.grad_norm:.4g}: not applied")
            numbers["event"] = verdict
        if verdict == "rollback":
            numbers["to"] = _roll_back(trainee, history, work, say)
        seconds = time.monotonic() - started
        last = history.step == cfg.steps
        if evaluate is not None and (last or (cfg.eval_steps and history.step % cfg.eval_steps == 0)):
            with torch.no_grad():
                numbers["eval"] = history.last_eval = evaluate(model)
            _keep_best(trainee, history, work, cfg, first)
        metrics.write(step=step, **numbers)
        timing.write(step=step, seconds=seconds, tokens_per_second=_real_tokens(batches) / seconds)
        rt.report(
            history.step,
            cfg.steps,
            "steps",
            loss=done.loss,
            tokens_per_second=_real_tokens(batches) / seconds,
        )
        due = time.monotonic() - saved_at >= rt.save_seconds or (
            rt.save_steps and history.step % rt.save_steps == 0
        )
        anchor = bool(cfg.anchor_steps) and history.step % cfg.anchor_steps == 0
        if anchor or last or parallel.any_rank(bool(due)):
            metrics.sync()
            _save(trainee, history, guard, work / ("anchor" if anchor else "state"), first)
            saved_at = time.monotonic()
    audit.ranks_agree(trainee, history.step)
    if cfg.keep == "best" and history.best_step not in (None, history.step):
        best = state.load_latest(work / "best", at_most=history.best_step, restore_rng=False)
        assert best is not None and best.step == history.best_step, (
            "the best checkpoint is gone from the work folder"
        )
        trainee.load_weights(best.tensors)
    return history


def _loss_of(loss: Callable[[Any, B, float], Loss], model: Any, normaliser: float, batch: B) -> Loss:
    return loss(model, batch, normaliser)


def _resume(trainee: Trainee, guard: Guard, work: Path, say: Callable[[str], None]) -> tuple[History, Guard]:
    """The newest whole checkpoint of either folder, or a fresh start."""
    saved: state.Saved | None = None
    for folder in sorted((work / "state", work / "anchor"), key=state.newest_step, reverse=True):
        if saved is None or saved.step < state.newest_step(folder):
            other = state.load_latest(folder)
            saved = max(filter(None, (saved, other)), key=lambda one: one.step, default=None)
    if saved is None:
        return History(), guard
    trainee.load(saved.tensors, saved.scalars)
    guard.load(saved.scalars["guard"])
    say(f"resumed after step {saved.step}")
    return History(**saved.scalars["history"]), guard


def _save(trainee: Trainee, history: History, guard: Guard, folder: Path, first: bool) -> None:
    if first:
        scalars = {**trainee.scalars(), "history": vars(history), "guard": guard.state()}
        state.save(folder, history.step, trainee.tensors(), scalars)
    parallel.barrier()


def _roll_back(trainee: Trainee, history: History, work: Path, say: Callable[[str], None]) -> int | None:
    """Weights and moments of the newest anchor; the data since then stays skipped. None: there was no anchor
    yet."""
    anchor = state.load_latest(work / "anchor", at_most=history.step, restore_rng=False)
    if anchor is None:
        return None
    trainee.load(anchor.tensors, anchor.scalars)
    history.rolled_back.append([history.step - 1, anchor.step])
    say(f"rolled back to the weights of step {anchor.step}; going on with the data of step {history.step}")
    return anchor.step


def _keep_best(trainee: Trainee, history: History, work: Path, cfg: LoopConfig, first: bool) -> None:
    if history.best_step is None or history.last_eval["loss"] < history.best_eval["loss"]:
        history.best_step, history.best_eval = history.step, history.last_eval
        if cfg.keep == "best" and first:
            state.save(work / "best", history.step, trainee.weights(), {})
        parallel.barrier()


def _first_step_audit(
    trainee: Trainee, batches: Sequence[Any], loss: float, vocab: int | None, say: Callable[[str], None]
) -> None:
    audit.batches([b for b in batches if isinstance(b, Batch)], 0)
    warnings = [audit.gradients(trainee), audit.fresh_loss(loss, vocab) if vocab else None]
    for warning in filter(None, warnings):
        say(warning)
    audit.ranks_agree(trainee, 1)


def _real_tokens(batches: Iterable[Any]) -> int:
    return sum(sum(b.lengths) for b in batches if isinstance(b, Batch))


@torch.no_grad()
def heldout(
    model: Any, batches: Sequence[B], loss: Callable[[Any, B, float], Loss], normaliser: float
) -> dict[str, float]:
    """Mean loss and summed statistics over held-out batches, shared among the ranks; equal numbers on all of
    them."""
    total: dict[str, torch.Tensor] = {}
    value: torch.Tensor | None = None
    for batch in parallel.mine(batches):
        one = loss(model, batch, normaliser)
        value = one.value.float() if value is None else value + one.value.float()
        for name, number in one.stats.items():
            total[name] = total[name] + number.float() if name in total else number.float()
    zero = torch.zeros((), device=next(model.parameters()).device)
    names = parallel.union(total)
    numbers = parallel.sum_(
        torch.stack([zero if value is None else value, *(total.get(n, zero) for n in names)])
    )
    mean, *sums = numbers.tolist()
    return {"loss": mean, **dict(zip(names, sums, strict=True))}

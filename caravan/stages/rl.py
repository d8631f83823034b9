"""Reinforcement learning from a reward model: PPO with a critic, a reference and, if wanted, pre-training
gradients.

One step: sample answers -> score them once at their end, ask reference and critic -> k1 KL into the token
rewards -> GAE -> whiten over the whole rollout -> epochs x minibatches of clipped updates -> steer the KL
coefficient. (Ouyang et al. 2022, arXiv 2203.02155; Stiennon et al. 2020, arXiv 2009.01325. The losses:
algos/rl/ppo.py.)

What keeps it honest: one temperature in every log-prob; old log-probs from the same packed batches as the
update, so the ratio of the first minibatch is exactly 1 (audited each step); reference and policy agree
exactly at step 0 (audited); sums over response tokens divided by the token count of the whole minibatch;
sampling a pure function of (weights, seed, step), so that a killed run goes on to the same bytes.

Left out: top-k and top-p while training, rewards other than one score per answer, bootstrapping of cut
answers.

Shapes: S sequences, R response tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from caravan import stage
from caravan.algos import kl as kl_algo
from caravan.algos.rl import ppo
from caravan.algos.schedule import Schedule, ScheduleKind, lr_at
from caravan.data.tokenizer import Tokenizer
from caravan.model.checkpoint import read_generation, save_model
from caravan.stage import Runtime
from caravan.stages import _rl as parts
from caravan.stages import _rl_start as start
from caravan.store import Artefact
from caravan.systems import parallel, runtime, state
from caravan.systems.metrics import Journal
from caravan.types import UserError

INPUTS = {"policy": "model", "reward": "reward", "prompts": "conversations", "ptx": "conversations|shards?"}
OUTPUT = "model"
USES = {"algo": "algos/rl"}
VERSION = 1
RANKS = True


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """How strongly the policy is tied to where it started."""

    coefficient: float = 0.05
    """Weight of the KL per token in the reward, in units of the score per nat."""
    target: float = 0.0
    """KL per response, in nats, that an adaptive coefficient steers towards; 0 keeps the coefficient."""
    horizon: int = 10_000
    """Responses over which the adaptive coefficient corrects an error."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to train with reinforcement."""

    algo: str = "ppo"
    """Method: a file of algos/rl."""
    steps: int = 100
    """Rollouts; each is used for epochs x minibatches updates."""
    batch_prompts: int = 32
    """Prompts per rollout."""
    samples: int = 1
    """Answers per prompt."""
    max_new_tokens: int = 128
    """Tokens of an answer at most; a prompt that leaves no room for them is left out and counted."""
    temperature: float = 1.0
    """Of sampling, and of every log-prob."""
    no_end_score: float = -1.0
    """Score *instead of* the reward model's for an answer that never ends (rewards are centred on
    demonstrations)."""
    kl: KLConfig = field(default_factory=KLConfig)
    """The tie to the reference."""
    ppo: ppo.Config = field(default_factory=ppo.Config)
    """Clipping, GAE, entropy bonus."""
    epochs: int = 1
    """Passes over each rollout."""
    minibatches: int = 1
    """Updates per pass."""
    whiten: bool = True
    """Bring the advantages of a rollout to mean 0 and variance 1."""
    ptx_weight: float = 0.1
    """Weight of the next-token loss on the ptx data (both losses are means per token); used when ptx is
    given."""
    ptx_tokens: int = 2048
    """ptx tokens per update."""
    lr: float | None = None
    """Policy's peak learning rate; none: 1/100 of what pre-training at this width starts from."""
    critic_lr: float | None = None
    """Critic's peak learning rate; none: five times the policy's."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices."""
    schedule: ScheduleKind = "linear"
    """Learning rates over time: linear, cosine, wsd or constant."""
    final_ratio: float = 0.1
    """Learning rates at the end, as a share of the peak."""
    micro_tokens: int = 4096
    """Tokens per forward pass; bounds memory."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Weights and activations; masters, log-probs, values and rewards stay fp32."""
    seed: int = 0
    """Of prompts, sampling and minibatches."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_prompts", "samples", "max_new_tokens", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.temperature > 0:
            raise UserError(
                f"temperature is {self.temperature}; a policy that learns must be sampled, so above 0"
            )
        if not 1 <= self.minibatches <= self.batch_prompts * self.samples:
            raise UserError(
                "minibatches must lie between 1 and the answers of a rollout (batch_prompts x samples)"
            )


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    machine = runtime.setup(rt, cfg.seed, cfg.precision)
    method = stage.load("algos/rl", cfg.algo)
    tok = Tokenizer.load(inputs["policy"].path)
    start.same_vocabulary(inputs["policy"].path, inputs["reward"].path)
    models = start.load(inputs, cfg, machine, tok)
    policy: Any = models.policy.model
    prompts = start.load_prompts(inputs["prompts"], tok, policy.spec.context, cfg)
    ptx = start.load_ptx(inputs.get("ptx"), tok, policy.spec.context, cfg)
    control: kl_algo.Fixed | kl_algo.Adaptive = kl_algo.controller(
        cfg.kl.coefficient, cfg.kl.target, cfg.kl.horizon
    )

    step, control = start.resume(models, control, rt.work / "state")
    metrics = Journal(rt.work / "metrics.jsonl", step, machine.first)
    timing = Journal(rt.work / "timing.jsonl", step, machine.first)
    saved_at = time.monotonic()
    while step < cfg.steps:
        clock = parts.Clock()
        rollout = parts.roll_out(models, prompts, step, cfg, tok)
        clock.lap("sample")
        minibatches = parts.minibatches(rollout, step, cfg)
        experience = parts.ask(models, rollout, minibatches, step, cfg)
        clock.lap("score")
        score_S = method.no_end_score(experience.score_S, torch.tensor(rollout.done), cfg.no_end_score)
        parts.advantages(experience, rollout, score_S, control.value, cfg, method)

        scale = lr_at(step, cfg.steps, 1.0, Schedule(kind=cfg.schedule, final_ratio=cfg.final_ratio))
        updates = []
        for epoch in range(cfg.epochs):
            for place, number in enumerate(parts.order(len(minibatches), step, epoch, cfg.seed)):
                count = (step * cfg.epochs + epoch) * cfg.minibatches + place
                first = epoch == place == 0
                updates.append(
                    parts.update(
                        models, minibatches[number], experience, ptx, count, scale, first, cfg, method
                    )
                )
        parts.stop_if_diverged(updates, metrics.path, step)
        clock.lap("update")

        numbers = parts.summary(rollout, experience, score_S, updates)
        metrics.write(step=step, kl_coefficient=control.value, lr=scale * models.policy.config.lr, **numbers)
        control = control.update(numbers["kl"], int(numbers["responses"]))
        step += 1
        timing.write(step=step - 1, **clock.seconds, tokens=len(rollout.ids_N))
        rt.report(
            step, cfg.steps, "steps", score=numbers["score"], kl=numbers["kl"], length=numbers["length"]
        )
        due = time.monotonic() - saved_at >= rt.save_seconds or bool(
            rt.save_steps and step % rt.save_steps == 0
        )
        if parallel.any_rank(due) or step == cfg.steps:
            metrics.sync()
            if machine.first:
                state.save(rt.work / "state", step, *start.checkpoint(models, control))
            parallel.barrier()
            saved_at = time.monotonic()

    if machine.first:
        source = inputs["policy"].path
        save_model(policy, out, source, machine.dtype, read_generation(source))
        tok.complete(out)
    return {**parts.facts(rt.work / "metrics.jsonl"), **prompts.facts, "kl_coefficient": control.value}

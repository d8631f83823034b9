"""One step of `rl`: the functions its loop calls, in the order it calls them.

Shapes: S sequences of a rollout (of this rank), R response tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caravan.algos.advantage import explained_variance, gae, whiten
from caravan.algos.kl import k1, k3
from caravan.data.loader import ExampleLoader, PretrainLoader
from caravan.data.pack import GroupBatch
from caravan.data.permute import feistel, mix
from caravan.data.tokenizer import Tokenizer
from caravan.engine import rollout as rollouts
from caravan.engine import score
from caravan.engine.rollout import Rollout
from caravan.stages._rl_start import Models, Prompts
from caravan.systems import metrics, parallel
from caravan.systems.train import lm_loss, to_device, train_step
from caravan.types import Batch, Loss, UserError

if TYPE_CHECKING:
    from caravan.stages.rl import Config

_PATIENCE = 3
"""Rollouts in a row with a non-finite update after which the run stops."""


@dataclass
class Experience:
    """What is known about each sequence of a rollout; lists have one [response length] tensor per sequence,
    CPU."""

    old: list[Tensor]
    reference: list[Tensor]
    value: list[Tensor]
    entropy: list[Tensor]
    score_S: Tensor
    advantage: list[Tensor] = field(default_factory=list)
    returns: list[Tensor] = field(default_factory=list)
    held: dict[str, Tensor] = field(default_factory=dict)
    """`policy` and `critic`: outputs of the first micro batch with their graphs, if it was small enough."""

    def of(self, name: str, batch: GroupBatch, device: torch.device) -> Tensor:
        """[R] values of one field for the sequences of a batch, in its order."""
        rows: list[Tensor] = getattr(self, name)
        return torch.cat([rows[i] for i in batch.index]).to(device)


class Clock:
    """Seconds per part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[f"{name}_seconds"] = now - self._last
        self._last = now


def roll_out(models: Models, prompts: Prompts, step: int, cfg: Config, tok: Tokenizer) -> Rollout:
    """This rank's share of the answers of a step."""
    total = len(prompts.ids)
    numbered = []
    for number in parallel.mine(range(cfg.batch_prompts)):
        epoch, place = divmod(step * cfg.batch_prompts + number, total)
        numbered.append((number, prompts.ids[int(feistel(place, total, mix(cfg.seed, epoch))[0])]))
    policy: Any = models.policy.model
    with score.asked(policy):
        return rollouts.sample(
            policy,
            numbered,
            cfg.samples,
            temperature=cfg.temperature,
            max_new_tokens=cfg.max_new_tokens,
            seed=mix(cfg.seed, step, 1) >> 1,
            stop_ids=tok.stop_ids,
            vocab_size=tok.vocab_size,
        )


def minibatches(rollout: Rollout, step: int, cfg: Config) -> list[list[GroupBatch]]:
    """The rollout cut into minibatches, each a list of flat micro batches of this rank.

    Drawn over the answers of all ranks, once per rollout: every epoch meets the same batches in another
    order, so that log-probs of sampling time and of the update come from identical forwards.
    """
    total = cfg.batch_prompts * cfg.samples
    place = np.argsort(feistel(np.arange(total), total, mix(cfg.seed, step, 2)))
    mine = [n * cfg.samples + j for n in parallel.mine(range(cfg.batch_prompts)) for j in range(cfg.samples)]
    members: list[list[int]] = [[] for _ in range(cfg.minibatches)]
    for local, number in enumerate(mine):
        members[int(place[number]) * cfg.minibatches // total].append(local)
    return [rollout.batches(chosen, cfg.micro_tokens) for chosen in members]


def order(count: int, step: int, epoch: int, seed: int) -> list[int]:
    """Order of the minibatches in an epoch; the first epoch starts with number 0."""
    if epoch == 0:
        return list(range(count))
    return [int(i) for i in feistel(np.arange(count), count, mix(seed, step, 3, epoch))]


def ask(
    models: Models, rollout: Rollout, parts: Sequence[Sequence[GroupBatch]], step: int, cfg: Config
) -> Experience:
    """Old and reference log-probs, values, entropy and scores of every sequence.

    Without gradients, but for one case: if the first minibatch is one micro batch of at most half of
    `micro_tokens`, the graphs of policy and critic are held, for its update would only compute them again (a
    fifth of a one-epoch step; two graphs of half the size take no more memory than one).
    """
    policy: Any = models.policy.model
    critic: Any = models.critic.model
    rows: dict[str, list[Any]] = {
        name: [None] * len(rollout) for name in ("old", "reference", "value", "entropy")
    }
    score_S = torch.zeros(len(rollout))
    sizes = rollout.response_lengths
    held: dict[str, Tensor] = {}
    with score.asked(policy, critic, models.reference, models.reward):
        for micro in (b for part in parts for b in part):
            batch = to_device(micro, models.device)
            entropy_R: Any
            hold = len(parts[0]) == 1 and parts[0][0] is micro and 2 * len(batch.ids_N) <= cfg.micro_tokens
            with torch.set_grad_enabled(hold):
                old_R, entropy_R = score.logprobs(policy, batch, cfg.temperature, entropy=True)
                value_R = score.values(critic, batch)
            if hold:
                held = {"policy": old_R, "critic": value_R}
                if cfg.ppo.entropy > 0:
                    held["entropy"] = entropy_R
            reference_R, _ = score.logprobs(models.reference, batch, cfg.temperature)
            found = {"old": old_R, "reference": reference_R, "value": value_R, "entropy": entropy_R}
            here = [sizes[i] for i in micro.index]
            for name, flat_R in found.items():
                for i, row in zip(micro.index, flat_R.detach().cpu().split(here), strict=True):
                    rows[name][i] = row
            score_S[list(micro.index)] = score.rewards(models.reward, batch).cpu()
    experience = Experience(**rows, score_S=score_S, held=held)
    if step == 0:
        _audit_reference(experience, models.policy.dtype)
    return experience


def _audit_reference(experience: Experience, dtype: torch.dtype) -> None:
    """rl-start: before the first update policy and reference are the same model, so their KL is 0."""
    worst = max(
        (float((a - b).abs().max()) for a, b in zip(experience.old, experience.reference, strict=True)),
        default=0,
    )
    if worst > (1e-5 if dtype == torch.float32 else 1e-2):
        raise UserError(
            f"audit rl-start: policy and reference differ by {worst:.3g} nats before the first update",
            "their weights or forwards differ; please report it",
        )


def advantages(
    experience: Experience, rollout: Rollout, score_S: Tensor, kl_coefficient: float, cfg: Config, method: Any
) -> None:
    """Fill in advantages (whitened over the rollout of all ranks) and returns (of the raw advantages)."""
    sizes = rollout.response_lengths
    old_R, reference_R, value_R = (
        torch.cat(x) for x in (experience.old, experience.reference, experience.value)
    )
    reward_R = method.shape_rewards(score_S, old_R, reference_R, sizes, kl_coefficient)
    adv_R, return_R = gae(reward_R, value_R, sizes, gamma=cfg.ppo.gamma, lam=cfg.ppo.lam)
    if cfg.whiten:
        adv_R = whiten(adv_R, total=parallel.sum_)
    experience.advantage, experience.returns = list(adv_R.split(sizes)), list(return_R.split(sizes))


def update(
    models: Models,
    micro: Sequence[GroupBatch],
    experience: Experience,
    ptx: ExampleLoader | PretrainLoader | None,
    count: int,
    scale: float,
    first: bool,
    cfg: Config,
    method: Any,
) -> dict[str, float]:
    """One minibatch: a step of the policy (with its ptx batches) and one of the critic. Returns their
    statistics.

    `count` numbers the updates of the run, `scale` is the schedule's share of the peak learning rates.
    """
    policy: Any = models.policy.model
    critic: Any = models.critic.model
    device = models.device
    tokens = torch.tensor(float(sum(len(experience.old[i]) for b in micro for i in b.index)))
    normaliser = float(parallel.sum_(tokens))
    worst, held = [0.0], experience.held

    def policy_loss(batch: Batch) -> Loss:
        if not isinstance(batch, GroupBatch):
            assert ptx is not None
            one = lm_loss(policy, batch, ptx.normaliser(count))
            return Loss(cfg.ptx_weight * one.value, {"ptx_loss": one.value.detach()})
        there = to_device(batch, device)
        logp_R, entropy_R = held.pop("policy", None), held.pop("entropy", None)
        if logp_R is None:
            logp_R, entropy_R = score.logprobs(policy, there, cfg.temperature, entropy=cfg.ppo.entropy > 0)
        old_R = experience.of("old", batch, device)
        if first:
            worst[0] = max(worst[0], method.ratio_error(logp_R, old_R))
        return method.policy_loss(
            logp_R, old_R, experience.of("advantage", batch, device), normaliser, cfg.ppo, entropy_R
        )

    def value_loss(batch: GroupBatch) -> Loss:
        value_R = held.pop("critic", None)
        if value_R is None:
            value_R = score.values(critic, to_device(batch, device))
        old_R, return_R = (experience.of(name, batch, device) for name in ("value", "returns"))
        return method.value_loss(value_R, old_R, return_R, normaliser, cfg.ppo)

    extra = parallel.mine(ptx.micro_batches(count, cfg.micro_tokens)) if ptx is not None else []
    moved = train_step(models.policy, [*micro, *extra], policy_loss, scale * models.policy.config.lr)
    _audit_ratio(worst[0], models.policy.dtype)
    learnt = train_step(models.critic, micro, value_loss, scale * models.critic.config.lr)
    return {
        **moved.stats,
        **learnt.stats,
        "grad_norm": moved.grad_norm,
        "critic_grad_norm": learnt.grad_norm,
        "applied": float(moved.applied and learnt.applied),
        **({"first_ratio_error": worst[0]} if first else {}),
    }


def _audit_ratio(worst: float, dtype: torch.dtype) -> None:
    """rl-ratio: the first minibatch of a rollout is on-policy, so every ratio is 1."""
    if worst > (1e-5 if dtype == torch.float32 else 1e-2):
        raise UserError(
            f"audit rl-ratio: the policy ratio of the first minibatch is off 1 by {worst:.3g}",
            "log-probs of sampling time and of the update differ; please report it",
        )


def stop_if_diverged(updates: Sequence[dict[str, float]], journal: Path, step: int) -> None:
    """Raise UserError when several rollouts in a row had an update that was not finite.

    Counted in the journal, which a resumed run finds as it was.
    """
    if all(u["applied"] for u in updates):
        return
    before = list(metrics.read(journal))[-(_PATIENCE - 1) :]
    if len(before) == _PATIENCE - 1 and all(row["applied"] < 1.0 for row in before):
        raise UserError(
            f"training diverged: {_PATIENCE} rollouts in a row with a non-finite loss (step {step})",
            "lower lr, or try precision fp32",
        )


def summary(
    rollout: Rollout, experience: Experience, score_S: Tensor, updates: Sequence[dict[str, float]]
) -> dict[str, float]:
    """The numbers of a step over all ranks. KL is summed per response; the first update's statistics are its
    start."""
    old_R, reference_R = torch.cat(experience.old), torch.cat(experience.reference)
    sampled_R = torch.tensor(rollout.sampled_logp_R)
    done_S = torch.tensor(rollout.done, dtype=torch.float32)
    sums = torch.stack(
        [
            torch.tensor(float(len(rollout))),
            torch.tensor(float(len(old_R))),
            score_S.sum(),
            score_S.square().sum(),
            experience.score_S.sum(),
            (1.0 - done_S).sum(),
            k1(old_R, reference_R).sum(),
            k3(old_R, reference_R).sum(),
            torch.cat(experience.entropy).sum(),
            (sampled_R - old_R).abs().sum(),
        ]
    )
    n, tokens, total, squares, raw, cut, kl, kl3, entropy, mismatch = parallel.sum_(sums).tolist()
    mean = total / n
    value_R, return_R = torch.cat(experience.value), torch.cat(experience.returns)
    averaged = {
        name: _mean(updates, name) for name in sorted({k for u in updates for k in u} - {"first_ratio_error"})
    }
    return {
        "score": mean,
        "score_std": max(squares / n - mean * mean, 0.0) ** 0.5,
        "reward": raw / n,
        "kl": kl / n,
        "kl_k3": kl3 / n,
        "entropy": entropy / tokens,
        "length": tokens / n,
        "no_end_rate": cut / n,
        "responses": n,
        "tokens": tokens,
        "sampler_difference": mismatch / tokens,
        "explained_variance": float(explained_variance(value_R, return_R)),
        "first_ratio_error": updates[0]["first_ratio_error"],
        **averaged,
    }


def _mean(updates: Sequence[dict[str, float]], name: str) -> float:
    found = [u[name] for u in updates if name in u]
    return sum(found) / len(found)


def facts(journal: Path) -> dict[str, Any]:
    """Means over the first and the last tenth of the steps: what training did."""
    rows = list(metrics.read(journal))
    tenth = max(1, len(rows) // 10)
    out: dict[str, Any] = {"steps": len(rows)}
    for name in (
        "score",
        "reward",
        "kl",
        "entropy",
        "length",
        "no_end_rate",
        "explained_variance",
        "clipfrac",
    ):
        for label, some in (("first", rows[:tenth]), ("last", rows[-tenth:])):
            values = [row[name] for row in some if isinstance(row.get(name), int | float)]
            out[f"{name}_{label}"] = sum(values) / len(values) if values else None
    out["skipped_updates"] = sum(1 for row in rows if row.get("applied", 1.0) < 1.0)
    return out

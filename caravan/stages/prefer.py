"""Train a policy on preferences directly, without a reward model (DPO and its relatives).

    loss = -log sigmoid(beta [(log pi(c) - log pi(r)) - (log ref(c) - log ref(r))])
    algos/preference/dpo.py

The reference is the policy as it comes in; its log-probs are computed once per answer, before training, in
the very batches the first epoch will use. So the first loss is ln 2 to the last digits, and the stage refuses
to go on if it is not. All candidates of a prompt go through one packed forward; with K ranked answers the
pairs of a prompt share a weight of 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from caravan import stage
from caravan.algos import reward as ranking
from caravan.algos.logprobs import segment_sums
from caravan.algos.optim import OptimConfig
from caravan.algos.schedule import Schedule, ScheduleKind
from caravan.data.loader import RankingLoader, group_batches
from caravan.data.pack import GroupBatch
from caravan.data.rankings import RankedGroups, load_rankings, need
from caravan.data.tokenizer import Tokenizer
from caravan.engine import score
from caravan.model.checkpoint import check_vocab, load_model, read_generation, save_model
from caravan.model.decoder import Decoder
from caravan.model.sizes import suggested_lr
from caravan.stage import Runtime
from caravan.stages.reward import accuracy_interval
from caravan.store import Artefact
from caravan.systems import loop, parallel, runtime, state
from caravan.systems.guard import GuardConfig
from caravan.systems.train import Trainee, to_device
from caravan.types import Loss, UserError

INPUTS = {"policy": "model", "data": "preferences"}
OUTPUT = "model"
USES = {"algo": "algos/preference"}
VERSION = 1
RANKS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to train on preferences."""

    algo: str = "dpo"
    """Method: a file of algos/preference."""
    beta: float = 0.1
    """Strength of the tie to the reference, per nat of log-ratio: larger stays closer."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong, in [0, 0.5)."""
    nll_weight: float = 0.0
    """Weight of the next-token loss on each prompt's best answer, a mean per token; it keeps good answers
    likely while bad ones are pushed away."""
    epochs: float = 1.0
    """Passes over the preferences."""
    batch_tokens: int = 8192
    """Tokens per optimiser step."""
    micro_tokens: int = 4096
    """Tokens per forward pass; bounds memory."""
    context: int | None = None
    """Longest prompt with answer in tokens; none: what the base was trained for. Longer ones are left out and
    counted."""
    lr: float | None = None
    """Peak learning rate; none: 1/100 of what pre-training at this width starts from."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices."""
    schedule: ScheduleKind = "linear"
    """Learning rate over time: linear, cosine, wsd or constant."""
    warmup_share: float = 0.05
    """Share of the steps with rising rate."""
    final_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    eval_steps: int = 0
    """Measure held-out loss every so many steps; 0 at the end only."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Weights and activations; masters and log-probs stay fp32."""
    seed: int = 0
    """Of the order of prompts."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5")
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be above 0")
        if not self.nll_weight >= 0:
            raise UserError(f"nll_weight is {self.nll_weight}; it must be at least 0")


@dataclass(frozen=True, slots=True)
class Reference:
    """Ranks and reference log-probs of the candidates of each group."""

    ranks: Sequence[tuple[int, ...]]
    logp: list[Tensor]
    """[K] float32 sums of response log-probs, per group."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    machine = runtime.setup(rt, cfg.seed, cfg.precision)
    policy, data = inputs["policy"].path, inputs["data"].path
    method = stage.load("algos/preference", cfg.algo)
    tok = Tokenizer.load(policy)
    model = load_model(policy, device=machine.device)
    check_vocab(model.spec, tok.vocab_size)
    limit = min(cfg.context or model.spec.context, model.spec.context)
    train = need(load_rankings(data / "train.jsonl", tok, limit), data / "train.jsonl")
    held = load_rankings(data / "heldout.jsonl", tok, limit)

    optim = OptimConfig(lr=cfg.lr or suggested_lr(model.spec) / 100, eps=1e-5, weight_decay=cfg.weight_decay)
    trainee = Trainee(model, optim, machine.dtype)
    loader = RankingLoader(train.groups, cfg.batch_tokens, cfg.seed)
    steps = max(1, round(cfg.epochs * loader.steps_per_epoch))
    epoch = [b for s in range(loader.steps_per_epoch) for b in loader.micro_batches(s, cfg.micro_tokens)]
    held_batches = list(group_batches(held.groups, cfg.micro_tokens))
    reference = Reference(train.ranks, reference_logprobs(model, epoch, train, rt.work / "reference"))
    held_reference = Reference(
        held.ranks, reference_logprobs(model, held_batches, held, rt.work / "reference-heldout")
    )
    audit_first_loss(model, epoch[0], reference, cfg, method)

    def loss(model: Decoder, batch: GroupBatch, normaliser: float) -> Loss:
        return preference_loss(model, batch, reference, normaliser, cfg, method)

    def evaluate(model: Decoder) -> dict[str, float]:
        return loop.heldout(
            model,
            held_batches,
            lambda m, b, n: preference_loss(m, b, held_reference, n, cfg, method),
            len(held),
        )

    plan = loop.LoopConfig(
        steps=steps,
        micro_tokens=cfg.micro_tokens,
        optim=optim,
        schedule=Schedule(
            kind=cfg.schedule,
            warmup_steps=max(1, round(cfg.warmup_share * steps)),
            final_ratio=cfg.final_ratio,
        ),
        eval_steps=cfg.eval_steps,
        guard=GuardConfig(
            sigma=0.0
        ),  # a few hard pairs dominate the gradient once the rest is solved: no outliers
    )
    history = loop.run(trainee, loader, loss, plan, rt, evaluate if len(held) else None, say=machine.say)
    if machine.first:
        save_model(model, out, policy, machine.dtype, read_generation(policy))
        tok.complete(out)
    return {
        "prompts": len(train),
        "pairs": len(ranking.ranked_pairs(train.ranks).better),
        "refused": train.refused,
        "steps": history.step,
        "skipped_steps": history.skipped,
        "lr": optim.lr,
        "first_loss": history.first_loss,
        "last_loss": history.last_loss,
        "heldout": heldout_facts(model, held, held_batches, held_reference, cfg.beta, history.last_eval),
        "refused_heldout": held.refused,
    }


def candidate_logprobs(model: Decoder, batch: GroupBatch) -> Tensor:
    """logp_S: the log-prob of each candidate's answer, summed over its tokens, stop token included."""
    batch = to_device(batch, model.embed.weight.device)  # type: ignore[assignment]
    logp_R, _ = score.logprobs(model, batch)
    return segment_sums(logp_R, score.supervised(batch)[1])


def preference_loss(
    model: Decoder, batch: GroupBatch, reference: Reference, normaliser: float, cfg: Config, method: Any
) -> Loss:
    """The method's loss over all ordered pairs of the batch's groups; `normaliser` is prompts of the step.

    With `nll_weight`, plus that times the mean over prompts of the best answer's loss per token (Pang et al.
    2024, arXiv 2404.19733, eq. 1).
    """
    logp_S = candidate_logprobs(model, batch)
    ref_S = torch.cat([reference.logp[i] for i in batch.index]).to(logp_S.device)
    ranks = [reference.ranks[i] for i in batch.index]
    pairs = ranking.ranked_pairs(ranks)
    better, worse = list(pairs.better), list(pairs.worse)
    one: Loss = method.loss(
        logp_S[better],
        logp_S[worse],
        ref_S[better],
        ref_S[worse],
        normaliser,
        beta=cfg.beta,
        label_smoothing=cfg.label_smoothing,
        weight_P=torch.tensor(pairs.weight, device=logp_S.device),
    )
    if cfg.nll_weight == 0.0:
        return one
    best = _best(ranks)
    tokens_G = torch.tensor(score.supervised(batch)[1], device=logp_S.device)[best]
    nll = -(logp_S[best] / tokens_G).sum() / normaliser
    return Loss(one.value + cfg.nll_weight * nll, {**one.stats, "nll": nll.detach()})


def _best(ranks: Sequence[Sequence[int]]) -> list[int]:
    """Place of the first best answer of each group, among all answers end to end."""
    found, at = [], 0
    for group in ranks:
        found.append(at + min(range(len(group)), key=group.__getitem__))
        at += len(group)
    return found


def reference_logprobs(
    model: Decoder, batches: Sequence[GroupBatch], data: RankedGroups, cache: Path
) -> list[Tensor]:
    """Log-probs of every candidate under the untrained policy, one [K] tensor per group; kept in `cache`.

    `model` must still hold the weights it came with: this runs before any checkpoint is loaded.
    """
    sizes = [len(group) for group in data.groups]
    kept = state.load_latest(cache, restore_rng=False)
    if kept is not None:
        return list(kept.tensors["logp"].split(sizes))
    starts = torch.tensor([0, *sizes]).cumsum(0)
    flat = torch.zeros(sum(sizes))
    with score.asked(model):
        for batch in parallel.mine(batches):
            logp_S = candidate_logprobs(model, batch).cpu()
            for index, part in zip(batch.index, logp_S.split(list(batch.groups)), strict=True):
                flat[starts[index] : starts[index + 1]] = part
    parallel.sum_(flat)
    if parallel.rank_world()[0] == 0 and sizes:
        state.save(cache, 0, {"logp": flat}, {})
    parallel.barrier()
    return list(flat.split(sizes)) if sizes else []


def audit_first_loss(
    model: Decoder, batch: GroupBatch, reference: Reference, cfg: Config, method: Any
) -> None:
    """dpo-start: while policy and reference agree the loss is ln 2. Same batch and weights: to 1e-6 in any
    dtype."""
    expected = getattr(method, "FIRST_LOSS", None)
    if expected is None:
        return
    with score.asked(model):
        pure = replace(cfg, nll_weight=0.0)
        first = preference_loss(model, batch, reference, len(batch.groups), pure, method).value.item()
    if abs(first - expected) > 1e-6:
        raise UserError(
            f"audit dpo-start: the first loss is {first:.8f}, it must be {expected:.8f}",
            "the work folder holds log-probs of another reference: `caravan gc` removes it",
        )


def heldout_facts(
    model: Decoder,
    held: RankedGroups,
    batches: Sequence[GroupBatch],
    reference: Reference,
    beta: float,
    last_eval: dict[str, float],
) -> dict[str, Any]:
    """Accuracy of the implicit reward beta (log pi - log ref) with its interval, and the last evaluation."""
    if not len(held):
        return {}
    reward: list[list[float]] = [[] for _ in held.groups]
    with score.asked(model):
        for batch in batches:
            logp_S = candidate_logprobs(model, batch).cpu()
            for index, part in zip(batch.index, logp_S.split(list(batch.groups)), strict=True):
                reward[index] = (beta * (part - reference.logp[index])).tolist()
    low, high = accuracy_interval(reward, held.ranks)
    return {**last_eval, "prompts": len(held), "accuracy_low": low, "accuracy_high": high}

"""Train a reward model: a scalar at the end of an answer that ranks answers as the judges did.

    loss = -mean over prompts of the mean over ordered pairs of log sigmoid(s_better - s_worse)

(Bradley-Terry; Ouyang et al. 2022, arXiv 2203.02155, eq. 1.) The trunk is the SFT model; the head starts with
std 1/sqrt(d+1) and reads the end-of-turn token. An encoder (BERT, DeBERTa, ...) may be the trunk, too: it is
read at the token its family pools, the first as a rule. All candidates of a prompt go through one packed
forward and stay in one batch element: shuffled apart they would be overfitted. Afterwards a constant is
subtracted so that reference demonstrations score 0 on average: the no-end-of-turn rule of PPO and the critic
both rely on a centred scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from caravan.algos import reward as algo
from caravan.algos.optim import OptimConfig
from caravan.algos.schedule import Schedule, ScheduleKind
from caravan.data.loader import RankingLoader, group_batches
from caravan.data.pack import GroupBatch
from caravan.data.rankings import RankedGroups, load_rankings, need, response_lengths
from caravan.data.records import read_conversations
from caravan.data.render import Rendered, render_pair
from caravan.data.tokenizer import Tokenizer
from caravan.engine import score
from caravan.evals.stats import bootstrap
from caravan.model.checkpoint import check_vocab, fresh_head, load_backbone, save_reward
from caravan.model.decoder import Decoder
from caravan.model.heads import RewardModel
from caravan.model.sizes import suggested_lr
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.systems import loop, runtime
from caravan.systems.guard import GuardConfig
from caravan.systems.train import Trainee, to_device
from caravan.types import Conversation, Loss

INPUTS = {"base": "model", "data": "preferences", "references": "conversations?"}
OUTPUT = "reward"
USES: dict[str, str] = {}
VERSION = 1
RANKS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to train the reward model."""

    loss: Literal["pairs", "softmax"] = "pairs"
    """`pairs`: mean over all ordered pairs of a prompt (InstructGPT); `softmax`: cross-entropy of the best of
    K."""
    epochs: float = 1.0
    """Passes over the preferences. More than one usually costs held-out accuracy."""
    batch_tokens: int = 8192
    """Tokens per optimiser step."""
    micro_tokens: int = 4096
    """Tokens per forward pass; bounds memory."""
    context: int | None = None
    """Longest prompt with answer in tokens; none: what the base was trained for. Longer ones are left out and
    counted."""
    margin: float = 0.0
    """Distance asked for between better and worse, in units of the score."""
    centring: float = 0.0
    """Weight of (s_better + s_worse)^2 in the loss; 0.01 is usual where scores drift."""
    reference_samples: int = 512
    """Demonstrations (at most) whose mean score becomes 0."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, the rest by AdamW."""
    lr: float | None = None
    """Peak learning rate; none: 1/20 of what pre-training at this width starts from."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices."""
    schedule: ScheduleKind = "cosine"
    """Learning rate over time: linear, cosine, wsd or constant."""
    warmup_share: float = 0.05
    """Share of the steps with rising rate."""
    final_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    eval_steps: int = 0
    """Measure held-out loss every so many steps; 0 at the end only."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Weights and activations; masters and the head stay fp32."""
    seed: int = 0
    """Of the head's first weights and the order of prompts."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    machine = runtime.setup(rt, cfg.seed, cfg.precision)
    base, data = inputs["base"].path, inputs["data"].path
    tok = Tokenizer.load(base)
    model = fresh(load_backbone(base, device=machine.device), cfg.seed)
    check_vocab(model.decoder.spec, tok.vocab_size)
    limit = min(cfg.context or model.decoder.spec.context, model.decoder.spec.context)
    train = need(load_rankings(data / "train.jsonl", tok, limit), data / "train.jsonl")
    held = load_rankings(data / "heldout.jsonl", tok, limit)

    optim = OptimConfig(
        name=cfg.optimizer,
        lr=cfg.lr or suggested_lr(model.decoder.spec) / 20,
        eps=1e-5,
        weight_decay=cfg.weight_decay,
    )
    trainee = Trainee(model, optim, machine.dtype, keep_fp32=("score",))
    loader = RankingLoader(train.groups, cfg.batch_tokens, cfg.seed)

    def loss(model: RewardModel, batch: GroupBatch, normaliser: float) -> Loss:
        return ranking_loss(model, batch, train.ranks, normaliser, cfg)

    def held_loss(model: RewardModel, batch: GroupBatch, normaliser: float) -> Loss:
        return ranking_loss(model, batch, held.ranks, normaliser, cfg)

    def evaluate(model: RewardModel) -> dict[str, float]:
        return loop.heldout(model, list(group_batches(held.groups, cfg.micro_tokens)), held_loss, len(held))

    steps = max(1, round(cfg.epochs * loader.steps_per_epoch))
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

    as_saved(model, machine.dtype)
    references = demonstrations(inputs.get("references"), train, tok, limit, cfg.reference_samples)
    mean, std = centre(model, references, cfg.micro_tokens)
    if machine.first:
        save_reward(model, out, base, machine.dtype)
        tok.complete(out)
    return {
        "prompts": len(train),
        "pairs": len(algo.ranked_pairs(train.ranks).better),
        "refused": train.refused,
        "steps": history.step,
        "skipped_steps": history.skipped,
        "lr": optim.lr,
        "first_loss": history.first_loss,
        "last_loss": history.last_loss,
        "reward_bias": mean,
        "reference_samples": len(references),
        "reference_std": std,
        "heldout": measure(model, held, cfg.micro_tokens) if len(held) else {},
        "refused_heldout": held.refused,
    }


def fresh(decoder: Decoder, seed: int) -> RewardModel:
    """The decoder (or encoder) without its vocabulary head, and a new scalar head of std 1/sqrt(d+1)."""
    head = fresh_head(decoder, torch.Generator().manual_seed(seed))
    decoder.spec = replace(decoder.spec, head=False)
    for part in getattr(decoder, "HEADS", ("head", "tied_bias")):
        setattr(decoder, part, None)
    return RewardModel(decoder, head.to(decoder.embed.weight.device))


def ranking_loss(
    model: RewardModel, batch: GroupBatch, ranks: Sequence[Sequence[int]], normaliser: float, cfg: Config
) -> Loss:
    """Loss of a batch of whole groups; `ranks[i]` belongs to group i of the data set, `normaliser` is
    prompts."""
    there = to_device(batch, model.score.bias.device)
    return score_loss(score.rewards(model, there), [ranks[i] for i in batch.index], normaliser, cfg)


def score_loss(score_S: Tensor, ranks: Sequence[Sequence[int]], normaliser: float, cfg: Config) -> Loss:
    """The configured loss of flat scores, plus the centring term, with the statistics of the pairs."""
    pairs = algo.ranked_pairs(ranks)
    better_P, worse_P = score_S[list(pairs.better)], score_S[list(pairs.worse)]
    weight_P = torch.tensor(pairs.weight, device=score_S.device)
    one = algo.pairwise_loss(better_P - worse_P, normaliser, weight_P=weight_P, margin=cfg.margin)
    if cfg.loss == "softmax":
        best = algo.softmax_loss(score_S, ranks, normaliser)
        one = Loss(best.value, {**one.stats, "loss": best.stats["loss"]})
    if cfg.centring:
        term = algo.centring_loss((better_P + worse_P) * weight_P.sqrt(), normaliser, cfg.centring)
        one = Loss(one.value + term, one.stats)
    return one


def as_saved(model: RewardModel, dtype: torch.dtype) -> None:
    """Give the head the very weights that will lie in the file, so that bias and facts belong to them."""
    model.requires_grad_(False).eval()
    for p in model.score.parameters():
        p.data = p.data.to(dtype).float()


def demonstrations(
    references: Artefact | None, train: RankedGroups, tok: Tokenizer, limit: int, most: int
) -> list[Rendered]:
    """What should score 0: last answers of the reference conversations, or without those the best-ranked
    answers."""
    if references is None:
        best = [g[r.index(min(r))] for g, r in zip(train.groups, train.ranks, strict=True)]
        return best[:most]
    found: list[Rendered] = []
    for path in (references / "heldout.jsonl", references / "train.jsonl"):
        for conversation in read_conversations(path) if path.exists() else ():
            rendered = last_answer(conversation, tok)
            if rendered is not None and len(rendered) <= limit and len(found) < most:
                found.append(rendered)
    return found


def last_answer(conversation: Conversation, tok: Tokenizer) -> Rendered | None:
    """A conversation up to its last answer, ending at the stop token; None if nobody answers."""
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    if not turns:
        return None
    return render_pair(conversation.messages[: turns[-1]], conversation.messages[turns[-1]].content, tok)


def scores_of(
    model: RewardModel, groups: Sequence[Sequence[Rendered]], micro_tokens: int
) -> list[list[float]]:
    """Reward of every candidate, group by group."""
    found: list[list[float]] = [[] for _ in groups]
    device = model.score.bias.device
    with score.asked(model):
        for batch in group_batches(groups, micro_tokens):
            score_S = iter(score.rewards(model, to_device(batch, device)).tolist())  # type: ignore[arg-type]
            for index, size in zip(batch.index, batch.groups, strict=True):
                found[index] = [next(score_S) for _ in range(size)]
    return found


def centre(model: RewardModel, references: Sequence[Rendered], micro_tokens: int) -> tuple[float, float]:
    """Shift the bias so that references score 0 on average; returns (bias, standard deviation of their
    scores)."""
    if not references:
        return 0.0, float("nan")
    model.score.bias.zero_()
    reward = torch.tensor([s for (s,) in scores_of(model, [[r] for r in references], micro_tokens)])
    model.score.bias.fill_(float(reward.mean()))
    return float(model.score.bias), float(reward.std(correction=0))


def measure(model: RewardModel, held: RankedGroups, micro_tokens: int) -> dict[str, Any]:
    """Accuracy with its interval, calibration, length bias, mean and spread of rewards on held-out
    preferences."""
    reward = scores_of(model, held.groups, micro_tokens)
    flat = torch.tensor([s for group in reward for s in group])
    tokens = torch.tensor([n for group in held.groups for n in response_lengths(group)], dtype=torch.float32)
    pairs = algo.ranked_pairs(held.ranks)
    better, worse = list(pairs.better), list(pairs.worse)
    difference_P = flat[better] - flat[worse]
    ece, table = algo.calibration(difference_P)
    low, high = accuracy_interval(reward, held.ranks)
    return {
        "prompts": len(held),
        "pairs": len(better),
        "accuracy": algo.accuracy(difference_P),
        "accuracy_low": low,
        "accuracy_high": high,
        "loss": float(algo.pairwise_loss(difference_P, len(better)).value),
        "calibration_error": ece,
        "reliability": table,
        "length_bias": algo.length_bias(difference_P, tokens[better] - tokens[worse]),
        "reward_mean": float(flat.mean()),
        "reward_std": float(flat.std(correction=0)),
    }


def accuracy_interval(
    reward: Iterable[Sequence[float]], ranks: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """95 % bootstrap interval of the pair accuracy; whole prompts are drawn, their pairs go together."""
    right, count = [], []
    for scores, group in zip(reward, ranks, strict=True):
        pairs = algo.ranked_pairs([group])
        s = torch.tensor(scores)
        right.append(algo.accuracy(s[list(pairs.better)] - s[list(pairs.worse)]) * len(pairs.better))
        count.append(float(len(pairs.better)))
    found = bootstrap(right, count)
    return found.low, found.high

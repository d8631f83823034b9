"""What `rl` starts from: models, prompts, ptx data, the last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from caravan.algos.kl import Adaptive, Fixed
from caravan.algos.optim import OptimConfig
from caravan.data.loader import ExampleLoader, PretrainLoader
from caravan.data.pack import fit
from caravan.data.records import read_conversations
from caravan.data.render import render
from caravan.data.shards import Shards
from caravan.data.tokenizer import Tokenizer
from caravan.engine import score
from caravan.model.checkpoint import check_vocab, load_model, load_reward
from caravan.model.decoder import Decoder
from caravan.model.heads import PooledHead, RewardModel
from caravan.model.sizes import suggested_lr
from caravan.store import Artefact
from caravan.systems import parallel, state
from caravan.systems.runtime import Machine
from caravan.systems.train import Trainee
from caravan.types import Conversation, UserError

if TYPE_CHECKING:
    from caravan.stages.rl import Config


@dataclass(frozen=True)
class Models:
    """The four roles. Reference and reward only answer; the critic starts as a copy of the reward model."""

    policy: Trainee
    critic: Trainee
    reference: Decoder
    reward: RewardModel
    device: torch.device


@dataclass(frozen=True)
class Prompts:
    """Token ids of every usable prompt, and what was left out."""

    ids: list[list[int]]
    facts: dict[str, int]


def same_vocabulary(policy: Path, reward: Path) -> None:
    """Raise UserError unless both folders cut text into the same ids: the reward model reads the policy's
    ids."""
    if not Tokenizer.load(policy).alike(Tokenizer.load(reward)):
        raise UserError(
            "the reward model's vocabulary differs from the policy's",
            "train the reward model from this policy or a relative of it (`caravan reward --base ...`)",
        )


def load(inputs: Mapping[str, Artefact], cfg: Config, machine: Machine, tok: Tokenizer) -> Models:
    """Policy and critic with their optimisers, reference and reward frozen, all in the machine's dtype."""
    device, dtype = machine.device, machine.dtype
    policy = load_model(inputs["policy"].path, device=device)
    critic = load_reward(inputs["reward"].path, device=device)
    if isinstance(critic.score, PooledHead):
        raise UserError(
            f"{inputs['reward'].ref} is an encoder: it reads whole answers, but the critic, which starts "
            "from it, must value every token from the left",
            "train the reward model on a decoder, for example on the policy's own base",
        )
    for spec in (policy.spec, critic.decoder.spec):
        check_vocab(spec, tok.vocab_size)
    optim = OptimConfig(lr=cfg.lr or suggested_lr(policy.spec) / 100, eps=1e-5, weight_decay=cfg.weight_decay)
    return Models(
        policy=Trainee(policy, optim, dtype),
        critic=Trainee(critic, replace(optim, lr=cfg.critic_lr or 5 * optim.lr), dtype, keep_fp32=("score",)),
        reference=score.frozen(load_model(inputs["policy"].path, device=device), dtype, device),
        reward=score.frozen(load_reward(inputs["reward"].path, device=device), dtype, device),
        device=device,
    )


def load_prompts(data: Artefact, tok: Tokenizer, context: int, cfg: Config) -> Prompts:
    """Each training conversation up to its last answer. Raises UserError when nothing usable is left."""
    found: list[list[int]] = []
    too_long = without = 0
    for conversation in read_conversations(data / "train.jsonl"):
        messages = before_last_answer(conversation)
        if not messages.messages:
            without += 1
            continue
        ids = render(messages.messages, tok, generation_prompt=True).ids
        if len(ids) + cfg.max_new_tokens > context:
            too_long += 1
        else:
            found.append(ids)
    if cfg.batch_prompts < parallel.rank_world()[1]:
        raise UserError(
            f"{cfg.batch_prompts} prompts per rollout cannot feed {parallel.rank_world()[1]} ranks"
        )
    if not found:
        raise UserError(
            f"{data.ref} holds no usable prompt: {too_long} leave no room for {cfg.max_new_tokens} new "
            f"tokens in a context of {context}, {without} have no turn before the answer",
            "lower max_new_tokens or give other conversations",
        )
    return Prompts(found, {"prompts": len(found), "prompts_too_long": too_long, "prompts_empty": without})


def before_last_answer(conversation: Conversation) -> Conversation:
    """The conversation without its last answer and what follows it; whole if nobody answered."""
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    stop = turns[-1] if turns else len(conversation.messages)
    return Conversation(conversation.messages[:stop], conversation.id, conversation.source)


def load_ptx(
    data: Artefact | None, tok: Tokenizer, context: int, cfg: Config
) -> ExampleLoader | PretrainLoader | None:
    """The loader of the next-token batches mixed into every update; None without ptx or with weight 0."""
    if data is None or cfg.ptx_weight == 0:
        return None
    if data.kind == "shards":
        return PretrainLoader(
            Shards.open(data.path, "train"), cfg.ptx_tokens, min(context, cfg.ptx_tokens), cfg.seed
        )
    rows = [fit(render(c.messages, tok), context) for c in read_conversations(data / "train.jsonl")]
    return ExampleLoader([row for row in rows if row is not None], cfg.ptx_tokens, cfg.seed)


# -- checkpoints ---------------------------------------------------------------------------------------------


def checkpoint(models: Models, control: Fixed | Adaptive) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a step changes. Reference and reward are inputs of the stage, so their ids identify them;
    sampling and data are functions of the step number."""
    tensors = {**models.policy.tensors("policy."), **models.critic.tensors("critic.")}
    scalars = {
        **models.policy.scalars("policy."),
        **models.critic.scalars("critic."),
        "kl_coefficient": control.value,
    }
    return tensors, scalars


def resume(models: Models, control: Fixed | Adaptive, folder: Path) -> tuple[int, Fixed | Adaptive]:
    """(steps done, KL controller) of the newest checkpoint, with policy, critic and optimisers restored."""
    saved = state.load_latest(folder)
    if saved is None:
        return 0, control
    models.policy.load(saved.tensors, saved.scalars, "policy.")
    models.critic.load(saved.tensors, saved.scalars, "critic.")
    return saved.step, type(control)(**{**vars(control), "value": saved.scalars["kl_coefficient"]})

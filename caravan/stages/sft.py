"""Fine-tune a model on conversations: only what the assistant says carries loss.

    base model, conversations -> model:  minimise -log p(assistant tokens and their stop token | what stands
    before)

Conversations are packed without padding and never see each other. With `replay` shards, a share of every step
is pre-training text, which keeps what the base knew (the ptx idea of InstructGPT, Ouyang et al. 2022, arXiv
2203.02155). By default the last weights come out although the held-out loss may have risen: InstructGPT's
section 3.5 trained 16 epochs, over-fitted from the second on, and had better preference scores and human
ratings for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from caravan.algos.optim import OptimConfig
from caravan.algos.schedule import Schedule, ScheduleKind
from caravan.data.loader import ExampleLoader, PretrainLoader, example_batches
from caravan.data.pack import fit
from caravan.data.render import Rendered, render
from caravan.data.shards import Shards
from caravan.data.tokenizer import Tokenizer
from caravan.model.checkpoint import check_vocab, load_model, read_generation, save_model
from caravan.model.sizes import suggested_lr
from caravan.model.spec import Spec
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.systems import loop, runtime
from caravan.systems.train import Trainee, lm_loss
from caravan.types import Batch, Message, UserError

INPUTS = {"base": "model", "data": "conversations", "replay": "shards?"}
OUTPUT = "model"
USES: dict[str, str] = {}
VERSION = 1
RANKS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long and how to fine-tune. The model, its context and its tokenizer are inherited from `base`."""

    epochs: float = 2.0
    """Times every conversation is seen."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    context: int | None = None
    """Longest conversation in tokens; none: what the base was trained for. Longer ones are cut at a turn."""
    batch_tokens: int = 8192
    """Tokens of one optimiser step, prompts included."""
    micro_tokens: int = 4096
    """Tokens of one forward pass: memory against speed. It is Config because the order of additions moves
    last bits."""
    replay_share: float = 0.1
    """Share of the step's tokens that come from the `replay` shards, if they are given."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, the rest by AdamW."""
    lr: float | None = None
    """Peak learning rate; none: a tenth of what pre-training at this width starts from."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices."""
    balance_rate: float = 0.001
    """Experts chosen with a bias (DeepSeek-V3): how far a step moves it towards even use; 0: not at all."""
    schedule: ScheduleKind = "linear"
    """Learning rate over time: linear, cosine, wsd or constant."""
    warmup_share: float = 0.03
    """Share of the steps with rising rate."""
    final_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    seed: int = 0
    """Of the order of conversations."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of weights and activations; masters are fp32 always. auto: bf16 where it is right and fast."""
    eval_steps: int = 0
    """Evaluate on held-out conversations every so many steps; 0: after each epoch."""
    keep: Literal["best", "last"] = "last"
    """Weights that come out: lowest held-out loss, or the last."""
    template: str | None = None
    """Built-in chat template, by name; none: the one that comes with the base, or ChatML, or headings."""
    recompute: int = 0
    """Activation checkpointing: recompute groups of so many layers in the backward pass; 0: none, fastest."""


@dataclass
class Fit:
    """What became of the conversations on their way into the context."""

    whole: int = 0
    truncated: int = 0
    dropped: int = 0
    first: list[str] = field(default_factory=list)
    """The first few that did not fit, in words."""

    def unfit(self, at: str, whole: Rendered, cut: bool, context: int, strict: bool) -> None:
        """Count a conversation that was cut or dropped; with `strict` a UserError."""
        if any(whole.mask):
            said = f"{at}: {len(whole)} tokens do not fit a context of {context}"
            hint = "raise --context, shorten the conversation, or run without --strict to cut it at a turn"
        else:
            said = f"{at}: no assistant turn to learn from"
            hint = "remove the conversation, or run without --strict to drop it"
        if strict:
            raise UserError(said, hint)
        self.truncated, self.dropped = self.truncated + cut, self.dropped + (not cut)
        self.first += [said] if len(self.first) < 5 else []


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    """Fine-tune and write the model folder; facts are numbers that a repeated run gives again."""
    machine = runtime.setup(rt, cfg.seed, cfg.precision)
    base = inputs["base"].path
    tok = Tokenizer.load(base, cfg.template)
    model = load_model(base, torch.float32, machine.device)
    spec = model.spec
    check_vocab(spec, tok.vocab_size)
    context = _context(cfg, spec, machine.say)
    fitted, held_fit = Fit(), Fit()
    examples = _examples(inputs["data"].path, "train", tok, context, rt.strict, fitted)
    held = _examples(inputs["data"].path, "heldout", tok, context, rt.strict, held_fit)
    if not examples:
        raise UserError(
            f"no conversation of {inputs['data'].path} can be trained on: "
            f"{fitted.dropped} were read, none with an answer within {context} tokens",
            "raise --context, or look at the data: every conversation needs an assistant turn",
        )
    if fitted.truncated or fitted.dropped:
        machine.say(
            f"{fitted.truncated} conversations cut at a turn, {fitted.dropped} dropped: over {context} tokens"
        )

    loader: Any = ExampleLoader(examples, cfg.batch_tokens, cfg.seed)
    epoch = loader.steps_per_epoch
    if "replay" in inputs and cfg.replay_share > 0:
        shards = Shards.open(inputs["replay"].path, "train")
        check_vocab(spec, shards.vocab_size)
        replay_tokens = round(cfg.batch_tokens * cfg.replay_share / (1.0 - cfg.replay_share))
        loader = Mixed((loader, PretrainLoader(shards, replay_tokens, min(context, replay_tokens), cfg.seed)))
    plan = _plan(cfg, spec, epoch, machine.say)
    model.checkpoint_every = cfg.recompute
    trainee = Trainee(model, plan.optim, machine.dtype)
    evaluate = _evaluation(held or examples[:64], cfg.micro_tokens)
    history = loop.run(trainee, loader, lm_loss, plan, rt, evaluate, say=machine.say)
    if machine.first:
        save_model(model, out, base, machine.dtype, _generation(base, tok))
        tok.complete(out)
    final = history.best_eval if cfg.keep == "best" else history.last_eval
    return {
        "heldout_loss": final["loss"],
        "heldout_accuracy": final["accuracy"],
        "loss": history.last_loss,
        "conversations": len(examples),
        "epochs": round(history.step / epoch, 3),
        "steps": history.step,
        "supervised_tokens": int(history.tokens),
        "supervised_share": round(_supervised_share(examples), 4),
        "truncated": fitted.truncated,
        "dropped": fitted.dropped,
        "cut_first": [*fitted.first, *held_fit.first],
        "best_step": history.best_step,
        "skipped_steps": len(history.skipped),
        "rollbacks": len(history.rolled_back),
        "precision": str(machine.dtype)[6:],
        "lr": plan.optim.lr,
    }


@dataclass(frozen=True)
class Mixed:
    """Several loaders side by side under one normaliser: a token is a token, wherever it comes from."""

    loaders: Sequence[Any]

    def micro_batches(self, step: int, micro_tokens: int) -> list[Batch]:
        return [batch for loader in self.loaders for batch in loader.micro_batches(step, micro_tokens)]

    def normaliser(self, step: int) -> float:
        return sum(loader.normaliser(step) for loader in self.loaders)


def _generation(base: Path, tok: Tokenizer) -> dict[str, Any]:
    """The base's generation settings, and what now ends an answer where transformers and vLLM look for it: a
    base model's own list has no end of turn."""
    said = read_generation(base)
    return {**said, "eos_token_id": sorted(tok.stop_ids)} if tok.stop_ids else said


def _context(cfg: Config, spec: Spec, say: Callable[[str], None]) -> int:
    """The base's context, or the smaller one asked for. Raises UserError when more is asked than positions
    exist."""
    if cfg.context is None:
        say(f"context {spec.max_pos} tokens: inherited from the base")
        return spec.max_pos
    if cfg.context > spec.max_pos:
        raise UserError(
            f"a context of {cfg.context} tokens is more than the {spec.max_pos} the base was trained for",
            f"use --context {spec.max_pos} or less",
        )
    say(f"context {cfg.context} tokens: overrides the base's {spec.max_pos}")
    return cfg.context


def _plan(cfg: Config, spec: Spec, epoch: int, say: Callable[[str], None]) -> loop.LoopConfig:
    steps = cfg.steps if cfg.steps is not None else max(1, round(cfg.epochs * epoch))
    if steps < 1:
        raise UserError("there is nothing to do in 0 steps", "give --steps or --epochs above 0")
    lr = cfg.lr if cfg.lr is not None else suggested_lr(spec) / 10
    say(f"{steps} steps of {cfg.batch_tokens} tokens, {epoch} per epoch; peak learning rate {lr:.2g}")
    return loop.LoopConfig(
        steps=steps,
        micro_tokens=cfg.micro_tokens,
        optim=OptimConfig(
            name=cfg.optimizer, lr=lr, weight_decay=cfg.weight_decay, balance_rate=cfg.balance_rate
        ),
        schedule=Schedule(
            kind=cfg.schedule,
            warmup_steps=max(1, round(cfg.warmup_share * steps)),
            final_ratio=cfg.final_ratio,
        ),
        eval_steps=cfg.eval_steps or epoch,
        keep=cfg.keep,
    )


def _examples(
    folder: Path, split: str, tok: Tokenizer, context: int, strict: bool, count: Fit
) -> list[Rendered]:
    """Conversations as ids and masks, cut at a turn to fit; those without an answer inside the context are
    dropped."""
    examples = []
    for number, messages in _conversations(folder / f"{split}.jsonl"):
        whole = render(messages, tok)
        some = fit(whole, context)
        if some is not None and len(some) == len(whole):
            count.whole += 1
        else:
            count.unfit(f"{folder / split}.jsonl line {number}", whole, some is not None, context, strict)
        if some is not None:
            examples.append(some)
    return examples


def _conversations(path: Path) -> list[tuple[int, list[Message]]]:
    """(line number, messages) of a conversations file; an absent file is an empty split."""
    found: list[tuple[int, list[Message]]] = []
    if not path.exists():
        return found
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                messages = [Message(m["role"], m["content"]) for m in json.loads(line)["messages"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} line {number} is not a conversation: {error!r}",
                    "make the data with `caravan conversations`, which puts bad lines into quarantine",
                ) from None
            found.append((number, messages))
    return found


def _supervised_share(examples: Sequence[Rendered]) -> float:
    return sum(sum(e.mask) for e in examples) / max(1, sum(len(e) for e in examples))


def _evaluation(
    examples: Sequence[Rendered], micro_tokens: int
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Loss in nats per assistant token, and the share of them that the model would have chosen."""
    batches = list(example_batches(examples, micro_tokens))
    normaliser = sum(float(b.weight_N.sum()) for b in batches)

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        numbers = loop.heldout(model, batches, lm_loss, normaliser)
        return {"loss": numbers["loss"], "accuracy": numbers["correct"] / numbers["tokens"]}

    return evaluate

"""Train a language model on token shards, from nothing or from a base.

    shards (base) -> model:  minimise -log p(next token of the document | what stands before it in it)

From nothing, the size comes from one dial (`size` or `depth`); every number derived from it is printed with
its reason. With `base`, of any family, training goes on from its weights, on text in its own vocabulary.
Several shards are mixed by `--mix`, exactly and in phases if wanted. Documents in a row do not see each
other, nothing is padded, the logits are never held at once, weights live in bf16 where that is fast. A killed
run goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from caravan.algos.optim import OptimConfig
from caravan.algos.schedule import Schedule, ScheduleKind, batch_tokens_at
from caravan.data.loader import PretrainLoader, shard_batches
from caravan.data.rows import Packing
from caravan.data.tokenizer import Tokenizer
from caravan.model.checkpoint import check_vocab, load_model, read_generation, save_model
from caravan.model.decoder import Decoder
from caravan.model.grow import TABLES
from caravan.model.sizes import Reason, derive, fresh, suggested_lr
from caravan.model.spec import Spec
from caravan.stage import Runtime, series
from caravan.stages._sources import Sources
from caravan.store import Artefact
from caravan.systems import loop, runtime
from caravan.systems.train import Trainee, lm_loss
from caravan.types import Batch, Loss, UserError

INPUTS = {"shards": "shards+", "base": "model?"}
OUTPUT = "model"
USES: dict[str, str] = {}
VERSION = 1
RANKS = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, for how long, and how."""

    size: str = "tiny"
    """Name of a size: nano, tiny, small, gpt2, 1b. Ignored when depth is given."""
    depth: int | None = None
    """Layers; the width and all else follow from it."""
    only: Literal["all", "tables"] = "all"
    """What of a base is trained. tables: the embedding and the output head alone, the first stage after new
    words have come in with `grow`."""
    context: int = 512
    """Tokens of a row, and positions a new model is trained for."""
    steps: int | None = None
    """Optimiser steps; none: from `tokens`."""
    tokens: int | None = None
    """Tokens to train on; none: 20 per parameter, at most 4 epochs of the shards; one epoch with a base."""
    batch_tokens: int = 16384
    """Tokens of one optimiser step."""
    packing: Packing = "chunk"
    """How documents become rows: chunk cuts every `context` tokens; best_fit keeps documents whole, as many
    to a row as fit best; document puts each into a row of its own."""
    mix: tuple[str, ...] = ()
    """Several --shards: a weight for each, as `3,1`; in phases, as `0.8:3,1 0.2:1,4` (share of the steps:
    weights); `anneal:1,4` as the last phase lasts as long as wsd's rate falls. Empty: by size."""
    mix_by: Literal["proportion", "epochs"] = "proportion"
    """Weights are shares of the tokens, or how often each source is read (and so how long the run is, where
    neither steps nor tokens are given)."""
    mix_alpha: float = 1.0
    """Without weights a source has a share of the tokens ~ its size to this power: 1 by size, 0 all alike."""
    ramp_steps: int = 0
    """Steps over which the batch grows from a quarter to `batch_tokens`."""
    micro_tokens: int = 4096
    """Tokens of one forward pass: memory against speed. It is Config because the order of additions moves
    last bits."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, the rest by AdamW; fewer steps, each dearer (pays for batches from 16k
    tokens)."""
    lr: float | None = None
    """Peak learning rate; none: 3e-3 x sqrt(256 / width), with a base a tenth of it."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices."""
    schedule: ScheduleKind = "wsd"
    """Learning rate over time: wsd (flat, then down), cosine, linear or constant."""
    warmup_steps: int | None = None
    """Steps of linear rise; none: 2 % of all, at least 10, at most a tenth."""
    z_loss: float = 0.0
    """Weight of logsumexp^2, which keeps logits from drifting in long bf16 runs (PaLM: 1e-4)."""
    seed: int = 0
    """Of the weights and of the order of rows."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of weights and activations; masters are fp32 always. auto: bf16 where it is right and fast."""
    eval_steps: int = 0
    """Evaluate on held-out text every so many steps; 0: at the end only."""
    eval_tokens: int = 65536
    """Held-out tokens of an evaluation."""
    keep: Literal["best", "last"] = "last"
    """Weights that come out: lowest held-out loss, or the last."""
    recompute: int = 0
    """Activation checkpointing: recompute groups of so many layers in the backward pass; 0: none, fastest."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    """Train and write the model folder; facts are numbers that a repeated run gives again."""
    machine = runtime.setup(rt, cfg.seed, cfg.precision)
    sources = Sources(series(inputs, "shards"))
    base = inputs["base"].path if "base" in inputs else None
    tok = Tokenizer.load(base or sources.tokenizer)
    reasons: list[Reason] = []
    if base is not None:
        model = _from_base(cfg, base, tok, sources, machine.device)
    elif cfg.only != "all":
        raise UserError(f"--only {cfg.only} is for going on from a model", "give one with --base")
    else:
        spec, reasons = derive(None if cfg.depth else cfg.size, cfg.depth, sources.vocab_size, cfg.context)
        model = fresh(spec, cfg.seed).to(machine.device)
    spec = model.spec
    check_vocab(spec, tok.vocab_size)
    phases = sources.phases(cfg)
    plan, more = _plan(cfg, spec, sources.tokens, sources.wanted(cfg), base is None)
    loader = PretrainLoader(
        sources.train, _batch_tokens(cfg), cfg.context, cfg.seed,
        packing=cfg.packing, phases=phases, steps=plan.steps,
    )  # fmt: skip
    more += sources.table(loader, phases, plan.steps)
    for reason in [*reasons, *more, Reason("precision", str(machine.dtype)[6:], machine.dtype_reason)]:
        machine.say(f"{reason.name:>18}  {reason.value!s:<12} {reason.why}")

    model.checkpoint_every = cfg.recompute
    trainee = Trainee(model, plan.optim, machine.dtype)
    loss = partial(lm_loss, z_loss=cfg.z_loss)
    evaluate = _evaluation(sources, tok, cfg, machine.device)
    about = partial(sources.about, loader)
    history = loop.run(
        trainee, loader, loss, plan, rt, evaluate,
        fresh_vocab=spec.vocab if base is None else None, say=machine.say, about=about,
    )  # fmt: skip
    if machine.first:
        said = read_generation(base) if base is not None else None
        save_model(model, out, base or sources.tokenizer, machine.dtype, said)
        if base is not None:
            tok.complete(out)
    final = history.best_eval if cfg.keep == "best" else history.last_eval
    return {
        "heldout_bits_per_byte": final["bits_per_byte"],
        "heldout_loss": final["loss"],
        "loss": history.last_loss,
        "parameters": spec.parameters,
        "tokens": int(history.tokens),
        "steps": history.step,
        "epochs": round(history.tokens / max(1, sources.tokens), 3),
        **sources.realised(loader, phases, history.step),
        "best_step": history.best_step,
        "skipped_steps": len(history.skipped),
        "rollbacks": len(history.rolled_back),
        "precision": str(machine.dtype)[6:],
        "lr": plan.optim.lr,
    }


def _from_base(cfg: Config, base: Path, tok: Tokenizer, sources: Sources, device: torch.device) -> Decoder:
    """The model to go on from, with what is trained of it. Raises UserError when the shards, the context or
    the rest of Config do not fit it."""
    if cfg.depth is not None or cfg.size != Config.size:
        raise UserError("the base says what the model is", "leave --size and --depth out")
    if not tok.alike(Tokenizer.load(sources.tokenizer)):
        raise UserError(
            "the shards were made with another tokenizer than the base's",
            "make them anew with the base as --tokenizer (after `caravan grow`, if it gets new words)",
        )
    model = load_model(base, torch.float32, device)
    if cfg.context > model.spec.context:
        raise UserError(
            f"rows of {cfg.context} tokens are longer than the {model.spec.context} the base was made for",
            f"use --context {model.spec.context} or less",
        )
    if cfg.only == "tables":
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name in TABLES)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(f"a '{model.family}' model has no table of words", "leave --only out")
    return model


def _plan(
    cfg: Config, spec: Spec, available: int, wanted: int | None = None, new: bool = True
) -> tuple[loop.LoopConfig, list[Reason]]:
    """Steps, learning rate and warm-up, with their reasons."""
    if cfg.context > cfg.batch_tokens:
        raise UserError(
            f"a batch of {cfg.batch_tokens} tokens does not hold one row of {cfg.context}",
            f"raise --batch-tokens to {cfg.context} or more, or lower --context",
        )
    reasons = []
    tokens = cfg.tokens
    if cfg.steps is None and tokens is None and wanted:
        tokens = wanted
        reasons.append(Reason("training tokens", f"{tokens:,}", "the epochs asked for"))
    if cfg.steps is None and tokens is None:
        optimal, most = 20 * spec.parameters, 4 * available
        tokens = min(optimal, most) if new else available
        why = "20 per parameter" if new else "one epoch of the shards: the base has read before"
        if new and optimal > most:
            why = "4 epochs of the shards: more repetition teaches little (Muennighoff et al. 2023)"
        reasons.append(Reason("training tokens", f"{tokens:,}", why))
    steps = cfg.steps if cfg.steps is not None else max(1, math.ceil((tokens or 0) / cfg.batch_tokens))
    if steps < 1:
        raise UserError("there is nothing to do in 0 steps", "give --steps or --tokens above 0")
    warmup = (
        cfg.warmup_steps if cfg.warmup_steps is not None else min(max(10, steps // 50), max(1, steps // 10))
    )
    lr = cfg.lr if cfg.lr is not None else suggested_lr(spec) / (1 if new else 10)
    reasons.append(Reason("steps", f"{steps:,}", f"of {cfg.batch_tokens:,} tokens; {warmup} of them warm-up"))
    rate = "from the width, as above" if new else "a tenth of a new model's at this width"
    reasons.append(Reason("peak rate", lr, "asked for" if cfg.lr is not None else rate))
    reasons.append(
        Reason("epochs", f"{steps * cfg.batch_tokens / max(1, available):.2f}", f"of {available:,} tokens")
    )
    plan = loop.LoopConfig(
        steps=steps,
        micro_tokens=cfg.micro_tokens,
        optim=OptimConfig(name=cfg.optimizer, lr=lr, weight_decay=cfg.weight_decay),
        schedule=Schedule(kind=cfg.schedule, warmup_steps=warmup, final_ratio=0.1),
        eval_steps=cfg.eval_steps,
        keep=cfg.keep,
    )
    return plan, reasons


def _batch_tokens(cfg: Config) -> int | Callable[[int], int]:
    if not cfg.ramp_steps:
        return cfg.batch_tokens
    return lambda step: max(cfg.context, batch_tokens_at(step, cfg.batch_tokens, cfg.ramp_steps))


def _evaluation(
    sources: Sources, tok: Tokenizer, cfg: Config, device: torch.device
) -> Callable[[torch.nn.Module], dict[str, float]]:
    """Held-out loss in nats per token and bits per UTF-8 byte of the predicted tokens; of several sources
    each has its part of `eval_tokens`, and bits of its own beside those of all."""
    each = max(1, cfg.eval_tokens // len(sources.names))
    parts = [list(shard_batches(one, cfg.micro_tokens, cfg.context, each)) for one in sources.heldout]
    weights = [sum(float(b.weight_N.sum()) for b in batches) for batches in parts]
    bytes_V = torch.tensor(
        [len(tok.bytes_of(i)) for i in range(tok.vocab_size)], dtype=torch.float32, device=device
    )

    def loss(model: Any, batch: Batch, total: float) -> Loss:
        one = lm_loss(model, batch, total)
        size = (bytes_V[batch.targets_N.to(device)] * batch.weight_N.to(device)).sum()
        return replace(one, stats={**one.stats, "bytes": size})

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        found = [loop.heldout(model, b, loss, w) for b, w in zip(parts, weights, strict=True)]
        nll, size, correct, tokens = (
            sum(one[k] for one in found) for k in ("nll", "bytes", "correct", "tokens")
        )
        mean = sum(one["loss"] * w for one, w in zip(found, weights, strict=True)) / sum(weights)
        several = {
            f"bits_per_byte {name}": one["nll"] / math.log(2) / max(1.0, one["bytes"])
            for name, one in zip(sources.names, found, strict=True)
            if len(found) > 1
        }
        return {
            "loss": found[0]["loss"] if len(found) == 1 else mean,
            "bits_per_byte": nll / math.log(2) / max(1.0, size),
            "accuracy": correct / tokens,
            **several,
        }

    return evaluate

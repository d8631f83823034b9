"""Merge models of one shape: average, SLERP, task arithmetic, TIES or DARE.

Out comes a plain model folder with the settings and tokenizer of the first model. Nothing is trained, and
memory holds one tensor of each model at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.data.tokenizer import Tokenizer, copy_files
from caravan.data.vocabulary import sources
from caravan.model.merge import Method, Recipe, merge
from caravan.stage import Runtime, series
from caravan.store import Artefact
from caravan.types import UserError

INPUTS = {"model": "model+", "base": "model?"}
OUTPUT = "model"
USES: dict[str, str] = {}
VERSION = 1
RELATIVE = ("task", "ties", "dare")
"""Methods that merge differences from a base."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to merge."""

    method: Method = "linear"
    """linear: average; slerp: along the arc between two; task, ties, dare: differences from `base`, added."""
    weights: tuple[float, ...] = ()
    """One number per model, in order; none: equal ones with sum 1. linear divides by their sum; not slerp."""
    t: float = 0.5
    """slerp: 0 is the first model, 1 the second."""
    scale: float = 1.0
    """task, ties, dare: factor on the merged difference."""
    density: float = 0.5
    """ties: share of each difference, by magnitude, that is kept. dare: probability to keep a number."""
    seed: int = 0
    """dare: which numbers are dropped."""

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise UserError(f"t is {self.t}", "a number from 0 (the first model) to 1 (the second)")
        if not 0 < self.density <= 1:
            raise UserError(f"density is {self.density}", "a share above 0, at most 1")


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    """Merge the models into `out`; returns what was done."""
    base = inputs.get("base")
    models = [art.path for art in series(inputs, "model")]
    if len(models) < 2:
        raise UserError("one model cannot be merged", "give --model twice or more")
    if cfg.method in RELATIVE and base is None:
        raise UserError(f"{cfg.method} merges differences from a base", "give --base, or use --method linear")
    if cfg.method == "slerp" and (len(models) != 2 or cfg.weights):
        raise UserError("slerp takes two models and t", "give --model twice, and --t for the place")
    if cfg.method not in RELATIVE and base is not None:
        raise UserError(f"{cfg.method} has no use for a base", "leave --base out, or use --method task")
    weights = cfg.weights or (1 / len(models),) * len(models)
    if len(weights) != len(models):
        raise UserError(f"{len(weights)} weights for {len(models)} models", "give one per model")
    if cfg.method == "linear" and not sum(weights):
        raise UserError("the weights have the sum 0", "give at least one above 0")
    if cfg.method == "ties" and min(weights) <= 0:
        raise UserError("ties takes the mean of what agrees in sign", "give weights above 0")
    for other in [*models[1:], *([base.path] if base is not None else [])]:
        same_words(models[0], other)
    recipe = Recipe(
        method=cfg.method, weights=weights, t=cfg.t, scale=cfg.scale, density=cfg.density, seed=cfg.seed
    )
    facts = merge(
        models,
        base.path if base is not None else None,
        out,
        recipe,
        lambda done, total: rt.report(done, total, "tensors"),
    )
    copy_files(models[0], out)
    if (models[0] / "generation_config.json").exists():
        (out / "generation_config.json").write_bytes((models[0] / "generation_config.json").read_bytes())
    return {"method": cfg.method, "weights": list(weights) if cfg.method != "slerp" else cfg.t, **facts}


def same_words(first: Path, other: Path) -> None:
    """Raise UserError unless two folders cut text into the same pieces; the first that differs is named."""
    tokenizers = [_tokenizer(folder) for folder in (first, other)]
    a, b = tokenizers
    if a is None or b is None:
        if a is not b:
            raise UserError(
                f"only {first if b is None else other} has a tokenizer", "merging needs one for all"
            )
        return
    for i in range(max(a.vocab_size, b.vocab_size)):
        pieces = [tok.bytes_of(i) if i < tok.vocab_size else None for tok in (a, b)]
        if pieces[0] != pieces[1]:
            raise UserError(
                f"the tokenizers differ: id {i} is {pieces[0]!r} in {first} and {pieces[1]!r} in {other}",
                "only models with one vocabulary can be merged",
            )


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None when it has no file of one."""
    return Tokenizer.load(folder) if sources.candidates(folder) else None

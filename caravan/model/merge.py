"""Several models of one shape made into one, tensor by tensor.

x_i are the tensors of the models, b that of the base they were trained from, d_i = x_i - b, w_i weights.
All in fp32 (angles in fp64), one name after another, so that memory holds one tensor of each model.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from caravan.model import checkpoint, stored
from caravan.model.tensors import stream_tensors
from caravan.types import UserError

Method = Literal["linear", "slerp", "task", "ties", "dare"]
PARALLEL = 1 - 1e-6
"""Cosine beyond which two tensors have no arc between them: the chord is taken."""


def linear(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i / sum_i w_i (Wortsman et al. 2022, arXiv:2203.05482)."""
    total = sum(weights)
    return torch.stack([x * (w / total) for x, w in zip(parts, weights, strict=True)]).sum(0)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """sin((1-t) W) / sin W a + sin(t W) / sin W b, where W is the angle between a and b (Shoemake 1985)."""
    cosine = torch.dot(a.flatten().double(), b.flatten().double())
    cosine = cosine / (a.double().norm() * b.double().norm()).clamp_min(1e-300)
    if abs(float(cosine)) > PARALLEL:
        return torch.lerp(a, b, t)
    angle = torch.arccos(cosine)
    left, right = (float(torch.sin(share * angle) / torch.sin(angle)) for share in (1 - t, t))
    return a * left + b * right


def task(base: Tensor, parts: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
    """b + scale sum_i w_i d_i (Ilharco et al. 2023, arXiv:2212.04089)."""
    return base + scale * torch.stack([(x - base) * w for x, w in zip(parts, weights, strict=True)]).sum(0)


def ties(
    base: Tensor, parts: Sequence[Tensor], weights: Sequence[float], scale: float, density: float
) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv:2306.01708, algorithm 1): trim each d_i to its `density` largest, elect
    the sign of the weighted sum per number, average the d_i that have it, b + scale times that. Trimming is
    per tensor here, over all tensors of a model in the paper."""
    trimmed = torch.stack([trim(x - base, density) for x in parts])
    weight = torch.tensor(weights, dtype=trimmed.dtype).view(-1, *[1] * base.dim())
    sign = torch.sign((trimmed * weight).sum(0))
    agree = (torch.sign(trimmed) == sign) & (trimmed != 0)
    total = (weight * agree).sum(0)
    mean = (trimmed * weight * agree).sum(0) / torch.where(total == 0, 1.0, total)
    return base + scale * mean


def trim(delta: Tensor, density: float) -> Tensor:
    """All but the `density` share of largest magnitude set to 0; at least one stays, equals stay together."""
    count = delta.numel()
    keep = max(1, round(density * count))
    if keep >= count:
        return delta
    least = delta.abs().flatten().kthvalue(count - keep + 1).values
    return torch.where(delta.abs() >= least, delta, 0.0)


def dare(
    base: Tensor,
    parts: Sequence[Tensor],
    weights: Sequence[float],
    scale: float,
    density: float,
    draws: Sequence[torch.Generator],
) -> Tensor:
    """b + scale sum_i w_i m_i d_i / density, where m_i keeps each number with probability `density` (Yu et
    al. 2024, arXiv:2311.03099)."""
    kept = []
    for x, w, draw in zip(parts, weights, draws, strict=True):
        mask = torch.rand(x.shape, generator=draw) < density
        kept.append(torch.where(mask, (x - base) * (w / density), 0.0))
    return base + scale * torch.stack(kept).sum(0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to merge. `weights` has one number per model."""

    method: Method
    weights: tuple[float, ...]
    t: float = 0.5
    scale: float = 1.0
    density: float = 0.5
    seed: int = 0

    def one(self, key: str, parts: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """The merged tensor of this name, fp32 in and out."""
        if self.method == "linear":
            return linear(parts, self.weights)
        if self.method == "slerp":
            return slerp(parts[0], parts[1], self.t)
        assert base is not None
        if self.method == "task":
            return task(base, parts, self.weights, self.scale)
        if self.method == "ties":
            return ties(base, parts, self.weights, self.scale, self.density)
        draws = [_generator(self.seed, i, key) for i in range(len(parts))]
        return dare(base, parts, self.weights, self.scale, self.density, draws)


def _generator(seed: int, model: int, key: str) -> torch.Generator:
    """Numbers that depend on the tensor and the model alone, not on the order of the work."""
    number = hashlib.sha256(f"{seed}/{model}/{key}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)


def merge(
    folders: Sequence[Path],
    base: Path | None,
    out: Path,
    recipe: Recipe,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Merge model folders into the weights and config.json of `out`; types are those of the first folder.

    Returns counts. Raises UserError naming the first difference when the models are not of one shape.
    """
    every = [*folders, *([base] if base is not None else [])]
    for other in every[1:]:
        same_shape(every[0], other)
    files = [stored.weights(folder) for folder in every]
    wanted = {key: (files[0].kind(key), files[0].shape(key) or ()) for key in files[0]}
    done = 0
    moved = 0.0

    def make(key: str) -> Tensor:
        nonlocal done, moved
        own = [file[key] for file in files]
        report(done := done + 1, len(wanted))
        if not own[0].dtype.is_floating_point:
            if any(not torch.equal(own[0], other) for other in own[1:]):
                raise UserError(f"'{key}' holds whole numbers that differ between the models")
            return own[0]
        parts = [tensor.float() for tensor in own]
        one = recipe.one(key, parts[: len(folders)], parts[-1] if base is not None else None)
        if not torch.isfinite(one).all():
            raise UserError(f"merging '{key}' gives numbers that are not finite", "look at the inputs")
        moved += float((one - parts[0]).double().square().sum())
        return one.to(wanted[key][0])

    out.mkdir(parents=True, exist_ok=True)
    stream_tensors(wanted, make, out)
    config = checkpoint.read_config(folders[0])
    config.pop("quantization_config", None)  # 8-bit floats are written in full
    checkpoint.write_json(out / "config.json", config)
    return {"models": len(folders), "tensors": len(wanted), "distance_from_first": moved**0.5}


def same_shape(first: Path, other: Path) -> None:
    """Raise UserError unless two folders hold the same tensors of the same model; the difference is named."""
    a, b = stored.weights(first), stored.weights(other)
    kinds = [checkpoint.read_config(folder).get("model_type") for folder in (first, other)]
    found = difference(checkpoint.load_spec(first), checkpoint.load_spec(other))
    if kinds[0] != kinds[1]:
        found = ("model_type", kinds[0], kinds[1])
    if found is not None:
        name, left, right = found
        raise UserError(
            f"the models are not of one shape: {name} is {left!r} in {first} and {right!r} in {other}",
            "merging needs relatives: trained from one base, with one tokenizer",
        )
    for key in sorted(a.keys() ^ b.keys()):
        raise UserError(f"only {first if key in a else other} has the tensor '{key}'")
    for key in a:
        if a.shape(key) != b.shape(key):
            raise UserError(f"'{key}' has shape {a.shape(key)} in {first} and {b.shape(key)} in {other}")


def difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Path and values of the first field in which two Specs differ."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for field in dataclasses.fields(a):
            at = f"{name}.{field.name}".lstrip(".")
            if found := difference(getattr(a, field.name), getattr(b, field.name), at):
                return found
        return None
    if isinstance(a, tuple) and isinstance(b, tuple):
        if len(a) != len(b):
            return (f"the number of {name}", len(a), len(b))
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if found := difference(x, y, f"{name}.{i}"):
                return found
        return None
    return None if a == b else (name, a, b)

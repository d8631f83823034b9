"""AdamW and Muon on flat fp32 buffers.

All trainable weights live in one flat fp32 master buffer, ordered [muon | adamw with decay | adamw without],
and so do gradients and moments. One pass over the buffers, in blocks that stay in the cache, replaces
thousands of small kernels; a checkpoint is four tensors. AdamW: Loshchilov & Hutter 2017 (arXiv 1711.05101).
Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with the update scale 0.2 sqrt(max(rows, cols))
of Liu et al. 2025 (arXiv 2502.16982, section 2.2), which gives it AdamW's update size so that one learning
rate serves both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SlotKind = Literal["muon", "decay", "plain"]
_ORDER: tuple[SlotKind, ...] = ("muon", "decay", "plain")
_BLOCK = 1 << 17
"""Elements per block of the AdamW pass: five fp32 streams of 512 KB fit the second-level cache."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """What turns gradients into steps."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: hidden matrices by Muon, embeddings, head and vectors by AdamW."""
    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices (never of vectors), times the learning rate."""
    momentum: float = 0.95
    """Muon: Nesterov momentum."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 never."""
    balance_rate: float = 0.001
    """Routers with a choice bias (DeepSeek-V3): how far it moves per step towards evenly used experts."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lives in the flat buffers, and how it is updated."""

    name: str
    shape: tuple[int, ...]
    start: int
    kind: SlotKind
    rows: tuple[int, ...] = ()
    """Muon: a fused matrix (qkv, gate_up) is orthogonalised part by part; these are the rows of the parts.
    Where they repeat (per head: key, value, key, value ...), a part is all of its pieces together."""

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """This slot's piece of a flat buffer, in the parameter's shape."""
        return flat[self.start : self.stop].view(self.shape)


def layout(
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    name: str = "adamw",
    maps: Collection[str] | None = None,
    fused_rows: Mapping[str, tuple[int, ...]] | None = None,
    plain: Collection[str] = (),
) -> list[Slot]:
    """Place parameters in the flat buffer. Muon updates the matrices, or stacks of them, named in `maps`
    (None: every matrix); looked-up tables, heads, convolutions and decays are no maps and go to AdamW.
    Vectors, and what `plain` names (speeds of recurrences, whose zero is no natural value), do not decay.

    The order depends on names and shapes alone, so a checkpoint of the buffers fits any later run of the same
    model.
    """
    fused_rows = fused_rows or {}
    by_kind: dict[SlotKind, list[tuple[str, tuple[int, ...]]]] = {kind: [] for kind in _ORDER}
    for param, shape in shapes:
        if len(shape) < 2 or param in plain:
            by_kind["plain"].append((param, shape))
        elif name == "muon" and (len(shape) == 2 if maps is None else param in maps) and min(shape[-2:]) > 1:
            by_kind["muon"].append((param, shape))
        else:
            by_kind["decay"].append((param, shape))
    slots: list[Slot] = []
    start = 0
    for kind in _ORDER:
        for param, shape in by_kind[kind]:
            rows = fused_rows.get(param, ()) if kind == "muon" else ()
            assert not rows or shape[-2] % sum(rows) == 0, f"{param}: parts {rows} of {shape[-2]} rows"
            slots.append(Slot(param, shape, start, kind, rows))
            start = slots[-1].stop
    return slots


class Optimiser:
    """Steps a flat master buffer. State: `exp_avg` (all), `exp_avg_sq` (the AdamW part), the count of steps.

    `compute`, if given, is the flat buffer of the model's own weights in the compute dtype; each block is
    cast into it while it is still in the cache. Deterministic: no random numbers, fixed order.
    """

    def __init__(
        self, config: OptimConfig, slots: Sequence[Slot], master: Tensor, compute: Tensor | None = None
    ):
        self.config, self.slots, self.master, self.compute = config, list(slots), master, compute
        self.steps = 0
        self._muon = [s for s in self.slots if s.kind == "muon"]
        self._muon_stop = max((s.stop for s in self._muon), default=0)
        self._decay_stop = max((s.stop for s in self.slots if s.kind == "decay"), default=self._muon_stop)
        self.exp_avg = torch.zeros_like(master)
        self.exp_avg_sq = torch.zeros_like(master[self._muon_stop :])

    def state(self) -> dict[str, Tensor]:
        """The tensors to save (references, not copies); `steps` is saved by the caller."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Restore what `state` gave, bit for bit, and refresh the model's weights."""
        for name, mine in self.state().items():
            mine.copy_(tensors[name])
        self.steps = steps
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the masters into the model's weights."""
        if self.compute is not None:
            self.compute.copy_(self.master)

    @torch.no_grad()
    def step(self, grad: Tensor, lr: float, scale: float = 1.0) -> None:
        """One update with `scale * grad` (flat, fp32; overwritten) at learning rate `lr`."""
        self.steps += 1
        c = self.config
        if self._muon:
            muon_(self.master, grad, self.exp_avg, self._muon, lr, c.momentum, c.weight_decay)
            if self.compute is not None:
                self.compute[: self._muon_stop].copy_(self.master[: self._muon_stop])
        for low, high, decay in (
            (self._muon_stop, self._decay_stop, c.weight_decay),
            (self._decay_stop, self.master.numel(), 0.0),
        ):
            for a in range(low, high, _BLOCK):
                b = min(a + _BLOCK, high)
                g = grad[a:b]
                if scale != 1.0:
                    g.mul_(scale)
                second = self.exp_avg_sq[a - self._muon_stop : b - self._muon_stop]
                adamw_(
                    self.master[a:b],
                    g,
                    self.exp_avg[a:b],
                    second,
                    self.steps,
                    lr,
                    (c.beta1, c.beta2),
                    c.eps,
                    decay,
                )
                if self.compute is not None:
                    self.compute[a:b].copy_(self.master[a:b])


def adamw_(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update in place; `step` counts from 1 (arXiv 1711.05101, algorithm 2, without the schedule
    factor)."""
    beta1, beta2 = betas
    if weight_decay:
        weight.mul_(1.0 - lr * weight_decay)
    first.lerp_(grad, 1.0 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    denominator = second.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(eps)
    weight.addcdiv_(first, denominator, value=-lr / (1.0 - beta1**step))


def muon_(
    master: Tensor,
    grad: Tensor,
    momentum: Tensor,
    slots: Sequence[Slot],
    lr: float,
    mu: float,
    weight_decay: float,
) -> None:
    """One Muon update of every slot, in place, on flat buffers; matrices of equal shape are orthogonalised
    together.

    The scale of the gradient does not matter to Muon (its update is orthogonal), so clipping is not applied
    here.
    """
    stop = max(s.stop for s in slots)
    momentum[:stop].mul_(mu).add_(grad[:stop])
    nesterov = grad[:stop].add_(momentum[:stop], alpha=mu)
    by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for slot in slots:
        for update, weight in zip(_parts(slot, nesterov), _parts(slot, master), strict=True):
            shape = update[..., 0].numel(), update.shape[-1]
            by_shape.setdefault(shape, []).append((update.reshape(shape), weight))
    for (rows, cols), pairs in by_shape.items():
        factor = -lr * 0.2 * math.sqrt(max(rows, cols))
        for a in range(0, len(pairs), 16):  # bounds the extra memory: 16 matrices at a time
            some = pairs[a : a + 16]
            ortho_BRC = orthogonalise(torch.stack([update for update, _ in some]))
            for (_, weight), ortho in zip(some, ortho_BRC, strict=True):
                weight.mul_(1.0 - lr * weight_decay).add_(ortho.reshape(weight.shape), alpha=factor)


def _parts(slot: Slot, flat: Tensor) -> list[Tensor]:
    whole = slot.of(flat)
    maps = whole.unbind() if whole.dim() == 3 else (whole,)
    if not slot.rows:
        return list(maps)
    rows, every = list(slot.rows), sum(slot.rows)
    pieces = [one if len(one) == every else one.unflatten(0, (-1, every)) for one in maps]
    return [part for one in pieces for part in one.split(rows, -2)]


def orthogonalise(matrix_BRC: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each of a batch, roughly: singular values end in about [0.7, 1.2].

    Newton-Schulz with the quintic x -> 3.4445 x - 4.7750 x^3 + 2.0315 x^5 in bf16 (Jordan et al. 2024), on
    the smaller side. A zero matrix stays zero.
    """
    x = matrix_BRC.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide else x.mT).to(matrix_BRC.dtype)

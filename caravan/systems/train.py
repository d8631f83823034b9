"""A model with its optimiser, and the one training step.

The model's weights live in the compute dtype (bf16 or fp32); the masters, moments and the gradient of the
whole step are flat fp32 buffers. In fp32 the weights ARE the master buffer (no copies at all); in bf16 each
parameter's gradient is added to the fp32 buffer the moment it is ready and freed, and one cast per step
carries the masters back. There is no autocast, so no weight is ever cast twice.

Shapes: N flat tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from caravan.algos.lm import cross_entropy
from caravan.algos.optim import OptimConfig, Optimiser, layout
from caravan.model.checkpoint import wide_names
from caravan.model.decoder import Decoder
from caravan.model.ffn.moe import balance_loss
from caravan.model.flat import hidden_states
from caravan.systems import parallel
from caravan.systems.balance import Balance
from caravan.types import Batch, Loss

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")


class Trainee:
    """A model being trained. Give it the model in fp32 on its device; it takes over the storage of the
    weights.

    `keep_fp32`: prefixes of parameter names that stay fp32 (a scalar score head). Parameters with
    requires_grad False are cast and left alone. Attributes: `model`, `slots` (where each parameter lives in
    the flat buffers), `optimiser`, `balance` (choice biases of routers, which no gradient moves).
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        dtype: torch.dtype = torch.float32,
        keep_fp32: Sequence[str] = (),
    ) -> None:
        assert dtype in (torch.float32, torch.bfloat16), "fp16 needs loss scaling and is emulated on CPUs"
        self.model, self.config, self.dtype = model, config, dtype
        params = dict(model.named_parameters())
        wanted = {name: p for name, p in params.items() if p.requires_grad}
        assert wanted, "no parameter is trainable"
        always = wide_names(model)
        self.slots = layout(
            ((name, tuple(p.shape)) for name, p in wanted.items()),
            config.name,
            linear_maps(model),
            fused_rows(model),
            always,
        )
        device = next(iter(wanted.values())).device
        size = self.slots[-1].stop
        master = torch.empty(size, dtype=torch.float32, device=device)
        self.grad = torch.zeros(size, dtype=torch.float32, device=device)
        compute = None if dtype == torch.float32 else torch.empty(size, dtype=dtype, device=device)
        self._fresh: set[str] = set()
        """Parameters that have had a gradient in this step."""
        for slot in self.slots:
            p = wanted[slot.name]
            slot.of(master).copy_(p.detach())
            wide = compute is None or slot.name in always or slot.name.startswith(tuple(keep_fp32))
            p.data = slot.of(master if wide or compute is None else compute)
            p.register_post_accumulate_grad_hook(self._collector(slot.name, slot.of(self.grad)))
        for name, p in params.items():
            if not p.requires_grad and name not in always:
                p.data = p.data.to(dtype)
        self.optimiser = Optimiser(config, self.slots, master, compute)
        self.balance = Balance(model, config.balance_rate)
        parallel.broadcast_(master)
        self.optimiser.refresh()

    def _collector(self, name: str, into: Tensor) -> Callable[[Tensor], None]:
        """Adds a parameter's gradient to the flat fp32 buffer as soon as it is there, and frees it."""

        def collect(p: Tensor) -> None:
            assert p.grad is not None
            if name in self._fresh:
                into.add_(p.grad)
            else:  # saves a pass of zeros over the whole buffer
                into.copy_(p.grad)
                self._fresh.add(name)
            p.grad = None

        return collect

    def begin(self) -> None:
        """Forget the last step's gradient."""
        self._fresh.clear()

    def finish(self) -> None:
        """Zero the gradient of parameters the loss did not reach."""
        for slot in self.slots:
            if slot.name not in self._fresh:
                slot.of(self.grad).zero_()

    @property
    def unreached(self) -> list[str]:
        """Trainable parameters that got no gradient in the last step."""
        return [slot.name for slot in self.slots if slot.name not in self._fresh]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What a checkpoint must hold (references); `prefix` tells several trainees apart."""
        everything = {**self.optimiser.state(), **self.balance.tensors()}
        return {prefix + name: tensor for name, tensor in everything.items()}

    def weights(self) -> dict[str, Tensor]:
        """What of it the model itself is (references)."""
        return {"master": self.optimiser.master, **self.balance.tensors()}

    def scalars(self, prefix: str = "") -> dict[str, Any]:
        """The JSON part of the state."""
        return {prefix + "optimiser_steps": self.optimiser.steps}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], prefix: str = "") -> None:
        """Restore what `tensors` and `scalars` gave, bit for bit."""
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        self.optimiser.load(own, scalars[prefix + "optimiser_steps"])
        self.balance.load(own)

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Put other `weights` in (the best checkpoint's), without touching the moments."""
        self.optimiser.master.copy_(tensors["master"])
        self.optimiser.refresh()
        self.balance.load(tensors)


@dataclass(frozen=True)
class StepResult:
    """One optimiser step: loss and global gradient norm before clipping, and the summed statistics."""

    loss: float
    grad_norm: float
    applied: bool
    """False: the loss or the gradient was not finite or `accept` said no; nothing was changed."""
    stats: dict[str, float] = field(default_factory=dict)


def train_step(
    trainee: Trainee,
    batches: Iterable[B],
    loss: Callable[[B], Loss],
    lr: float,
    accept: Callable[[float, float], bool] | None = None,
) -> StepResult:
    """Gradient over `batches` (this rank's share of the step), all-reduce, clip, finite check, update. An
    update also moves the choice biases of routers.

    `loss(batch)` must already be divided by the normaliser of the whole step (all micro batches of all
    ranks), so that values and gradients simply add up. `accept(loss, grad_norm)`, if given, may refuse the
    update (spikes); it must give the same answer on every rank, which it does when it depends on its
    arguments and on earlier ones alone.
    """
    trainee.begin()
    total: dict[str, Tensor] = {}
    value = torch.zeros((), device=trainee.grad.device)
    for batch in batches:
        one = loss(batch)
        one.value.backward()
        value += one.value.detach().float()
        for name, number in one.stats.items():
            total[name] = total[name] + number.detach().float() if name in total else number.detach().float()
    trainee.finish()
    parallel.sum_(trainee.grad)
    names = parallel.union(total)
    numbers = parallel.sum_(
        torch.stack([value, *(total.get(name, torch.zeros_like(value)) for name in names)])
    )
    chosen = trainee.balance.counts()
    norm = torch.linalg.vector_norm(trainee.grad)
    loss_value, *stats, grad_norm = torch.cat([numbers, norm[None]]).tolist()
    finite = math.isfinite(loss_value) and math.isfinite(grad_norm)
    applied = finite and (accept is None or accept(loss_value, grad_norm))
    if applied:
        limit = trainee.config.max_grad_norm
        scale = limit / (grad_norm + 1e-6) if limit and grad_norm > limit else 1.0
        trainee.optimiser.step(trainee.grad, lr, scale)
        trainee.balance.move(chosen)
    return StepResult(loss_value, grad_norm, applied, dict(zip(names, stats, strict=True)))


def lm_loss(model: Decoder, batch: Batch, normaliser: float, z_loss: float = 0.0) -> Loss:
    """Next-token cross-entropy of a flat batch, documents apart; see `algos.lm.cross_entropy`.

    A mixture of experts adds its load-balancing loss, weighted as the tokens of this batch are in the step.
    """
    batch = to_device(batch, model.embed.weight.device)
    hidden_ND, attend = hidden_states(model, batch)
    one = cross_entropy(
        hidden_ND,
        model.head_weight(),
        batch.targets_N,
        batch.weight_N,
        normaliser,
        z_loss=z_loss,
        **model.head_terms,
    )
    if not attend.routed:
        return one
    balance = balance_loss(attend.routed, model.spec) * (one.stats["tokens"] / normaliser)
    return Loss(one.value + balance, {**one.stats, "balance": balance.detach()})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; itself when it is there already."""
    if batch.ids_N.device == device:
        return batch
    names = ("ids_N", "pos_N", "targets_N", "weight_N")
    return replace(batch, **{name: getattr(batch, name).to(device, non_blocking=True) for name in names})


def fused_rows(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Rows of the parts of fused matrices (q, k, v; gate, up): Muon orthogonalises parts, not their stack.

    A module states them in `fused`: name of its parameter -> rows, repeated where parts alternate (per head).
    """
    return {
        f"{at}.{leaf}".lstrip("."): rows
        for at, module in model.named_modules()
        for leaf, rows in getattr(module, "fused", {}).items()
    }


def linear_maps(model: nn.Module) -> set[str]:
    """Parameters that multiply activations as a map: weights of linear layers, and what modules name in
    `fused` beside them (stacked experts), but not the output heads, whose rows are looked up like an
    embedding's. Low-rank maps stored as bare parameters (RWKV) are none either: their recipes train them with
    Adam."""
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names |= fused_rows(model).keys()
    return {name for name in names if not {"head", "score"} & set(name.split("."))}

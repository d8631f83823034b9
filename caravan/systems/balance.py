"""Loss-free balancing of experts (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, 2024, arXiv:2412.19437).

A router with a choice bias counts the choices of its experts whenever it runs with gradients. After every
applied optimiser step the bias of an expert goes up a little if it was chosen less than the mean, and down if
more. The counts are those of the whole step, summed over micro batches and ranks, so the move does not depend
on how a step is divided; the biases are no part of the flat buffers and are saved beside them.

X experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from caravan.model.ffn.moe import moved_bias
from caravan.systems import parallel


class Balance:
    """The choice biases of a model. Without routers that have one, everything here does nothing.

    Only routers that are trained themselves are balanced: a frozen one was balanced when it was made. `rate`:
    how far a bias moves per step; 0 leaves all biases alone.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.routers: dict[str, Any] = {
            f"{name}.router_bias": module
            for name, module in model.named_modules()
            if getattr(module, "router_bias", None) is not None and module.router.weight.requires_grad
        }

    def counts(self) -> list[Tensor]:
        """[X] int64 choices of every router since the last call, over all ranks; the routers start anew."""
        if not self.routers:
            return []
        own = [router.taken() for router in self.routers.values()]
        return list(parallel.sum_(torch.cat(own)).split([len(count_X) for count_X in own]))

    @torch.no_grad()
    def move(self, counts: list[Tensor]) -> None:
        """Biases after a step with these counts."""
        for router, count_X in zip(self.routers.values(), counts, strict=True):
            router.router_bias.copy_(moved_bias(router.router_bias, count_X, self.rate))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold (references)."""
        return {name: router.router_bias.detach() for name, router in self.routers.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        for name, router in self.routers.items():
            router.router_bias.copy_(tensors[name])

"""Modules without memory: shapes and names, and not a number drawn.

Under torch.device("meta") alone an initialiser still "draws": nothing into nothing, but through reference
code that imports the whole compiler, which takes longer than reading a small model's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWS = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_",
         "xavier_normal_"}  # fmt: skip


class _NoDraws(TorchFunctionMode):
    """Initialisers give back what they were given."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def blank() -> Iterator[None]:
    """Within it modules are built on the meta device, their parameters left undrawn."""
    with torch.device("meta"), _NoDraws():
        yield

"""Data parallelism under `torchrun`: gloo on CPUs, nccl on CUDA. Without torchrun every function is a no-op.

Rank r of W takes micro batches r, r + W, ... of each step; the flat fp32 gradient is summed over ranks once
per step. The loss of every micro batch is already divided by the normaliser of the whole step, so a sum is
all that is needed and W ranks compute what one rank would, up to the order of additions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def start(device: torch.device) -> tuple[int, int]:
    """Join the group that torchrun's environment names; returns (rank, world), (0, 1) without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def rank_world() -> tuple[int, int]:
    """(rank, world) of the running group; (0, 1) alone."""
    return (
        (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    )


def mine(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of a list: items r, r + W, ..."""
    rank, world = rank_world()
    return items[rank::world]


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if rank_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_(tensor: Tensor) -> Tensor:
    """Everybody gets rank 0's values, in place."""
    if rank_world()[1] > 1:
        dist.broadcast(tensor, 0)
    return tensor


def barrier() -> None:
    """Wait for all ranks."""
    if rank_world()[1] > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """True everywhere if true anywhere (or-reduction), e.g. 'my clock says it is time to save'."""
    if rank_world()[1] == 1:
        return flag
    count = torch.tensor([float(flag)])
    if dist.get_backend() == "nccl":
        count = count.cuda()
    return bool(sum_(count).item() > 0)


def union(names: Iterable[str]) -> list[str]:
    """Sorted names that any rank has (a rank without a micro batch in this step has none of its own)."""
    world = rank_world()[1]
    if world == 1:
        return sorted(names)
    gathered: list[list[str]] = [[]] * world
    dist.all_gather_object(gathered, list(names))
    return sorted(set().union(*gathered))


def fingerprint(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def equal_everywhere(text: str) -> bool:
    """Do all ranks hold the same string?"""
    world = rank_world()[1]
    if world == 1:
        return True
    gathered: list[str | None] = [None] * world
    dist.all_gather_object(gathered, text)
    return len(set(gathered)) == 1

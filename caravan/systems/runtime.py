"""What this machine is and can do: device, threads, compute dtype, seeds, ranks."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from caravan.systems import parallel
from caravan.types import UserError

if TYPE_CHECKING:
    from caravan.stage import Runtime

KEPT_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "64"}
"""How many prepared bf16 kernels oneDNN and torch keep, one per shape. Their own limit, 1024 each, is several
hundred MB where batches differ in length; read before the first product."""

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine a stage runs on."""

    device: torch.device
    dtype: torch.dtype
    """Dtype of weights and activations; masters and moments are fp32 whatever it is."""
    dtype_reason: str
    threads: int
    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Rank 0: the one that writes and reports."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """A sentence for people, on stderr, once however many ranks there are."""
        if self.first:
            print(text, file=sys.stderr, flush=True)


def setup(rt: Runtime, seed: int = 0, precision: Precision = "auto") -> Machine:
    """Choose device, threads and dtype, seed everything, join torchrun's group if there is one.

    Raises UserError when a device or precision is asked for that is not there.
    """
    for name, most in KEPT_KERNELS.items():
        os.environ.setdefault(name, most)
    device = _device(rt.device)
    threads = rt.threads or available_threads()
    torch.set_num_threads(threads)
    rank, world = parallel.start(device)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    # A debugging aid that deterministic mode turns on: a pass over every new tensor.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (unknown to type checkers)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dtype, reason = choose_dtype(device, precision)
    return Machine(device=device, dtype=dtype, dtype_reason=reason, threads=threads, rank=rank, world=world)


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device called {name!r}", "use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use", "use --device cpu")
    return device


def available_threads() -> int:
    """Cores this process may use: affinity, cgroup quota, and OMP_NUM_THREADS if it is set (the least of
    them)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cores()
    limits = [cores] + ([quota] if quota else [])
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        limits.append(int(asked))
    return max(1, min(limits))


def cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Whole cores of the CPU quota (cgroup v2 or v1), or None without one. A container sees all cores of its
    host."""
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    if quota in ("max", "-1"):
        return None
    return max(1, int(quota) // int(period))


def choose_dtype(device: torch.device, precision: Precision) -> tuple[torch.dtype, str]:
    """bf16 where the hardware multiplies it faster than fp32 and a self-test gives right numbers; else fp32.

    Speed is read from what the processor says it can do, not from a clock: a busy minute must not change the
    weights that come out. fp16 is never used (on CPUs it is emulated, and it needs loss scaling anywhere).
    """
    if precision == "fp32":
        return torch.float32, "asked for"
    right = bf16_is_right(device)
    if precision == "bf16":
        if not right:
            raise UserError("bf16 gives wrong products on this machine", "use --precision fp32")
        return torch.bfloat16, "asked for"
    if not right:
        return torch.float32, "bf16 failed its self-test here"
    if not has_fast_bf16(device):
        return torch.float32, "this processor has no fast bf16"
    return torch.bfloat16, "fast here, and its self-test passed"


def has_fast_bf16(device: torch.device) -> bool:
    """Does the hardware multiply bf16 natively?"""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def bf16_is_right(device: torch.device) -> bool:
    """bf16 matrix products, forward and both gradients' forms, within 1 % of fp32."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(96, 192, generator=generator).to(device)
    b = torch.randn(160, 192, generator=generator).to(device)
    for left, right in ((a, b.t()), (b, a.t()), (a.t(), a)):
        exact = left @ right
        rounded = (left.bfloat16() @ right.bfloat16()).float()
        if not torch.linalg.vector_norm(rounded - exact) < 0.01 * torch.linalg.vector_norm(exact):
            return False
    return True

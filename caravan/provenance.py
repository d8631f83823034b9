"""Where a result was made: code, libraries, machine, memory. Recorded in the manifest, never hashed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import resource
import sys
from pathlib import Path
from typing import Any

import caravan

LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "jinja2",
    "pyarrow",
    "tyro",
    "zstandard",
    "orjson",
)


@functools.cache
def libraries() -> dict[str, str]:
    """Installed versions of what the results can depend on."""
    from importlib import metadata

    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@functools.cache
def code() -> dict[str, str]:
    """Version of caravan; for a checkout also its commit and a hash of what is not committed."""
    package = Path(caravan.__file__).parent
    found = {"version": caravan.__version__}
    # A package installed below somebody else's repository must not report that repository's commit.
    if not (package.parent / ".git").exists():
        return found
    with contextlib.suppress(OSError, ValueError):
        found["commit"] = _git(package.parent, "rev-parse", "HEAD").decode().strip()
        change = hashlib.sha256(diff := _git(package.parent, "diff", "HEAD", "--", "caravan"))
        loose = _git(package.parent, "ls-files", "-z", "--others", "--exclude-standard", "--", "caravan")
        for name in filter(None, loose.split(b"\0")):
            change.update(name + (package.parent / os.fsdecode(name)).read_bytes())
        if diff or loose:
            found["uncommitted"] = change.hexdigest()
    lock = package.parent / "uv.lock"
    if lock.exists():
        found["uv_lock"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return found


@functools.cache
def machine() -> dict[str, Any]:
    """Name, system, processor, cores, memory; accelerators when torch has been loaded by the stage."""
    import platform

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": pages,
    }


def accelerator() -> str:
    """Name of the CUDA device this process has used, or nothing."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    return str(torch.cuda.get_device_name())


class Memory:
    """Peak memory from now on. Linux can restart the count; elsewhere it is the peak of the whole process.

    What the stage before has freed goes back to the system first: glibc keeps the holes between its ragged
    arrays, gigabytes of them after a whole road.
    """

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing is held back
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._children = _peak(resource.RUSAGE_CHILDREN)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, int]:
        """Bytes of this process, of its largest finished child (if larger than before), of the GPU."""
        found = {"peak_memory_bytes": _high_water() or _peak(resource.RUSAGE_SELF)}
        if (children := _peak(resource.RUSAGE_CHILDREN)) > self._children:
            found["peak_memory_children_bytes"] = children
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            found["peak_memory_device_bytes"] = int(torch.cuda.max_memory_allocated())
        return found


def _high_water() -> int:
    """Linux's own count, which can be restarted; the other one starts from the size of the parent process."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _peak(who: int) -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


def _git(folder: Path, *words: str) -> bytes:
    import subprocess

    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=True, timeout=20)
    return done.stdout

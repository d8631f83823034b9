"""Writing that survives: durable files, sealed folders, one writer by `flock`, and plain words when it fails.

`flock` holds on one machine, or on a file system that honours it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from caravan.types import UserError

_held: set[int] = set()


def _release_in_child() -> None:
    """A forked worker must not keep its parent's lock: an orphan would block the next run for ever."""
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.pop())


os.register_at_fork(after_in_child=_release_in_child)


def file_digest(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Replace a small file in one step and force it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with draft.open("w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def plain_errors(doing: str) -> Iterator[None]:
    """Turn a full disk and missing rights into a UserError; every other error passes as it is."""
    try:
        yield
    except Exception as err:
        code = getattr(err, "errno", None) if isinstance(err, OSError) else None
        where = f" ({err.filename})" if isinstance(err, OSError) and err.filename else ""
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left on device" in str(err):
            raise UserError(
                f"the disk is full while {doing}{where}",
                "free some space (`caravan gc` removes old unpublished runs) and run the same command again",
            ) from err
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"no permission while {doing}{where}", "check the owner and mode of that path"
            ) from err
        raise


@contextlib.contextmanager
def locked(
    path: Path, keep: Path, waiting: Callable[[], None] | None = None, block: bool = True
) -> Iterator[bool]:
    """Hold the lock file `path`; False at once if another holds it and `block` is off.

    `waiting` is called once before a wait. The lock file goes if `keep`, what it guards, is gone at the end.
    """
    fd = _take(path, waiting, block)
    if fd is None:
        yield False
        return
    _held.add(fd)
    try:
        yield True
    finally:
        if fd in _held:  # not in a forked child
            if not keep.exists():
                path.unlink(missing_ok=True)
            _held.discard(fd)
            os.close(fd)


def _take(path: Path, waiting: Callable[[], None] | None, block: bool) -> int | None:
    """An open, locked file that is still the one at `path` (the last holder may have removed it)."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not block:
                os.close(fd)
                return None
            if waiting:
                waiting()
                waiting = None
            fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)


def seal(out: Path) -> None:
    """Force every file to the disk, make it read-only. Folders stay writable: `rm -r` must keep working."""
    files = [p for p in out.rglob("*") if p.is_file()]
    for path in files:
        if len(files) <= 256:
            sync(path)
        path.chmod(0o444)
    if len(files) > 256:  # thousands of single waits take minutes on a slow disk
        os.sync()
    sync(out)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

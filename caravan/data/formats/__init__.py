"""One file per outside format; the folder is the registry.

A format module has a one-line docstring that names it, and

    KINDS    what it can give: "corpus" (Document), "conversations" (Conversation), "preferences" (Ranking)
    detect   detect(sample, path) -> the reason why it is this format, or None. The sample is a record
    (dict), or
             the first bytes of a file
    read     read(path, kind, on_bad, limits) -> Iterator[Found]; what cannot be read goes to on_bad, with
    its place

Which format a file has is found out from its content, and the reason is kept.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from caravan.data.formats._files import Found, Limits, OnBad, Problem, sample_of
from caravan.types import UserError

__all__ = ["Found", "Limits", "OnBad", "Problem", "choose", "files", "names", "read_all"]


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Modules of this folder."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("_")))


def load(name: str) -> ModuleType:
    """One format module."""
    return importlib.import_module(f"caravan.data.formats.{name}")


def files(root: Path, on_bad: OnBad) -> list[Path]:
    """Every ordinary file below `root` (or `root` itself) in the order of their names.

    Links to folders are not followed, nor links that lead out of `root` or nowhere; both go to `on_bad`.
    Hidden files and an artefact's own manifest are left out. Raises UserError if a folder cannot be read.
    """
    if root.is_file():
        return [root]

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}", "check its rights") from error

    found = []
    inside = root.resolve()
    for folder, folders, names_ in os.walk(root, onerror=fail):
        folders.sort()
        for name in [*folders, *names_]:
            path = Path(folder, name)
            if name.startswith(".") or (Path(folder) == root and name in ("manifest.json", "timing.jsonl")):
                continue
            if name in folders:
                if path.is_symlink():
                    on_bad(Problem(path, "", "a folder, not a link to one", ""))
            elif path.is_symlink() and not _leads_inside(path, inside):
                on_bad(Problem(path, "", "a file, not a link that leads out of the folder or nowhere", ""))
            elif path.is_file():
                found.append(path)
            else:
                on_bad(Problem(path, "", "an ordinary file", ""))
        folders[:] = [f for f in folders if not f.startswith(".")]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _leads_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
        return False


def choose(path: Path, kind: str, limits: Limits, on_bad: OnBad) -> tuple[str, str] | None:
    """(format, reason) of a file that can give `kind`: the one that most of its first records speak for."""
    samples = sample_of(path, limits, on_bad)
    votes: dict[str, tuple[int, str]] = {}
    for name in names():
        module = load(name)
        if kind in module.KINDS:
            reasons = [r for s in samples if (r := module.detect(s, path))]
            if reasons:
                votes[name] = (len(reasons), reasons[0])
    if not votes:
        return None
    best = max(votes, key=lambda n: (votes[n][0], n))
    return best, votes[best][1]


def read_all(root: Path, kind: str, on_bad: OnBad, limits: Limits, chosen: dict[str, str]) -> Iterator[Found]:
    """Everything of `kind` below `root`; `chosen` is filled with file -> "format: reason".

    A file that no format can read goes to `on_bad`. Raises UserError if there is no file at all, or none of
    a known format.
    """
    paths = files(root, on_bad)
    if not paths:
        raise UserError(f"there are no files in {root}", "give a file or a folder with data in it")
    for path in paths:
        name = path.relative_to(root).as_posix() if path != root else path.name
        if path.stat().st_size == 0:
            on_bad(Problem(path, "", "a file that is not empty", ""))
            continue
        met: list[Problem] = []  # while looking; should a format be found, reading it will meet them again
        best = choose(path, kind, limits, met.append)
        if best is None:
            for problem in met or [Problem(path, "", expected(kind), _keys(path, limits))]:
                on_bad(problem)
            continue
        chosen[name] = f"{best[0]}: {best[1]}"
        for found in load(best[0]).read(path, kind, on_bad, limits):
            value = found.value if found.value.source else replace(found.value, source=name)
            yield replace(found, value=value, file=name if path != root else "")
    if not chosen:
        named = ", ".join(p.name + (f" ({keys})" if (keys := _keys(p, limits)) else "") for p in paths[:3])
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        raise UserError(f"nothing that gives {kind} was found in {named}{more}", f"expected {expected(kind)}")


def expected(kind: str) -> str:
    """A sentence on what would have been read."""
    kinds = {n: " ".join((load(n).__doc__ or "").split("\n\n")[0].split()).rstrip(".") for n in names()}
    return "one of: " + "; ".join(text for n, text in kinds.items() if kind in load(n).KINDS)


def _keys(path: Path, limits: Limits) -> str:
    """What the first record of a file calls its fields, for a complaint."""
    first = next(iter(sample_of(path, limits, _ignore)), None)
    return "records with " + ", ".join(map(str, list(first)[:8])) if isinstance(first, dict) else ""


def _ignore(problem: Problem) -> None:
    """It has been reported already."""

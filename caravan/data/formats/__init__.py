"""One file per outside format; the folder is the registry.

A format module has a one-line docstring that names it, and

    KINDS    what it can give: "corpus" (Document), "conversations" (Conversation), "preferences" (Ranking,
             Labelled)
    detect   detect(sample, path) -> the reason why it is this format, or None. The sample is a record
    (dict), or
             the first bytes of a file
    read     read(path, kind, on_bad, limits) -> Iterator[Found]; what cannot be read goes to on_bad, with
    its place
    jobs     optional: jobs(path, on_bad, limits) gives what is to be extracted in a process of its own

Which format a file has is found out from its content, and the reason is kept.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from caravan.data.extract import workers
from caravan.data.formats import _jobs
from caravan.data.formats._files import Found, Limits, OnBad, Problem, called, sample_of
from caravan.types import UserError

__all__ = ["Found", "Limits", "OnBad", "Problem", "called", "choose", "files", "names", "read_all"]


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


def choose(
    path: Path, kind: str, limits: Limits, on_bad: OnBad, asked: str = "auto"
) -> tuple[str, str] | None:
    """(format, reason) of a file that can give `kind`: the one that most of its first records speak for, or
    the one asked for.

    Raises UserError where a conversation or preference can be read in two ways, naming both, and for a format
    that there is not.
    """
    if asked != "auto":
        return named(asked, kind), "it was asked for"
    votes: dict[str, list[tuple[int, str]]] = {}
    for at, sample in enumerate(sample_of(path, limits, on_bad)):
        for name in names():
            module = load(name)
            if kind in module.KINDS and (reason := module.detect(sample, path)):
                votes.setdefault(name, []).append((at, reason))
    if not votes:
        return None
    best = max(votes, key=lambda n: (len(votes[n]), n))
    mine = {at for at, _ in votes[best]}
    for name, others in votes.items():
        both = name != best and kind in DECIDED and mine & {at for at, _ in others}
        if both or (kind in DECIDED and name != best and len(others) == len(votes[best])):
            first, second = sorted((best, name))
            raise UserError(
                f"{path.name} can be read as {first} ({votes[first][0][1]}) and as {second} "
                f"({votes[second][0][1]})",
                f"say which: --format {first} or --format {second}",
            )
    return best, votes[best][0][1]


NOTHING = "a file that is not empty"
DECIDED = ("conversations", "preferences")
"""Kinds whose stages have a flag --format."""


def named(name: str, kind: str) -> str:
    """A format that gives `kind`, by its name; UserError with those there are."""
    every = [n for n in names() if kind in load(n).KINDS]
    if name not in every:
        raise UserError(
            f"there is no format {name!r} that gives {kind}", "they are: auto, " + ", ".join(every)
        )
    return name


def read_all(
    root: Path, kind: str, on_bad: OnBad, limits: Limits, chosen: dict[str, str], asked: str = "auto"
) -> Iterator[Found]:
    """Everything of `kind` below `root`; `chosen` is filled with file -> "format: reason". `asked` is the
    format to read all files in.

    A file that no format can read goes to `on_bad`. `limits.workers` processes extract pages and books; what
    is found, and in which order, does not depend on their number. Raises UserError if there is no file at
    all, or none of a known format.
    """
    met: list[Problem] = []
    first: Problem | None = None
    paths = files(root, met.append)
    if not paths:
        raise UserError(f"there are no files in {root}", "give a file or a folder with data in it")
    for item, answer in workers.mapped(_items(root, paths, kind, met, limits, chosen, asked), limits.workers):
        if isinstance(item, Problem):
            first = first or item
            on_bad(item)
        elif isinstance(item, workers.Job):
            for found in _jobs.settle(item, answer, on_bad):
                yield _placed(found, root, item.note.path)
        else:
            assert isinstance(item, Found)
            yield item
    if not chosen:
        named = ", ".join(
            called(Path(p.name)) + (f" ({keys})" if (keys := _keys(p, limits)) else "") for p in paths[:3]
        )
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        other = _of_another_kind(paths[:3], kind, limits)
        if first is None or first.expected == expected(kind):
            hint = f"expected {expected(kind)}"
        else:  # it cannot be read at all, whatever it was to be
            where = f"{called(Path(first.path.name))}: " if len(paths) > 1 else ""
            hint = f"{where}expected {first.expected}"
        raise UserError(f"nothing that gives {kind} was found in {named}{more}", other or hint)


def _of_another_kind(paths: Sequence[Path], kind: str, limits: Limits) -> str | None:
    """What the first of these files that can be read at all is instead, and the command for that."""
    for path in paths:
        for other in (*DECIDED, "corpus"):
            try:
                best = choose(path, other, limits, _ignore) if other != kind and path.stat().st_size else None
            except UserError:  # two formats of the other kind claim it: the command itself will say so
                best = None
            if best:
                return f"{path.name} gives {other} ({best[0]}: {best[1]}): `caravan {other}` reads it"
    return None


def _items(
    root: Path,
    paths: list[Path],
    kind: str,
    met: list[Problem],
    limits: Limits,
    chosen: dict[str, str],
    asked: str,
) -> Iterator[Found | Problem | workers.Job]:
    """What is found, what is still to be extracted and what is wrong, in the order of the files.

    Problems travel in the same row (`met` holds those just met), so that reading ahead moves none of them.
    """
    for path in paths:
        if path.stat().st_size == 0:
            met.append(Problem(path, "", NOTHING, ""))
            continue
        looking: list[Problem] = []  # should a format be found, reading it will meet them again
        best = choose(path, kind, limits, looking.append, asked)
        if best is None:
            said = expected(kind) if any(sample_of(path, limits, _ignore)) else NOTHING
            met += looking or [Problem(path, "", said, _keys(path, limits))]
            continue
        chosen[_name(path, root)] = f"{best[0]}: {best[1]}"
        module = load(best[0])
        jobs = getattr(module, "jobs", None)
        given = jobs(path, met.append, limits) if jobs else module.read(path, kind, met.append, limits)
        for item in given:
            yield from met
            met.clear()
            yield item if isinstance(item, workers.Job) else _placed(item, root, path)
    yield from met


def _name(path: Path, root: Path) -> str:
    return called(path.relative_to(root) if path != root else Path(path.name))


def _placed(found: Found, root: Path, path: Path) -> Found:
    """With the file it was found in, which is also its source if it names none."""
    name = _name(path, root)
    value = found.value if found.value.source else replace(found.value, source=name)
    return replace(found, value=value, file=name if path != root else "")


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

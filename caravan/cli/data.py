"""Show records as a model would be trained on them: tokens, loss mask, what is cut off, how they pack.

FILE|REF is a file or folder of any known format, or an artefact of conversations or preferences. The format
that was found, and why, comes first.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from caravan import config
from caravan.cli.running import take
from caravan.store import Store
from caravan.types import UserError

if TYPE_CHECKING:
    from caravan.data.peek import Look, Peek
    from caravan.data.tokenizer import Tokenizer

KINDS = ("conversations", "preferences", "corpus")
USAGE = "show FILE|REF [--flag value ...]"


@dataclass(frozen=True, kw_only=True)
class Config:
    n: int = 5
    """Records to show."""
    skip: int = 0
    """Records to leave out before."""
    kind: Literal["auto", "conversations", "preferences", "corpus"] = "auto"
    """What to read the file as; auto: the first that can be read."""
    format: str = "auto"
    """Format of the file, by its name; auto: found out from its content."""
    model: str | None = None
    """Model or tokenizer, a folder or an artefact; none: a small vocabulary made from the records."""
    template: str | None = None
    """Built-in chat template, by name; none: the model's own, or ChatML."""
    context: int = 2048
    """Tokens that fit into the context."""
    sample: int = 200
    """Records to read for the numbers on packing."""
    html: str | None = None
    """Write a page into this file as well."""


def main(words: Sequence[str]) -> int:
    """`caravan data show FILE`: prints the records; 1 if none could be read from there on."""
    taken, rest = take(words, ["store"])
    if len(rest) < 2 or rest[0] != "show" or rest[1].startswith("-"):
        raise UserError(f"usage: caravan data {USAGE}", "`caravan data --help` explains every flag")
    cfg = config.from_flags(Config, rest[2:], "caravan data", also=["store"])
    for name, least in (("n", 1), ("skip", 0), ("context", 8), ("sample", 0)):
        if getattr(cfg, name) < least:
            raise UserError(f"`--{name} {getattr(cfg, name)}` is too small", f"{least} or more")
    store = Store(taken.get("store"))
    return _show(cfg, rest[1], store)


def _show(cfg: Config, target: str, store: Store) -> int:
    from caravan.data import peek
    from caravan.report import records

    path, kind = _source(store, target)
    found = peek.open_source(
        path, kind if cfg.kind == "auto" else cfg.kind, cfg.format, cfg.skip, max(cfg.n, cfg.sample)
    )
    tok, about_tok = _tokenizer(cfg, found, store)
    looks = [list(peek.looks(value, tok, cfg.context)) for value in found.values]
    packing = peek.packing(list(itertools.chain.from_iterable(looks)), cfg.context)
    about = [*_read_as(found), about_tok]
    for line in about:
        print(peek.visible(line))
    _print(looks[: cfg.n])
    print(records.packed(packing))
    problems = [str(problem) for problem in found.problems]
    for problem in problems[:5]:
        print(f"not read: {peek.visible(problem)}", file=sys.stderr)
    if cfg.html:
        text = records.page(f"{target}", about, looks[: cfg.n], problems[:50], records.packed(packing))
        try:
            Path(cfg.html).expanduser().write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {cfg.html}: {error.strerror}", "check the folder") from error
        print(f"page written to {cfg.html}", file=sys.stderr)
    return 0 if looks else 1


def _source(store: Store, target: str) -> tuple[Path, str]:
    """The file or folder behind a path or an artefact (its training part), and what it holds, or auto."""
    path, kind = Path(target).expanduser(), "auto"
    if not path.exists():
        try:
            found = store.open(target)
            path, kind = found.path, found.kind if found.kind in KINDS else "auto"
        except UserError as error:
            hint = "give a path, or an artefact of conversations or preferences"
            raise UserError(f"there is no file {target}, and no artefact of that name", hint) from error
    parts = [path / f"train{end}" for end in (".jsonl", ".labels.jsonl", ".jsonl.zst")]
    ours = [p for p in parts if path.is_dir() and p.exists() and p.stat().st_size]
    return (ours[0] if ours and (path / "manifest.json").exists() else path), kind


def _read_as(found: Peek) -> list[str]:
    """Which format, and why, for the first files."""
    lines = [f"{name}: {found.kind} as {why}" for name, why in itertools.islice(found.read_as.items(), 5)]
    lines += [f"also {kind} as {why} (--kind {kind})" for kind, why in found.also.items()]
    return lines + ([f"and {len(found.read_as) - 5} more files"] if len(found.read_as) > 5 else [])


def _tokenizer(cfg: Config, found: Peek, store: Store) -> tuple[Tokenizer, str]:
    from caravan.data import peek
    from caravan.data.tokenizer import Tokenizer

    if cfg.model is None:
        tok = peek.stand_in(found.values, cfg.template)
        return tok, f"{tok.vocab_size} tokens made from these records (--model takes those of a model), " + (
            f"template {cfg.template or 'chatml'}"
        )
    folder = Path(cfg.model).expanduser()
    folder = folder if folder.exists() else store.open(cfg.model).path
    tok = Tokenizer.load(folder, cfg.template)
    return tok, f"tokens of {cfg.model}, template {cfg.template or 'its own'}"


def _print(records: Sequence[Sequence[Look]]) -> None:
    from rich.console import Console
    from rich.text import Text

    from caravan.data.peek import visible
    from caravan.report.records import plain, spans, summary

    console = Console(highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    for look in itertools.chain.from_iterable(records):
        console.print(
            Text(f"\n── {visible(summary(look))}", style="bold" if not look.problem else "bold red")
        )
        if look.pieces:
            console.print(Text.assemble(*spans(look)) if coloured else Text(plain(look)))

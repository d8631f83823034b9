"""Commands that look into the store: ls, show, lineage, verify, gc."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from caravan.cli.help import SHOWING
from caravan.cli.running import take
from caravan.config import nearest
from caravan.store import Artefact, Store
from caravan.types import UserError


def main(command: str, words: Sequence[str]) -> int:
    """Run one of them; `verify` returns 1 if something is wrong."""
    switches = {"show": ["json"], "gc": ["dry_run", "unnamed"]}.get(command, [])
    asked = {w[2:].replace("-", "_") for w in words if w.startswith("--")} & set(switches)
    words = [
        w for w in words if w.removeprefix("--").replace("-", "_") not in asked or not w.startswith("--")
    ]
    values = ["store", "older_than_days"] if command == "gc" else ["store"]
    taken, rest = take(words, values)
    if loose := [w for w in rest if w.startswith("-")]:
        near = nearest(loose[0].lstrip("-").replace("-", "_"), [*switches, *values], "--").replace("_", "-")
        usage = f"usage: caravan {command} {SHOWING[command][0]} [--store DIR]"
        raise UserError(f"unknown flag `{loose[0]}`", f"{near} ({usage})")
    least, most = {"ls": (0, 1), "show": (1, 1), "lineage": (1, 1), "verify": (0, 10_000), "gc": (0, 0)}[
        command
    ]
    if not least <= len(rest) <= most:
        raise UserError(f"usage: caravan {command} {SHOWING[command][0]}", "`caravan ls` shows what there is")
    store = Store(taken.get("store"))
    if command == "ls":
        return _ls(store, rest[0] if rest else None)
    if command == "gc":
        return _gc(store, taken.get("older_than_days", "7"), "unnamed" in asked, "dry_run" in asked)
    if command == "verify":
        return _verify(store, [store.open(r) for r in rest] or store.ls())
    art = store.open(rest[0])
    lines = _show(store, art, "json" in asked) if command == "show" else _tree(store, f"{art.kind}/{art.id}")
    print("\n".join(lines))
    return 0


def _ls(store: Store, kind: str | None) -> int:
    names: dict[str, list[str]] = {}
    for name, ref in store.names().items():
        names.setdefault(ref, []).append(name)
    found = store.ls(kind)
    if not found:
        print(f"nothing{f' of kind {kind}' if kind else ''} in {store.root}", file=sys.stderr)
    for art in found:
        m = art.manifest
        called = ",".join(names.get(f"{art.kind}/{art.id}", []))
        row = (
            f"{art.ref:<28}",
            f"{m['stage']:<13}",
            f"{_bytes(art.size):>9}",
            f"{_span(m.get('seconds', 0)):>8}",
        )
        print("  ".join([*row, _age(m["published"]), called]).rstrip())
    return 0


def _show(store: Store, art: Artefact, as_json: bool) -> Iterator[str]:
    m = art.manifest
    if as_json:
        yield json.dumps({**m, "path": str(art.path)}, indent=1)
        return
    called = [n for n, ref in store.names().items() if ref == f"{art.kind}/{art.id}"]
    yield art.ref + (f"  ({', '.join(called)})" if called else "")
    yield f"  path      {art.path}"
    yield (
        f"  made      {m['published']} by {m['stage']} version {m['version']} in {_span(m.get('seconds', 0))}"
        + (f", {_bytes(m['peak_memory_bytes'])} at most" if "peak_memory_bytes" in m else "")
    )
    for role, ref in sorted(art.inputs.items()):
        yield f"  from      {role}: {_brief(ref)}{'' if store.has(ref) else ' (no longer in this store)'}"
    chosen = m["asked"].get("config", {})
    for name, value in m["config"].items():
        yield f"  setting   {name} = {_text(value)}" + ("  (chosen)" if name in chosen else "")
    for name, value in art.facts.items():
        yield f"  fact      {name} = {_text(value)}"
    for name, f in sorted(m["files"].items()):
        yield f"  file      {name}  {_bytes(f['size'])}"


def _tree(
    store: Store, ref: str, role: str = "", stem: str = "", seen: set[str] | None = None
) -> Iterator[str]:
    """The artefact and below it what it was made from; one met before is not drawn out again."""
    seen = set() if seen is None else seen
    label = f"{role}: " if role else ""
    if not store.has(ref):
        yield f"{label}{_brief(ref)}  (no longer in this store)"
        return
    art = store.open(ref)
    if ref in seen and art.inputs:
        yield f"{label}{art.ref}  (see above)"
        return
    seen.add(ref)
    facts = [f"{k} {_text(v)}" for k, v in art.facts.items() if isinstance(v, int | float | str)][:3]
    yield "  ".join([f"{label}{art.ref}", f"by {art.manifest['stage']}", *facts])
    inputs = sorted(art.inputs.items())
    for i, (name, above) in enumerate(inputs):
        last = i == len(inputs) - 1
        first, *others = _tree(store, above, name, "", seen)
        yield f"{'└─ ' if last else '├─ '}{first}"
        yield from (f"{'   ' if last else '│  '}{line}" for line in others)


def _verify(store: Store, arts: Sequence[Artefact]) -> int:
    bad = 0
    for art in arts:
        wrong = store.verify(art)
        bad += bool(wrong)
        print(f"{'BAD' if wrong else 'ok '}  {art.ref}" + "".join(f"\n       {w}" for w in wrong))
    if bad:
        words = f"{bad} of {len(arts)} artefacts damaged; remove their folders and run their commands again"
        print(words, file=sys.stderr)
    return 1 if bad else 0


def _gc(store: Store, days: str, unnamed: bool, dry_run: bool) -> int:
    try:
        limit = float(days)
    except ValueError:
        raise UserError(
            f"`--older-than-days {days}` cannot be read", "a number of days, such as 7 or 0.5"
        ) from None
    gone = store.gc(limit, unnamed=unnamed, dry_run=dry_run)
    for removed in gone:
        print(f"{removed.path.relative_to(store.root)}  {_bytes(removed.size)}  {removed.why}")
    words = "would free" if dry_run else "freed"
    print(f"{words} {_bytes(sum(r.size for r in gone))} in {len(gone)} places", file=sys.stderr)
    return 0


def _brief(ref: str) -> str:
    kind, _, ident = ref.partition("/")
    return f"{kind}/{ident[:12]}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _span(seconds: float) -> str:
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 100 else f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def _age(published: str) -> str:
    return (
        published[:16].replace("T", " ")
        if published[:10] != time.strftime("%Y-%m-%d", time.gmtime())
        else ("today " + published[11:16])
    )

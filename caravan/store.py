"""The artefact store: folders that never change once published, found by key, named by content.

    artefacts/<kind>/<id>/   files and manifest.json, read-only
    keys/<key>               what was asked -> what came out
    runs/<stage>-<key>/      a run not yet published: asked.json, checkpoints, out/
    locks/<stage>-<key>      one writer per question
    names/<name>             "time kind/id" per line; the last line holds

key  hash of what was asked (stage, its version, settings that differ from their defaults, ids of the inputs).
id   hash of what came out (kind, names and hashes of the files). Two questions with equal answers share one
     artefact, so raising a version upstream re-runs below it only what really changed.

Publishing hashes the files in out/, writes the manifest beside them and renames out/ to its place: a reader
sees all or nothing. Many processes asking one question have one writer (disk.locked).
Left out: remote stores, and any meaning of the files (that is the stages' business).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan import outside
from caravan.artefact import SCHEMA, UNHASHED, Artefact, content_id, describe, digest, sizes_hold
from caravan.disk import file_digest, locked, plain_errors, remove, seal, sync, write_durably
from caravan.types import UserError

_REF = re.compile(r"[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)?")
_HEX = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True)
class Removed:
    """One thing that gc removed, or would remove."""

    path: Path
    why: str
    size: int


class Store:
    """A folder of artefacts. The default is $CARAVAN_STORE, else `.caravan` in the current folder."""

    def __init__(self, root: Path | str | None = None) -> None:
        given = root or os.environ.get("CARAVAN_STORE") or ".caravan"
        self.root = Path(given).expanduser().absolute()

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    # Finding

    def find(self, key: str) -> Artefact | None:
        """The answer to a question asked before; None if there is none, or if files of it are gone."""
        record = self.record(key)
        return self._whole(*record["artefact"].split("/")) if record else None

    def record(self, key: str) -> dict[str, Any] | None:
        """What stands behind a key: `artefact`, the `config` in full, the manifest's hash."""
        try:
            return json.loads((self.root / "keys" / key).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def open(self, ref: str) -> Artefact:
        """`ref` is `kind/idprefix`, an id prefix of four or more digits, or a name; else UserError."""
        if not _REF.fullmatch(ref) or ".." in ref:
            raise UserError(
                f"`{ref}` is no reference",
                "write kind/id, the start of an id, or a name; `caravan ls` shows them",
            )
        named = self.names().get(ref) if "/" not in ref else None
        kind, _, prefix = (named or ref).rpartition("/")
        hits = self._matching(kind or "*", prefix) if _HEX.fullmatch(prefix) else []
        if not hits and named:
            raise UserError(f"`{ref}` names {named}, which is no longer in {self.root}", "make it again")
        if not hits:
            near = difflib.get_close_matches(ref, self.names(), 1, 0.6)
            near += [n for n in self.names() if n.startswith(ref[:3])]
            hint = f"did you mean `{near[0]}`?" if near else "`caravan ls` shows what is there"
            raise UserError(f"there is no `{ref}` in {self.root}", hint)
        if len(hits) > 1:
            some = ", ".join(f"{p.parent.name}/{p.name[: len(prefix) + 4]}" for p in hits[:5])
            raise UserError(f"`{ref}` could be any of {len(hits)} artefacts", f"write more of the id: {some}")
        art = self._read(hits[0])
        if art is None:
            raise UserError(
                f"the manifest of `{ref}` cannot be read: {hits[0]}/manifest.json", "remove that folder"
            )
        return art

    def has(self, ref: str) -> bool:
        """Whether a full `kind/id` is here."""
        return (self.root / "artefacts" / ref / "manifest.json").exists()

    def ls(self, kind: str | None = None) -> list[Artefact]:
        """Every artefact (of a kind), oldest first."""
        found = [self._read(p) for p in self._matching(kind or "*", "")]
        return sorted((a for a in found if a), key=lambda a: (a.manifest["published"], a.id))

    def lineage(self, art: Artefact) -> Iterator[tuple[int, Artefact]]:
        """The artefact and everything it was made from, depth first, each once with its depth.

        Ancestors removed from the store are left out; `Artefact.inputs` still names them.
        """
        seen: set[str] = set()
        todo = [(0, art)]
        while todo:
            depth, node = todo.pop()
            if node.id in seen:
                continue
            seen.add(node.id)
            yield depth, node
            above = [self._read(self.root / "artefacts" / ref) for ref in node.inputs.values()]
            todo += [(depth + 1, a) for a in reversed(above) if a]

    # Names

    def name(self, name: str, art: Artefact) -> None:
        """Let `name` mean this artefact from now on. Earlier meanings stay on record."""
        self.check_name(name)
        path = self.root / "names" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as f:
            f.write(f"{_now()} {art.kind}/{art.id}\n")
            f.flush()
            os.fsync(f.fileno())

    def check_name(self, name: str) -> None:
        """Raise UserError for what could not be a name."""
        if not _REF.fullmatch(name) or "/" in name or _HEX.fullmatch(name) or ".." in name:
            hint = "use a-z 0-9 _ . - , starting with a letter or digit, not hex digits alone"
            raise UserError(f"`{name}` cannot be a name", hint)

    def names(self) -> dict[str, str]:
        """Name -> `kind/id`."""
        folder = self.root / "names"
        lines = (
            {p.name: p.read_text().split("\n") for p in sorted(folder.iterdir())} if folder.is_dir() else {}
        )
        # A line without its newline is a write cut short; the one before it holds.
        return {n: whole[-1].split()[1] for n, ls in lines.items() if (whole := [x for x in ls[:-1] if x])}

    # Making

    @contextlib.contextmanager
    def work(self, stage: str, key: str, waiting: Callable[[], None] | None = None) -> Iterator[Path]:
        """The folder of one run with an empty `out/`, under a lock: one question, one folder, one writer.

        What a killed attempt left in `out/` is removed; everything else (checkpoints) is kept for resuming.
        `waiting` is called once if another process holds the lock.
        """
        path = self.run_folder(stage, key)
        with plain_errors(f"opening the store {self.root}"):
            self._found()
        with locked(self.root / "locks" / path.name, path, waiting):
            with plain_errors("preparing the run"):
                remove(path / "out")
                (path / "out").mkdir(parents=True)
            try:
                yield path
            except BaseException:
                shutil.rmtree(path / "out", ignore_errors=True)  # frees the disk; checkpoints stay
                raise
            finally:
                for folder in (path / "out", path):  # what nothing was written to need not stay
                    with contextlib.suppress(OSError):
                        folder.rmdir()

    def run_folder(self, stage: str, key: str) -> Path:
        return self.root / "runs" / f"{re.sub(r'[^a-z0-9_.-]', '_', stage.lower())}-{key[:16]}"

    def publish(
        self,
        work: Path,
        *,
        kind: str,
        asked: Mapping[str, Any],
        record: Mapping[str, Any],
        key: str | None = None,
    ) -> Artefact:
        """Move `work/out` into the store in one rename, point the key of `asked` at it, remove `work`.

        `record` is what else the manifest says. Equal content already there is kept, or replaced if damaged.
        """
        out, key = work / "out", key or digest(asked)
        with plain_errors("publishing"):
            if (work / "timing.jsonl").exists():
                os.replace(work / "timing.jsonl", out / "timing.jsonl")
            files = describe(out)
            if not files:
                raise UserError(f"nothing was written to {out}", "the stage ended without a result")
            ident = content_id(kind, {name: f["sha256"] for name, f in files.items()})
            manifest = {"schema": SCHEMA, "kind": kind, "id": ident, "key": key, "published": _now()}
            manifest |= {k: v for k, v in record.items() if k not in (*manifest, "asked", "files")}
            manifest |= {"asked": asked, "files": files}
            write_durably(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
            target = self.root / "artefacts" / kind / ident
            seal(out)
            self._place(out, target)
            art = self._read(target)
            assert art is not None
            entry = {"artefact": f"{kind}/{ident}", "config": record.get("config", {})}
            entry["manifest_sha256"] = file_digest(target / "manifest.json")
            write_durably(self.root / "keys" / key, json.dumps(entry, indent=1, sort_keys=True) + "\n")
            remove(work)
        return art

    def add(self, source: Path | str, kind: str = "raw") -> Artefact:
        """Bring outside files in by content. The only door: no stage reads a path of its own.

        A file's name is content too (it tells the format, and stands in messages about bad lines). Of a model
        folder enters what is needed to run it. A folder written by `--output` comes back as it was.
        """
        source = Path(source).expanduser()
        with plain_errors(f"reading {source}"):
            files, exported = outside.files(source, kind)
            hashes = {name: file_digest(path) for name, path in files.items()}
            if exported and hashes != {name: f["sha256"] for name, f in exported["files"].items()}:
                files, exported = outside.files(source, kind, trust_manifest=False)  # edited since: new data
                hashes = {name: file_digest(path) for name, path in files.items()}
        ident = content_id(kind, hashes)
        if here := self._whole(kind, ident):
            return here
        with self.work("add", ident) as work:
            if here := self._whole(kind, ident):
                return here
            with plain_errors(f"copying {source}"):
                for name, path in files.items():
                    to = work / "out" / name
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, to)
                # The copy is hashed again: what is edited meanwhile gets the id of what was copied.
                copied = {name: f["sha256"] for name, f in describe(work / "out").items()}
            record = {"stage": "add", "version": 1, "config": {}, "inputs": {}, "seconds": 0.0}
            facts: dict[str, Any] = {"files": len(copied)}
            if left := outside.passed_over(source) if kind == "raw" else []:
                facts |= {"passed_over": len(left), "passed_over_first": left[:5]}
            record |= {"facts": facts, "source": str(source.absolute())}
            asked: Mapping[str, Any] = {"stage": "add", "kind": kind, "files": copied}
            if exported and copied == hashes:
                record, asked = exported, exported["asked"]
            return self.publish(work, kind=kind, asked=asked, record=record)

    # Keeping

    def verify(self, art: Artefact) -> list[str]:
        """Everything that is wrong with an artefact, in sentences; nothing if it is sound.

        Re-hashes each file, looks for missing and extra ones, recomputes the id and the key.
        """
        listed: Mapping[str, str] = {name: f["sha256"] for name, f in art.manifest["files"].items()}
        there = {p.relative_to(art.path).as_posix(): p for p in sorted(art.path.rglob("*")) if not p.is_dir()}
        wrong = [f"{name} is missing" for name in sorted(listed.keys() - there.keys())]
        wrong += [f"{name} is extra" for name in sorted(there.keys() - listed.keys() - set(UNHASHED))]
        for name in sorted(listed.keys() & there.keys()):
            if file_digest(there[name]) != listed[name]:
                wrong.append(f"{name} has changed on disk")
        if content_id(art.kind, listed) != art.id or art.path.parts[-2:] != (art.kind, art.id):
            wrong.append("the id does not fit the kind and the files the manifest lists")
        if digest(art.manifest.get("asked", {})) != art.manifest.get("key"):
            wrong.append("the key does not fit the question in the manifest")
        entry = self.record(art.manifest.get("key", "none")) or {}
        ours = entry.get("artefact") == f"{art.kind}/{art.id}"
        if ours and entry["manifest_sha256"] != file_digest(art / "manifest.json"):
            wrong.append("manifest.json has changed on disk")
        return wrong

    def gc(self, older_than_days: float = 7.0, unnamed: bool = False, dry_run: bool = False) -> list[Removed]:
        """Remove runs left unpublished for so long, keys without an artefact, and drafts.

        `unnamed` also removes artefacts that no name (through what it was made from) and no open run needs.
        """
        gone = []
        for run in sorted(self.root.glob("runs/*")):
            newest = max((p.lstat().st_mtime for p in [run, *run.rglob("*")]), default=0.0)
            if time.time() - newest >= older_than_days * 86400:
                with locked(self.root / "locks" / run.name, run, block=False) as mine:
                    if mine:
                        gone.append(self._drop(run, "unpublished run", dry_run))
        keep = self._needed() if unnamed else None
        for path in self._matching("*", ""):
            if keep is not None and f"{path.parent.name}/{path.name}" not in keep:
                gone.append(self._drop(path, "no name needs it", dry_run))
        dropped = {r.path for r in gone}
        for key in sorted(self.root.glob("keys/*")):
            entry = self.record(key.name) or {"artefact": "?"}
            target = self.root / "artefacts" / entry["artefact"]
            if key.name.startswith(".") or not self.has(entry["artefact"]) or target in dropped:
                gone.append(self._drop(key, "key without an artefact", dry_run))
        return gone

    def _drop(self, path: Path, why: str, dry_run: bool) -> Removed:
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        removed = Removed(path, why, sum(p.stat().st_size for p in files))
        if not dry_run:
            # Out of sight first: a reader must never meet half an artefact.
            aside = self.root / "runs" / f"gone-{time.time_ns()}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, aside)
            remove(aside)
        return removed

    def _needed(self) -> set[str]:
        roots = set(self.names().values())
        for asked in self.root.glob("runs/*/asked.json"):
            with contextlib.suppress(OSError, ValueError):
                roots |= set(json.loads(asked.read_text()).get("inputs", {}).values())
        arts = [a for ref in roots if (a := self._read(self.root / "artefacts" / ref))]
        return {f"{a.kind}/{a.id}" for art in arts for _, a in self.lineage(art)}

    def _matching(self, kind: str, prefix: str) -> list[Path]:
        base = self.root / "artefacts"
        kinds = (sorted(base.iterdir()) if kind == "*" else [base / kind]) if base.is_dir() else []
        return [
            p
            for k in kinds
            if k.is_dir()
            for p in sorted(k.iterdir())
            if p.name.startswith(prefix) and _is_id(p)
        ]

    def _whole(self, kind: str, ident: str) -> Artefact | None:
        art = self._read(self.root / "artefacts" / kind / ident)
        return art if art is not None and sizes_hold(art) else None

    def _read(self, path: Path) -> Artefact | None:
        try:
            manifest = json.loads((path / "manifest.json").read_text())
        except (OSError, ValueError):
            return None
        return Artefact(path, manifest) if isinstance(manifest, dict) and "id" in manifest else None

    def _place(self, out: Path, target: Path) -> None:
        """Rename `out` to `target`. Equal content may be there already, even since a moment ago."""
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                os.rename(out, target)
                return sync(target.parent)
            except OSError as err:
                if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            here = self._read(target)
            if here is not None and not self.verify(here):
                return remove(out)
            aside = self.root / "runs" / f"damaged-{target.name[:16]}-{time.time_ns()}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(target, aside)

    def _found(self) -> None:
        """Lay the store's folder down, out of reach of git."""
        if not (self.root / ".gitignore").exists():
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / ".gitignore").write_text("*\n")


def _is_id(path: Path) -> bool:
    return len(path.name) == 64 and path.is_dir()


def _now() -> str:
    milliseconds = time.time_ns() // 1_000_000  # read once: seconds and fraction must be of one moment
    seconds, fraction = divmod(milliseconds, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{fraction:03d}Z"

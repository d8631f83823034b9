"""An artefact: a published folder, its manifest, and the hash that is its id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.disk import file_digest

SCHEMA = 1
UNHASHED = ("manifest.json", "timing.jsonl")
"""Wall-clock lives in these; it must not move the id."""


@dataclass(frozen=True)
class Artefact:
    """A published folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def id(self) -> str:
        return self.manifest["id"]

    @property
    def ref(self) -> str:
        return f"{self.kind}/{self.id[:12]}"

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.manifest.get("facts", {})

    @property
    def inputs(self) -> Mapping[str, str]:
        """Role -> `kind/id` of what it was made from."""
        return self.manifest.get("inputs", {})

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(f["size"] for f in self.manifest["files"].values())

    def __truediv__(self, name: str) -> Path:
        return self.path / name


def digest(value: Any) -> str:
    """Hash of plain data, independent of key order and white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def content_id(kind: str, files: Mapping[str, str]) -> str:
    """The id: a hash of the kind and of each file's name and hash."""
    return digest({"kind": kind, "files": dict(files)})


def describe(out: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file below `out` that counts."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        assert not path.is_symlink(), f"a stage must not publish links: {name}"
        if path.is_file() and name not in UNHASHED:
            found[name] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    return found


def sizes_hold(art: Artefact) -> bool:
    """The cheap check at each lookup; `verify` is the thorough one."""
    try:
        return all((art / name).stat().st_size == f["size"] for name, f in art.manifest["files"].items())
    except OSError:
        return False

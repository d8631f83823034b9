"""Run a stage, or one of the programs, from the words of the command line."""

from __future__ import annotations

import dataclasses as dc
import importlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caravan import config, outside, progress, stage
from caravan.cli.help import PROGRAMS, RUNTIME
from caravan.disk import plain_errors
from caravan.refs import Make, resolve
from caravan.store import Artefact, Store
from caravan.types import UserError

NO_VALUE = ("strict",)


def stage_command(name: str, words: Sequence[str]) -> int:
    """`caravan STAGE --role REF --field value`: prints the reference of what came out."""
    roles: Mapping[str, str] = stage.literal(stage.source("stages", name), "INPUTS") or {}
    taken, rest = take(words, [*roles, *RUNTIME], [role for role, spec in roles.items() if stage.many(spec)])
    for role, spec in roles.items():
        if role not in taken and not stage.optional(spec):
            if rest:  # `--bas x`: the misspelt flag is what to say, not the role that it left empty
                _settings(name, rest, roles)
            raise UserError(f"{name} needs --{role}: {_article(stage.kinds(spec))}", stage.how(spec))
    cfg = _settings(name, rest, roles)
    store, rt = Store(taken.get("store")), runtime(taken)
    output = _new_folder(taken.get("output"))
    if "name" in taken:
        store.check_name(taken["name"])

    inputs = {
        key: resolve(store, text, roles[stage.role_of(key)], _maker(store, rt))
        for key, text in taken.items()
        if stage.role_of(key) in roles
    }
    art = progress.execute(store, name, cfg, inputs, rt)
    if stage.rank() > 0:
        return 0  # rank 0 speaks for all
    if "name" in taken:
        store.name(taken["name"], art)
    if output:
        export(art, output)
    print(art.ref)
    return 0


def _settings(name: str, words: Sequence[str], roles: Mapping[str, str]) -> Any:
    """The stage's Config from its flags."""
    cls = stage.load("stages", name).Config
    return config.from_flags(cls, words, f"caravan {name}", also=[*roles, *RUNTIME])


def program(command: str, words: Sequence[str]) -> int:
    """`caravan serve REF --field value`: main(cfg, store, rt) of the program's module, which may say which
    kinds of folder it ACCEPTS beside models."""
    module = importlib.import_module("caravan." + PROGRAMS[command].removesuffix(".py").replace("/", "."))
    fields = {f.name: f for f in dc.fields(module.Config)}
    free = [f for f in RUNTIME if f not in fields and f not in ("output", "name")]
    taken, rest = take(words, free)
    rest = _positional(command, fields, rest)
    cfg = config.from_flags(module.Config, rest, f"caravan {command}", also=free)
    store, rt = Store(taken.get("store")), runtime(taken)
    accepts = getattr(module, "ACCEPTS", "model").split("|")

    def full(text: str) -> str:
        written = outside.manifest(Path(text).expanduser()) or {}  # by --output
        kind = written["kind"] if written.get("kind") in accepts else "model"
        art = resolve(store, text, kind, _maker(store, rt))
        return f"{art.kind}/{art.id}"

    if isinstance(model := getattr(cfg, "model", None), str) and model:
        cfg = dc.replace(cfg, model=full(model))
    if isinstance(models := getattr(cfg, "models", None), tuple):
        cfg = dc.replace(cfg, models=tuple(full(m) for m in models))
    return int(module.main(cfg, store, rt) or 0)


def _maker(store: Store, rt: stage.Runtime) -> Make:
    """Run a stage on raw data as it is by default."""

    def make(name: str, raw: Artefact) -> Artefact:
        return progress.execute(store, name, stage.load("stages", name).Config(), {"raw": raw}, rt)

    return make


def take(
    words: Sequence[str], flags: Sequence[str], many: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Split off `--flag value` and `--flag=value` for these flags; the rest stays in order.

    The second value of a flag in `many` is taken as `flag.2`, the third as `flag.3`.
    """
    taken: dict[str, str] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        head, equals, value = word.partition("=")
        flag = head.removeprefix("--").replace("-", "_")
        if not head.startswith("--") or flag not in flags:
            rest.append(word)
            continue
        if flag in NO_VALUE:
            value = value or "true"
        elif not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"`{head}` needs a value", f"write `{head} VALUE`")
            value = queue.pop(0)
        if flag in taken and flag in many:
            flag = f"{flag}.{sum(stage.role_of(key) == flag for key in taken) + 1}"
        if flag in taken:
            raise UserError(f"`{head}` is given twice", "keep one")
        taken[flag] = value
    return taken, rest


def runtime(taken: Mapping[str, str]) -> stage.Runtime:
    """The run flags as a Runtime; whatever is not given keeps its default."""
    given: dict[str, Any] = {k: taken[k] for k in ("device",) if k in taken}
    if "device" in given and given["device"].split(":")[0] not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"`--device {given['device']}` is unknown", "one of auto, cpu, cuda, cuda:1, mps")
    for flag, kind in (("threads", int), ("save_steps", int), ("save_seconds", float)):
        if flag in taken:
            given[flag] = _number(flag, taken[flag], kind)
    if "engine" in taken:
        if taken["engine"] not in ("processes", "ray"):
            raise UserError(f"`--engine {taken['engine']}` is unknown", "one of processes, ray")
        given["engine"] = taken["engine"]
    if "strict" in taken:
        given["strict"] = taken["strict"].lower() in ("true", "yes", "on", "1")
    return stage.Runtime(**given)


def export(art: Artefact, to: Path) -> None:
    """Copy an artefact out as a plain, writable folder that appears at once."""
    draft = to.with_name(f".{to.name}.{os.getpid()}")
    with plain_errors(f"writing {to}"):
        try:
            shutil.copytree(art.path, draft, copy_function=shutil.copyfile)
            if to.exists():
                shutil.rmtree(to)  # only an empty folder or an earlier export gets here
            os.rename(draft, to)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    print(f"copied to {to}", file=sys.stderr)


def _new_folder(text: str | None) -> Path | None:
    """A folder that can be written: absent, empty, or an earlier export."""
    if text is None:
        return None
    path = Path(text).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"--output {text} is a file", "give a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not (path / "manifest.json").exists():
        raise UserError(f"--output {text} holds other files", "give a folder that does not exist yet")
    with plain_errors(f"making {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"no permission to write into {path.parent}", "give another --output folder")
    return path


def _positional(command: str, fields: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """`caravan serve REF` means `--model REF` (or `--models REF REF`)."""
    lead = 0
    while lead < len(words) and not words[lead].startswith("-"):
        lead += 1
    if not lead:
        return list(words)
    into = next((f for f in ("model", "models") if f in fields), None)
    if into is None or (into == "model" and lead > 1):
        word = words[0] if into is None else words[1]
        raise UserError(f"`{word}` stands alone", f"`caravan {command} --help` shows what can be given")
    return [f"--{into}", *words]


def _number(flag: str, text: str, kind: type) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or value <= 0:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"`--{flag.replace('_', '-')} {text}` cannot be read", f"{wanted} above zero")
    return value


def _article(kinds: Sequence[str]) -> str:
    words = " or ".join("raw data" if kind == "raw" else kind for kind in kinds)
    some = kinds[0] == "raw" or kinds[0].endswith("s")
    return words if some else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

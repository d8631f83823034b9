"""A stage is a module: Config, INPUTS, OUTPUT, USES, VERSION and run(). This file finds and executes stages.

    Config   frozen keyword-only dataclass with a sentence under each field
    INPUTS   role -> kind; "model|reward" is either, a trailing "?" makes the role optional,
             a trailing "+" lets it be given more than once (then `series` reads it)
    OUTPUT   kind of what comes out
    USES     config field -> registry folder it names a module of ("algos/rl"); its VERSION enters the key
    VERSION  raised by hand when the same question should get a new answer
    RANKS    True where the processes of a launch (torchrun) work together; otherwise the first one runs the
             stage and the others wait for what comes out. It may be left out
    run      (cfg, inputs, out, rt) -> facts; writes only into `out`, checkpoints and metrics into `rt.work`

The folder is the registry: `load("stages", "sft")` is caravan/stages/sft.py; a dotted name is somebody's own
module.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from caravan import config, provenance
from caravan.disk import plain_errors, write_durably
from caravan.store import Artefact, Store, digest
from caravan.types import UserError

PACKAGE = Path(__file__).parent
ROAD = (
    *("corpus", "signals", "quality", "filter", "dedup", "decontaminate", "pii", "tokenizer", "shards"),
    *("pretrain", "conversations", "template", "sft", "preferences", "reward", "rl", "prefer", "evaluate"),
    *("merge", "grow", "upcycle", "quantize"),
)
"""The stages in the order of the journey; others come after them."""
_DOC = re.compile(r'(?:\s*#[^\n]*\n)*\s*r?("""|"|\'\'\'|\')(.*?)(?<!\\)\1', re.DOTALL)
_CLOCK = re.compile(r"(^|_)(seconds?|time|timestamp|elapsed|per_second|memory|mfu)(_|$)")


def _quiet(done: float, total: float, unit: str, **numbers: Any) -> None:
    """Show nothing."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a run is carried out. Recorded, never hashed: what can change the bytes belongs into Config."""

    work: Path = Path()
    """Folder for checkpoints and metrics; it survives a crash. `execute` sets it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    threads: int | None = None
    """Threads for tensor work; none leaves it to torch."""
    save_seconds: float = 60.0
    """Seconds between checkpoints."""
    save_steps: int | None = None
    """Steps between checkpoints, instead of seconds."""
    strict: bool = False
    """Stop at the first malformed line instead of putting it into quarantine."""
    engine: str = "processes"
    """What maps work over batches of data: processes of this machine, or `ray` (a cluster)."""
    report: Callable[..., None] = _quiet
    """report(done, total, unit, **numbers) shows progress; cheap enough for every step."""


class Stage(Protocol):
    """What a stage module offers."""

    Config: type
    INPUTS: Mapping[str, str]
    OUTPUT: str
    USES: Mapping[str, str]
    VERSION: int

    def run(self, cfg: Any, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a stage, and the key that finds its answer."""

    name: str
    stage: Any
    cfg: Any
    inputs: Mapping[str, Artefact]
    asked: Mapping[str, Any]
    uses: Mapping[str, Mapping[str, int]]

    @functools.cached_property
    def key(self) -> str:
        return digest(self.asked)


def names(folder: str) -> list[str]:
    """Modules of a registry folder (`stages`, `algos/rl`, ...), without importing them."""
    return sorted(p.stem for p in (PACKAGE / folder).glob("*.py") if not p.stem.startswith("_"))


def road() -> list[str]:
    """Every stage there is, in the order of the journey."""
    there = names("stages")
    return [n for n in ROAD if n in there] + [n for n in there if n not in ROAD]


def source(folder: str, name: str) -> Path:
    """The file of a registry module or of a dotted one; UserError with the nearest name if there is none."""
    if "." in name:
        with contextlib.suppress(ModuleNotFoundError, ValueError):
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.origin:
                return Path(spec.origin)
        raise UserError(
            f"there is no module `{name}`", "a dotted name must be importable from the current folder"
        )
    if name not in names(folder):
        raise UserError(f"there is no `{name}` in {folder}", config.nearest(name, names(folder)))
    return PACKAGE / folder / f"{name}.py"


def load(folder: str, name: str) -> Any:
    """The module itself. Errors inside a module are left as they are."""
    source(folder, name)
    dotted = name if "." in name else ".".join(("caravan", *folder.split("/"), name))
    return importlib.import_module(dotted)


def literal(path: Path, name: str) -> Any:
    """The value of a module-level constant, read without importing; None if it is absent or computed."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            with contextlib.suppress(ValueError):
                return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return None


def summary(path: Path) -> str:
    """First paragraph of a module's docstring on one line, read without importing or parsing."""
    found = _DOC.match(path.read_text(encoding="utf-8"))
    return " ".join(found[2].strip().split("\n\n")[0].split()) if found else ""


def kinds(spec: str) -> tuple[str, ...]:
    """The kinds a role takes: "model|reward?" gives ("model", "reward")."""
    return tuple(spec.rstrip("?+").split("|"))


def optional(spec: str) -> bool:
    return spec.endswith("?")


def many(spec: str) -> bool:
    """Whether a role takes several artefacts: `shards`, then `shards.2`, `shards.3`, ..."""
    return spec.endswith("+")


def role_of(key: str) -> str:
    """The role of an input: `shards.2` is the second of `shards`."""
    return key.partition(".")[0]


def listed(role: str, artefacts: Sequence[Artefact]) -> dict[str, Artefact]:
    """Several artefacts of one role as inputs."""
    return {role if k == 1 else f"{role}.{k}": art for k, art in enumerate(artefacts, 1)}


def series(inputs: Mapping[str, Artefact], role: str) -> list[Artefact]:
    """The artefacts of a role, in the order given."""
    found = [key for key in inputs if role_of(key) == role]
    return [inputs[key] for key in sorted(found, key=lambda key: (len(key), key))]


def ask(name: str, cfg: Any, inputs: Mapping[str, Artefact | None]) -> Question:
    """Put a question: check the inputs and make the key. UserError for a missing, unknown or unfit input."""
    module = load("stages", name)
    given = {role: art for role, art in inputs.items() if art is not None}
    _check_inputs(name, module.INPUTS, given)
    uses = {f: _versions(folder, getattr(cfg, f)) for f, folder in module.USES.items()}
    asked = {
        "stage": name,
        "version": module.VERSION,
        "config": config.non_default(cfg),
        # Version 1 is where every module starts; left out, a new USES field changes no old key.
        "uses": {
            f: raised for f, found in uses.items() if (raised := {n: v for n, v in found.items() if v != 1})
        },
        "inputs": {role: f"{art.kind}/{art.id}" for role, art in sorted(given.items())},
    }
    return Question(name=name, stage=module, cfg=cfg, inputs=given, asked=asked, uses=uses)


def find(store: Store, question: Question) -> Artefact | None:
    """The answer, if it is already there."""
    return store.find(_settled(store, question).key)


def execute(
    store: Store, name: str, cfg: Any, inputs: Mapping[str, Artefact | None], rt: Runtime | None = None
) -> Artefact:
    """Answer a question once: return what is there, or run the stage (resuming after a crash) and publish.

    Raises UserError for bad inputs, a full disk or missing rights; nothing is half-published then.
    """
    rt = rt or Runtime()
    question = _settled(store, ask(name, cfg, inputs))
    if hit := store.find(question.key):
        return hit
    if rank() > 0:
        return _follow(store, question, rt)
    waiting = functools.partial(rt.report, 0, 0, "waiting for another process")
    with plain_errors(f"running {name}"), store.work(name, question.key, waiting=waiting) as work:
        if hit := store.find(question.key):  # another process answered while we waited for the lock
            return hit
        (work / "asked.json").write_text(json.dumps(dict(question.asked), indent=1))
        (work / "leader").write_text(_launch())
        attempts = _count_attempt(work)
        start, memory = time.monotonic(), provenance.Memory()
        facts = question.stage.run(cfg, question.inputs, work / "out", replace(rt, work=work))
        _copy_metrics(work)
        seconds, peaks = round(time.monotonic() - start, 3), memory.peak()
        record = {
            "stage": name,
            "version": question.stage.VERSION,
            "config": config.to_dict(cfg),
            "uses": question.uses,
            "inputs": question.asked["inputs"],
            "facts": _json(facts or {}),
            "seconds": seconds,
            "attempts": attempts,
            "runtime": {f.name: getattr(rt, f.name) for f in fields(rt) if f.name not in ("work", "report")},
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "caravan": provenance.code(),
            "libraries": provenance.libraries(),
            "machine": {**provenance.machine(), "accelerator": provenance.accelerator()},
            **peaks,
        }
        return store.publish(work, kind=question.stage.OUTPUT, asked=question.asked, record=record)


def _settled(store: Store, question: Question) -> Question:
    """The key leaves out settings at their default; should a default itself have changed, ask in full.

    The recorded config tells: a field that both know must have the same value now as then.
    """
    then, now = (store.record(question.key) or {}).get("config", {}), config.to_dict(question.cfg)
    if _agree(then, now):
        return question
    return replace(question, asked={**question.asked, "config": now, "defaults": "changed"})


def _agree(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    for name in then.keys() & now.keys():
        old, new = then[name], now[name]
        nested = isinstance(old, Mapping) and isinstance(new, Mapping)
        if not (_agree(old, new) if nested else old == new):
            return False
    return True


def _check_inputs(name: str, roles: Mapping[str, str], given: Mapping[str, Artefact]) -> None:
    for role in given:
        if role not in roles and not many(roles.get(role_of(role), "")):
            raise UserError(f"{name} takes no `{role}`", config.nearest(role, list(roles)))
    for role, spec in roles.items():
        if role not in given and not optional(spec):
            wanted = " or ".join(kinds(spec))
            raise UserError(f"{name} needs `{role}`: an artefact of kind {wanted}", how(spec))
        for art in series(given, role):
            if art.kind not in kinds(spec):
                wanted = " or ".join(kinds(spec))
                raise UserError(f"{name} needs a {wanted} as `{role}`, and {art.ref} is not one", how(spec))


def how(spec: str) -> str:
    """A sentence on how to come by an artefact of these kinds."""
    ways = []
    for kind in kinds(spec):
        if kind == "raw":
            ways.append("give a file or a folder")
            continue
        makers = [f"`caravan {n}`" for n in road() if literal(source("stages", n), "OUTPUT") == kind]
        if makers:
            ways.append("made by " + " or ".join(filter(None, [", ".join(makers[:-1]), makers[-1]])))
        if maker(kind):
            ways.append("a file or folder to make it of will do")
        if kind in ("model", "reward"):
            ways.append("a checkpoint folder or hf:ORG/NAME will do")
    return "; ".join(dict.fromkeys(ways)) or "`caravan ls` shows what is there"


def maker(kind: str) -> str | None:
    """The stage that makes this kind from raw files alone."""
    makers = (n for n in names("stages") if literal(source("stages", n), "OUTPUT") == kind)
    roles = {n: literal(source("stages", n), "INPUTS") or {} for n in makers}
    return next((n for n, r in roles.items() if [s for s in r.values() if not optional(s)] == ["raw"]), None)


def _versions(folder: str, value: Any) -> dict[str, int]:
    """Name -> VERSION of the modules a config field selects; "auto" may select any of the folder."""
    chosen = [value] if isinstance(value, str) else list(value or ())
    if chosen == ["auto"] and "auto" not in names(folder):
        chosen = names(folder)
    found = {}
    for name in chosen:
        if name in ("", "none") and name not in names(folder):
            continue
        version = literal(source(folder, name), "VERSION")
        version = getattr(load(folder, name), "VERSION", None) if version is None else version
        if not isinstance(version, int):
            raise UserError(f"{folder} module `{name}` has no VERSION", "write `VERSION = 1` at its head")
        found[name] = version
    return found


def _count_attempt(work: Path) -> int:
    path = work / "attempts"
    count = 1 + (int(path.read_text() or 0) if path.exists() else 0)
    write_durably(path, str(count))
    return count


def _copy_metrics(work: Path) -> None:
    """Take the stage's metrics along, without what a clock or a memory gauge said: that would move the id."""
    if not (work / "metrics.jsonl").exists():
        return
    with (work / "metrics.jsonl").open() as lines, (work / "out" / "metrics.jsonl").open("w") as out:
        for row in map(json.loads, lines):
            out.write(json.dumps({k: v for k, v in row.items() if not _CLOCK.search(k)}) + "\n")


def _json(value: Any) -> Any:
    """Facts as plain JSON; numbers of numpy or torch become Python's, what is not finite becomes text."""
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return _json(value.item()) if hasattr(value, "item") else str(value)


# Several ranks (torchrun): rank 0 holds the lock and publishes; the others run beside it in its work folder.


def rank() -> int:
    """Place of this process among those of a launch; 0 if it is alone."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def _launch() -> str:
    """What the ranks of one launch share and another launch does not."""
    parts = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    return "/".join(os.environ.get(p, "") for p in parts)


def _follow(store: Store, question: Question, rt: Runtime) -> Artefact:
    """Wait until rank 0 runs this question, run with it into a folder to throw away, wait for its answer.
    Where the stage has no work for several, wait for the answer alone."""
    if not getattr(question.stage, "RANKS", False):
        for _ in _until_answered(store, question):
            pass
    work = store.run_folder(question.name, question.key)
    for _ in _until_answered(store, question):
        with contextlib.suppress(OSError):
            if (work / "leader").read_text() == _launch():
                break
    else:
        hit = store.find(question.key)
        assert hit is not None
        return hit
    scratch = work / f"out-rank{rank()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with plain_errors(f"running {question.name}"):
            question.stage.run(question.cfg, question.inputs, scratch, replace(rt, work=work, report=_quiet))
    except (OSError, UserError):
        if store.find(question.key) is None:  # else rank 0 was done first and cleared the folder under us
            raise
    for _ in _until_answered(store, question):
        pass
    hit = store.find(question.key)
    assert hit is not None
    return hit


def _until_answered(store: Store, question: Question, poll_seconds: float = 0.05) -> Iterator[None]:
    while store.find(question.key) is None:
        yield
        time.sleep(poll_seconds)

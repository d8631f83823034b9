"""Write the passport of a model: one self-contained page with its lineage, settings, curves, samples and
costs; or of a corpus: what each rule removed, what stayed, copies, signals, licences.

    caravan report model/1a2b3c4d5e6f
    caravan report ppo --page passport.html
    caravan report corpus/1a2b3c4d5e6f --page corpus.html

The page loads nothing from outside and runs no code; every text in it is escaped. It can be mailed as it is:
of the places the raw files came from only the last part of the path is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caravan.report import chats, draw, page, read
from caravan.report.page import duration, size
from caravan.store import Artefact, Store

if TYPE_CHECKING:
    from caravan.stage import Runtime

TEMPLATE = Path(__file__).with_name("passport.html.j2")
ACCEPTS = "model|reward|corpus|shards|conversations|preferences|tokenizer|evaluation"
"""Kinds of folder written by --output that have a page."""
SECRET = ("key", "token", "password", "secret")
LICENCE_FILES = ("licence", "license", "copying", "notice")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model or corpus, and where the page goes."""

    model: str
    """The model (or corpus, shards, chats, ...): an artefact reference, a name, or a folder written by
    --output."""
    page: str = "report.html"
    """File to write."""


def main(cfg: Config, store: Store, rt: Runtime) -> int:
    """Write the page of one model and everything it was made from, with every evaluation of any of them."""
    art, path = _find(store, cfg.model), Path(cfg.page).expanduser()
    if art.kind in ("corpus", "shards"):
        from caravan.report import corpus

        print(corpus.build(store, art, path))
        return 0
    road = [node for _, node in store.lineage(art)]
    known = {read.key_of(node) for node in road}
    road += [found for found in store.ls("evaluation") if found.inputs.get("model") in known]
    print(build(store, road, None, path, art))
    return 0


def build(
    store: Store,
    artefacts: list[Artefact],
    table: list[dict[str, Any]] | None,
    path: Path,
    subject: Artefact | None = None,
) -> Path:
    """Write the passport of a road to `path`, in one rename, and return it.

    `artefacts`: all of the road, in any order; ancestors they name are added from the store. `table`: rows of
    "did each stage help?", first column the model; a cell is a text, a number, or a mapping with `value` and,
    where known, `low`, `high` (interval), `n`, `difference` (another such mapping, against the row's
    predecessor) and `better` (true, false, none). Without a table one is made from the evaluations. UserError
    when the folder cannot be written.
    """
    road = _complete(store, artefacts)
    text = page.render(TEMPLATE, _facts(road, table, subject or _subject(store, road)))
    return page.write(text, path)


def _find(store: Store, model: str) -> Artefact:
    path = Path(model).expanduser()
    manifest = path / "manifest.json"
    if manifest.is_file():
        return Artefact(path, json.loads(manifest.read_text()))
    return store.open(model)


def _complete(store: Store, artefacts: Sequence[Artefact]) -> list[Artefact]:
    """With all ancestors, each once, parents first."""
    found: dict[str, Artefact] = {read.key_of(art): art for art in artefacts}
    for art in list(found.values()):
        for _, node in store.lineage(art):
            found.setdefault(read.key_of(node), node)
    done: dict[str, Artefact] = {}

    def visit(art: Artefact) -> None:
        if read.key_of(art) in done:
            return
        for parent in art.inputs.values():
            if parent in found:
                visit(found[parent])
        done[read.key_of(art)] = art

    for art in found.values():
        visit(art)
    return list(done.values())


def _subject(store: Store, road: list[Artefact]) -> Artefact | None:
    """The model most went into; of equal ones the first (a quantised copy adds nothing but itself)."""
    models = [art for art in road if art.kind == "model" and "bits" not in art.manifest.get("config", {})]
    made = {art.id: sum(1 for _ in store.lineage(art)) for art in models}
    return max(models, key=lambda art: made[art.id], default=road[-1] if road else None)


def _facts(
    road: list[Artefact], table: list[dict[str, Any]] | None, subject: Artefact | None
) -> dict[str, Any]:
    """Everything the template says, as plain data and finished pictures."""
    names = read.labels(road)
    evaluations = [art for art in road if art.kind == "evaluation"]
    models = [art for art in road if art.kind == "model"]
    cells = table if table is not None else read.scores_table(evaluations, names)
    seconds = sum(float(art.manifest.get("seconds", 0.0)) for art in road)
    return {
        "title": names[read.key_of(subject)] if subject else "nothing",
        "subject": subject.ref if subject else "",
        "published": str(subject.manifest.get("published", ""))[:10] if subject else "",
        "cards": _cards(road, models, seconds),
        "lineage": draw.lineage(_boxes(road, names)) if road else "",
        "columns": _columns(cells),
        "table": [[_cell(row.get(column)) for column in _columns(cells)] for row in cells],
        "stages": [_stage(art, names) for art in road if art.manifest.get("stage") != "add"],
        "sources": [_source(art) for art in road if art.manifest.get("stage") == "add"],
        "chats": [chats.section(art, names[read.key_of(art)]) for art in road if art.kind in chats.KINDS],
        "samples": read.samples(evaluations, names),
        "removed": read.removed(road, names),
        "costs": _costs(road, names),
        "seconds": duration(seconds),
        "software": _software(road),
    }


def _cards(road: Sequence[Artefact], models: Sequence[Artefact], seconds: float) -> list[tuple[str, str]]:
    """The few numbers everybody asks for first."""
    fact: dict[str, Any] = {}
    for art in models:
        fact = {**art.facts, **{k: v for k, v in fact.items() if k in ("parameters", "tokens")}}
    peak = max((read.peak_bytes(art) for art in road), default=0)
    cards = [("artefacts", str(len(road))), ("time of all stages", duration(seconds))]
    if isinstance(fact.get("parameters"), int):
        cards.insert(0, ("parameters", draw.number(fact["parameters"])))
    if isinstance(fact.get("tokens"), int):
        cards.insert(1, ("tokens of pre-training", draw.number(fact["tokens"])))
    return [*cards, ("largest memory", size(peak))] if peak else cards


def _boxes(road: Sequence[Artefact], names: Mapping[str, str]) -> list[draw.Box]:
    return [
        draw.Box(
            key=read.key_of(art),
            title=names[read.key_of(art)],
            note=f"{art.kind} {art.id[:8]}",
            kind=art.kind,
            parents=tuple(dict.fromkeys(art.inputs.values())),
            # The reference may be the measured model itself.
            aside=frozenset(set(art.inputs.values()) - {art.inputs.get("model")})
            if art.kind == "evaluation"
            else frozenset(),
        )
        for art in road
    ]


def _columns(table: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in table for column in row))


def _cell(value: Any) -> dict[str, Any]:
    """Text, interval and judgement of one cell."""
    if not isinstance(value, Mapping):
        return {"text": _plain(value), "interval": "", "note": "", "better": None}
    form = str(value.get("format", ""))
    note = f"n = {value['n']}" if value.get("n") else ""
    change = value.get("difference")
    if isinstance(change, Mapping):
        note = _number(change.get("value"), form, signed=True)
        if interval := _interval(change, form, signed=True):
            note += f" ({interval})"
    text = _number(value.get("value"), form)
    return {"text": text, "interval": _interval(value, form), "note": note, "better": value.get("better")}


def _interval(value: Mapping[str, Any], form: str, signed: bool = False) -> str:
    if value.get("low") is None or value.get("high") is None:
        return ""
    return f"{_number(value['low'], form, signed)} to {_number(value['high'], form, signed)}"


def _number(value: Any, form: str, signed: bool = False) -> str:
    """By the cell's own format where it has one, like `{:.1%}`."""
    if form and isinstance(value, int | float):
        return (form.replace("{:", "{:+") if signed else form).format(value)
    text = _plain(value)
    return f"+{text}" if signed and isinstance(value, int | float) and value >= 0 else text


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return read.text_of(value)
    return draw.number(float(value)) if value == value and abs(value) != float("inf") else str(value)


def _stage(art: Artefact, names: Mapping[str, str]) -> dict[str, Any]:
    manifest = art.manifest
    return {
        "anchor": draw.anchor(read.key_of(art)),
        "name": names[read.key_of(art)],
        "stage": f"{manifest.get('stage', '')} (version {manifest.get('version', 1)})",
        "kind": art.kind,
        "id": art.id,
        "key": manifest.get("key", ""),
        "inputs": [
            (role, names.get(key, key), draw.anchor(key), key in names) for role, key in art.inputs.items()
        ],
        "config": sorted(_flat(manifest.get("config", {}))),
        "facts": sorted(_flat({k: v for k, v in art.facts.items() if not k.startswith("removed_samples")})),
        "charts": [draw.chart(name, lines) for name, lines in read.curves(art).items()],
        "files": _files(art),
        "seconds": duration(float(manifest.get("seconds", 0.0))),
        "memory": size(read.peak_bytes(art)),
        "attempts": int(manifest.get("attempts", 1)),
        "runtime": sorted(_flat(manifest.get("runtime", {}))),
    }


def _files(art: Artefact) -> list[tuple[str, str, str]]:
    return [(name, size(f["size"]), f["sha256"]) for name, f in sorted(art.manifest.get("files", {}).items())]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values as text; long ones cut. A value whose name speaks of a secret is not shown."""
    out: list[tuple[str, str]] = []
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            out += _flat(inner, f"{prefix}{name}.")
        elif name.lower().endswith(SECRET) and isinstance(inner, str) and inner:
            out.append((prefix + name, "(not shown)"))
        else:
            out.append((prefix + name, read.clip(_exact(inner), 300)))
    return out


def _exact(value: Any) -> str:
    """A setting as it was, not rounded for the eye."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return repr(value) if isinstance(value, float) else _plain(value)


def _source(art: Artefact) -> dict[str, Any]:
    files = art.manifest.get("files", {})
    stated = art.facts.get("licence") or art.facts.get("license")
    beside = [name for name in files if Path(name).stem.lower() in LICENCE_FILES]
    licence = stated or (f"see {', '.join(beside)}" if beside else "not stated in the files")
    return {
        "anchor": draw.anchor(read.key_of(art)),
        "name": Path(str(art.manifest.get("source", art.ref))).name,
        "ref": art.ref,
        "kind": art.kind,
        "licence": str(licence),
        "count": len(files),
        "size": size(sum(f["size"] for f in files.values())),
        "files": _files(art)[:50],
    }


def _costs(road: Sequence[Artefact], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Seconds and memory of every stage that ran, with a bar for its part of the time."""
    ran = [art for art in road if art.manifest.get("stage") != "add"]
    most = max((float(art.manifest.get("seconds", 0.0)) for art in ran), default=0.0) or 1.0
    return [
        {
            "name": names[read.key_of(art)],
            "anchor": draw.anchor(read.key_of(art)),
            "seconds": duration(float(art.manifest.get("seconds", 0.0))),
            "bar": draw.bar(float(art.manifest.get("seconds", 0.0)) / most),
            "memory": size(read.peak_bytes(art)),
            "disk": size(art.size),
            "attempts": int(art.manifest.get("attempts", 1)),
        }
        for art in ran
    ]


def _software(road: Sequence[Artefact]) -> list[tuple[str, list[str]]]:
    """Every distinct value of code, libraries and machine over the road: one line each when nothing
    changed."""
    found: dict[str, dict[str, None]] = {}
    for art in road:
        for group in ("caravan", "libraries", "machine"):
            for name, value in (art.manifest.get(group) or {}).items():
                if value not in ("", None):
                    shown = size(value) if name == "memory_bytes" else str(value)
                    title = {"caravan": f"caravan {name}", "memory_bytes": "memory"}.get(
                        group if group == "caravan" else name, name.replace("_", " ")
                    )
                    found.setdefault(title, {})[shown] = None
    return [(name, list(values)) for name, values in found.items()]

"""The page of a corpus: what came in, what each rule removed, what stayed; one self-contained file.

Everything comes from the facts, removal lists and signals of the corpora on the way (see `cleaning`) and from
one look through the finished corpus. A road without some step (deduplication, signals, PII) has a page
without that section.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from caravan.data import rules
from caravan.report import cleaning, draw, page, plots, read, thresholds
from caravan.report.page import duration, size
from caravan.store import Artefact, Store
from caravan.types import UserError

TEMPLATE = Path(__file__).with_name("corpus.html.j2")
LOOK_AT = 200_000
"""Documents read for plots and samples; of a larger corpus an even part."""
MOST_RULES = 9
"""Rules drawn apart per step; the rest together."""
TABLES = {
    "benchmarks": "Benchmarks found in the text",
    "duplicates": "Copies by method",
    "lines": "Line filters",
    "mix": "Mix of sources",
}
"""Facts shown as tables, with their titles."""
WHERE = "found in"
QUARANTINED = 100
MOST_LANGUAGES = 18


def build(
    store: Store, subject: Artefact, path: Path, after: Sequence[Artefact] = (), look_at: int = LOOK_AT
) -> Path:
    """Write the page of a corpus (or of the corpus of `shards`) to `path`, in one rename, and return it.
    `after`: what was made from it and is to be named too (tokenizer, shards). UserError if there is no
    corpus, or the page cannot be written."""
    return page.write(page.render(TEMPLATE, facts(store, subject, after, look_at)), path)


def facts(
    store: Store, subject: Artefact, after: Sequence[Artefact] = (), look_at: int = LOOK_AT
) -> dict[str, Any]:
    """Everything the template says, as plain data and finished pictures."""
    if subject.kind != "corpus":
        above = [ref for ref in subject.inputs.values() if ref.startswith("corpus/") and store.has(ref)]
        if not above:
            raise UserError(f"{subject.ref} was not made from a corpus of this store")
        subject, after = store.open(above[0]), [*after, subject]
    steps = [cleaning.step(art) for art in cleaning.chain(store, subject)]
    road = [node for _, node in store.lineage(subject)]
    raw = [art for art in road if art.kind == "raw" and art.ref in _read(steps)]
    groups = cleaning.clusters(steps)
    found = cleaning.census(subject, {g.id: g for g in groups}, look_at)
    names = read.labels([s.art for s in steps])
    return {
        "title": _title(raw, subject),
        "subject": subject.ref,
        "published": str(subject.manifest.get("published", ""))[:10],
        "cards": _cards(steps, after),
        "flows": _flows(steps, names),
        "samples": _removed(steps, names),
        "kept": found.shown,
        "plots": _plots(found),
        "languages": _languages(steps),
        "domains": _domains(found),
        "looked_at": f"{found.looked_at:,}" if found.every > 1 else "",
        "limits": _limits(store, steps, names),
        "rules": _rules(steps, names),
        "tables": _tables(steps, names),
        "clusters": groups,
        "curves": _curves(steps),
        "licences": _licences(raw, found),
        "quarantine": _quarantine(steps),
        "quarantined": sum(int(s.facts.get("quarantined", 0)) for s in steps),
        "stages": _stages(steps, names, after),
    }


def _read(steps: Sequence[cleaning.Step]) -> set[str]:
    """The raw artefacts whose text the corpora hold; benchmarks and lists of words are raw too."""
    given = [(role, ref) for s in steps for role, ref in s.art.inputs.items()]
    return {f"raw/{ref.partition('/')[2][:12]}" for role, ref in given if role.partition(".")[0] == "raw"}


def _title(raw: Sequence[Artefact], subject: Artefact) -> str:
    named = [Path(str(art.manifest.get("source", ""))).name for art in raw]
    return " and ".join(n for n in named if n) if 0 < len(named) < 3 else subject.ref


def _cards(steps: Sequence[cleaning.Step], after: Sequence[Artefact]) -> list[tuple[str, str]]:
    first, last = steps[0].facts, steps[-1].facts
    came, stayed = int(first.get("documents_in", 0)), int(last.get("documents_out", 0))
    bytes_in, bytes_out = int(first.get("bytes_in", 0)), int(last.get("bytes_out", 0))
    cards = [
        ("documents read", f"{came:,}"),
        ("documents kept", f"{stayed:,}"),
        ("text read", size(bytes_in)),
        ("text kept", size(bytes_out)),
    ]
    if bytes_in:
        cards.append(("of the text kept", f"{bytes_out / bytes_in:.1%}"))
    cards += [
        ("tokens to train on", draw.number(float(art.facts["train_tokens"])))
        for art in after
        if "train_tokens" in art.facts
    ]
    seconds = sum(float(a.manifest.get("seconds", 0)) for a in [*(s.art for s in steps), *after])
    return [*cards, ("time of all steps", duration(seconds))]


def _flows(steps: Sequence[cleaning.Step], names: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(title, picture, note) for documents, and for bytes where every removal list tells them."""
    documents = [
        plots.Stop(
            name=names[read.key_of(s.art)],
            came=float(s.facts.get("documents_in", 0)),
            gone=_largest({rule: float(g.documents) for rule, g in s.gone.items()}),
            left=float(s.facts.get("documents_out", 0)),
        )
        for s in steps
    ]
    out = [("Documents", plots.sankey(documents, "documents", draw.number), "")]
    if any(g.bytes is None for s in steps for g in s.gone.values()):
        return [(*out[0][:2], "The removal lists do not tell how large the documents were.")]
    texts = []
    for s in steps:
        lost = {rule: float(g.bytes or 0) for rule, g in s.gone.items()}
        if (s.edited or 0) > 0:
            lost["edited out"] = float(s.edited or 0)
        came, left = (float(s.facts.get(k, 0)) for k in ("bytes_in", "bytes_out"))
        texts.append(plots.Stop(name=names[read.key_of(s.art)], came=came, gone=_largest(lost), left=left))
    return [*out, ("Text", plots.sankey(texts, "bytes", lambda x: size(round(x))), "")]


def _largest(amounts: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    order = sorted(((k, v) for k, v in amounts.items() if v > 0), key=lambda item: (-item[1], item[0]))
    if len(order) <= MOST_RULES + 1:
        return tuple(order)
    rest = order[MOST_RULES:]
    return (*order[:MOST_RULES], (f"{len(rest)} other rules", sum(v for _, v in rest)))


def _removed(steps: Sequence[cleaning.Step], names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "step": names[read.key_of(s.art)],
            "rule": rule,
            "count": f"{g.documents:,}",
            "share": _share(g.documents, s.facts.get("documents_in", 0)),
            "size": size(g.bytes) if g.bytes is not None else "–",
            "shown": g.shown,
        }
        for s in steps
        for rule, g in s.gone.items()
    ]


def _share(part: float, whole: Any) -> str:
    return f"{part / whole:.2%}" if whole else "–"


def _plots(found: cleaning.Census) -> list[str]:
    shape = cleaning.lengths(found)
    return [plots.histogram(shape)] if shape else []


def _languages(steps: Sequence[cleaning.Step]) -> list[dict[str, Any]]:
    """Documents and bytes by language, as read and as kept."""
    last, first = steps[-1].facts.get("languages", {}), steps[0].facts.get("languages", {})
    most = max((int(v.get("bytes", 0)) for v in last.values()), default=0) or 1
    rows = sorted(
        ({**dict.fromkeys(("documents", "bytes"), 0), **last.get(name, {}), "name": name,
          "lost": int(first.get(name, {}).get("documents", 0)) - int(last.get(name, {}).get("documents", 0))}
         for name in {**first, **last}),
        key=lambda row: (-int(row["bytes"]), row["name"]),
    )  # fmt: skip
    if rest := rows[MOST_LANGUAGES + 1 :] and rows[MOST_LANGUAGES:]:
        sums = {key: sum(int(row[key]) for row in rest) for key in ("documents", "bytes", "lost")}
        rows = [*rows[:MOST_LANGUAGES], {"name": f"{len(rest)} others", **sums}]
    return [
        {**row, "bytes": size(int(row["bytes"])), "bar": draw.bar(min(1.0, int(row["bytes"]) / most))}
        for row in rows
    ]


def _domains(found: cleaning.Census, most: int = 24) -> list[dict[str, Any]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for source, n in found.sources.items():
        name = cleaning.domain(source) or "(not said)"
        counts[name] += n * found.every
        sizes[name] += found.bytes_by_source[source] * found.every
    order = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    largest = order[0][1] if order else 1
    rows = [
        {"name": name, "documents": counts[name], "bytes": size(b), "bar": draw.bar(b / max(1, largest))}
        for name, b in order[:most]
    ]
    if rest := order[most:]:
        total = sum(b for _, b in rest)
        row = {"documents": sum(counts[n] for n, _ in rest), "bytes": size(total)}
        rows.append(
            {"name": f"{len(rest)} others", **row, "bar": draw.bar(min(1.0, total / max(1, largest)))}
        )
    return rows


def _limits(store: Store, steps: Iterable[cleaning.Step], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Histograms of the signals that decided, one group per step; rules that removed something come first."""
    groups = []
    for s in steps:
        table, ref = s.facts.get("rules"), s.art.inputs.get("signals", "")
        if not isinstance(table, Mapping) or not table or not store.has(ref):
            continue
        drawn = thresholds.histograms(store.open(ref), table)
        order = sorted(drawn, key=lambda name: -int(table[name].get("broken", 0)))
        groups.append(
            {
                "step": names[read.key_of(s.art)],
                "busy": [plots.histogram(drawn[n]) for n in order if table[n].get("broken")],
                "idle": [plots.histogram(drawn[n]) for n in order if not table[n].get("broken")],
            }
        )
    return groups


def _rules(steps: Iterable[cleaning.Step], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every rule on signals: what it asks, who published it, what it did."""
    known = {rule.name: (rule.why, one.source) for one in rules.load(rules.names()) for rule in one.rules}
    out = []
    for s in steps:
        table = s.facts.get("rules")
        for name, rule in table.items() if isinstance(table, Mapping) else ():
            why, source = known.get(name, ("", ""))
            row = {k: f"{int(rule.get(k, 0)):,}" for k in ("broken", "removed", "alone")}
            share = _share(int(rule.get("removed", 0)), s.facts.get("documents_in"))
            row |= {"name": name, "limit": f"{rule.get('signal', '')}: {rule.get('limit', '')}", "why": why}
            out.append({**row, "source": source, "share": share, "step": names[read.key_of(s.art)]})
    return out


def _tables(steps: Iterable[cleaning.Step], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Facts that are tables: name -> number, or name -> {column: value}."""
    out = []
    for s in steps:
        for title, table in _found(s.facts):
            found = cleaning.contaminations(s.art) if title == TABLES["benchmarks"] else []
            rows: dict[str, Mapping[str, Any]] = {
                str(k).replace("_", " "): v if isinstance(v, Mapping) else {"count": v}
                for k, v in table.items()
            }
            if title == TABLES["benchmarks"]:
                rows = _benchmarks(table, found)
            columns = list(dict.fromkeys(c for row in rows.values() for c in row))
            cells = [[name, *(_cell(row.get(c)) for c in columns)] for name, row in rows.items()]
            step = names[read.key_of(s.art)]
            longest = [max((len(row[k]) for row in cells), default=0) for k in range(1, len(columns) + 1)]
            kinds = [
                "num" if c != WHERE and size < 24 else "break"
                for c, size in zip(columns, longest, strict=True)
            ]
            table = {"title": title, "step": step, "columns": columns, "kinds": kinds, "rows": cells}
            out.append({**table, "shown": found})
    return out


def _benchmarks(
    rows: Mapping[str, Mapping[str, Any]], found: Sequence[cleaning.Contamination]
) -> dict[str, Mapping[str, Any]]:
    """What was found of each benchmark, and where; one line for those of which nothing was."""
    where = {one.name: one.where for one in found}
    out: dict[str, Mapping[str, Any]] = {}
    clean = {name: row for name, row in rows.items() if not row.get("hit")}
    for name, row in [item for item in rows.items() if item[0] not in clean]:
        places = [f"{source} ({documents:,})" for source, documents in where.get(name, ())]
        more = [f"{len(places) - 3} more"] if len(places) > 3 else []
        out[name] = {
            "items": row.get("items"), "long enough": row.get("checked"), "found": row.get("hit"),
            "share": _share(int(row.get("hit", 0)), row.get("checked", 0)),
            "in documents": row.get("documents"), WHERE: ", ".join([*places[:3], *more]) or None,
        }  # fmt: skip
    if clean:
        sums = {key: sum(int(row.get(key, 0)) for row in clean.values()) for key in ("items", "checked")}
        name = next(iter(clean)) if len(clean) == 1 else f"{len(clean)} other benchmarks"
        out[name] = {"items": sums["items"], "long enough": sums["checked"], "found": 0, "share": "none"}
    return out


def _found(of: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(title, table) of a step's facts. Spans mean personal data where documents with some are counted, else
    text cut out as copied."""
    for key, title in TABLES.items():
        if isinstance(of.get(key), Mapping) and of[key]:
            # What was found most stands first; a mix stays in its order.
            yield title, dict(sorted(of[key].items(), key=_weight)) if key == "benchmarks" else of[key]
    spans, holders = of.get("spans"), of.get("documents_with")
    if isinstance(spans, Mapping) and isinstance(holders, Mapping):
        found = {k: {"spans": n, "documents": holders.get(k, 0)} for k, n in spans.items()}
        yield "Personal data by type", found or {"nothing": {"spans": 0, "documents": 0}}
    elif isinstance(spans, Mapping) and spans:
        yield "Copied spans cut out", spans
    if isinstance(sizes := of.get("clusters"), Mapping) and sizes:
        yield "Clusters of copies by size", {f"{k} texts": n for k, n in sizes.items()}


def _weight(item: tuple[str, Any]) -> tuple[float, str]:
    return -float(item[1].get("hit", 0)) if isinstance(item[1], Mapping) else 0.0, item[0]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else draw.number(value)
    if isinstance(value, list | tuple):
        return read.clip(" · ".join(read.text_of(v) for v in value[:5]), 400)
    return read.clip(read.text_of(value), 400)


def _curves(steps: Iterable[cleaning.Step]) -> list[str]:
    """The chance that two texts meet, by how alike they are: where deduplication looks at all."""
    out = []
    for s in steps:
        points = s.facts.get("curve")
        if isinstance(points, list) and points:
            near = s.art.manifest.get("config", {}).get("near")
            marks = [(f"at least {near}", float(near))] if near else []
            line = [(float(p["jaccard"]), float(p["meet"])) for p in points if "meet" in p and "jaccard" in p]
            out.append(plots.curve("chance to meet, by Jaccard similarity", line, marks))
    return out


def _licences(raw: Sequence[Artefact], found: cleaning.Census) -> list[dict[str, Any]]:
    rows = cleaning.licences(raw, found)
    return [{**row, "bytes": size(row["bytes"]), "documents": f"{row['documents']:,}"} for row in rows]


def _quarantine(steps: Iterable[cleaning.Step]) -> list[dict[str, str]]:
    """Places in files that could not be read; equal complaints about one file are counted."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for s in steps:
        for row in read.rows(s.art / "quarantine.jsonl"):
            key = (str(row.get("file", "")), str(row.get("expected", "")))
            counts[key] += 1
            first.setdefault(key, row)
            if len(counts) >= 2 * QUARANTINED:
                break
    return [
        {
            "file": read.clip(file, 120),
            "place": read.clip(read.text_of(first[file, expected].get("place", "")), 60),
            "expected": read.clip(expected, 160),
            "sample": read.clip(read.text_of(first[file, expected].get("sample", "")), 120),
            "count": f"{count:,}",
        }
        for (file, expected), count in counts.most_common(QUARANTINED)
    ]


def _stages(
    steps: Sequence[cleaning.Step], names: Mapping[str, str], after: Iterable[Artefact]
) -> list[dict[str, Any]]:
    out = []
    for art in [*(s.art for s in steps), *after]:
        manifest = art.manifest
        out.append(
            {
                "name": names.get(read.key_of(art), read.label(art)),
                "ref": art.ref,
                "seconds": duration(float(manifest.get("seconds", 0))),
                "memory": size(read.peak_bytes(art)),
                "config": sorted(manifest.get("config", {}).items()),
                "inputs": [(role, f"{PurePosixPath(key).parent}/{key.rpartition('/')[2][:12]}")
                           for role, key in art.inputs.items()],
                "facts": [(k, _cell(v)) for k, v in art.facts.items() if isinstance(v, int | float | str)],
            }
        )  # fmt: skip
    return out

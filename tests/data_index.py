"""docs/data/README.md: every rule with its source and what it did to the data kit.

python -m tests.data_index                      the page, from the rules and docs/data/effects.json
python -m tests.data_index --measure SHARDS     effects.json anew, from shards that `caravan prepare` made of
                                                the kit (in $CARAVAN_STORE)
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data import rules

FOLDER = Path(__file__).parents[1] / "docs" / "data"
PAGES = (
    ("extraction", "HTML, WARC, PDF, EPUB and odd encodings become text"),
    ("signals", "what is measured of every document"),
    ("rules", "published thresholds as data, Chinese ones, your own"),
    ("langid", "which language"),
    ("quality", "GPT-3's classifier and its Pareto draw"),
    ("dedup", "copies: exact, near, by address, spans, by meaning"),
    ("decontamination", "benchmark questions in the text"),
    ("pii", "personal data and secrets"),
    ("mixing", "weights, epochs, languages, phases"),
    ("formats", "chats and preferences in twenty shapes"),
    ("shards", "tokens on disk, readers and writers"),
    ("scale", "cost of a terabyte, memory, Ray, datatrove"),
)
STEPS = {
    "too_short": ("corpus", "fewer than 20 characters after cleaning", "ours"),
    "too_long": ("corpus", "more than 5,000,000 characters", "ours"),
    "exact_duplicate": ("corpus, dedup", "the same text (white space aside; `corpus`: at line ends)", "ours"),
    "repeated_lines": ("corpus", "over 30 % of lines are copies, or 20 % of characters", "Rae et al. 2021"),
    "repeated_ngrams": ("corpus", "n-grams that repeat cover too much of most pages", "Rae et al. 2021"),
    "near_duplicate": ("dedup", "MinHash of 5-grams, 14 bands of 8, at least 0.75 alike", "Broder 1997"),
    "url_duplicate": ("dedup", "the same address however spelt", "ours"),
    "semantic_duplicate": ("dedup", "cosine of embeddings (off by default)", "Abbas et al. 2023"),
    "copied_spans": ("dedup", "little is left without 50 tokens found elsewhere", "Lee et al. 2022"),
    "bad_words": ("filter", "says a word of a list you give (`--bad-words`)", "Raffel et al. 2020, 2.2"),
    "contaminated": ("decontaminate", "13 words in a row of a benchmark item", "Brown et al. 2020, C"),
    "seen": (
        "unseen",
        "of a benchmark: 13 words in a row of an item stand in the text",
        "Brown et al. 2020, C",
    ),
    "personal_data": ("pii", "holds personal data (only where asked to drop)", "ours"),
}
"""Rules that are code: where they are asked, what they ask, who published it."""


HEAD = """\
<!-- written by `python -m tests.data_index`; change it there -->
# Data: from raw text to shards

    caravan prepare --raw FOLDER --benchmarks FOLDER --page corpus.html

takes a folder through `corpus`, `signals`, `filter`, `dedup`, `decontaminate`, `pii`, `tokenizer` and
`shards`, and writes a page that shows what each rule removed. Every step is a stage that can be run
alone; `caravan report CORPUS --page corpus.html` writes the page of any corpus.

{pages}

## The page
One file without script or anything from outside, light and dark. From left to right the steps, and what
each rule took first, in documents and in bytes; languages, sources, lengths; samples of what stayed and
of what every rule removed; histograms of the signals with the limits that decided; the largest clusters
of copies with their members; benchmarks found, with the places; personal data by type; licences by
source; what could not be read. It is made from the facts and removal lists of the corpora on the way and
one look through the finished one: of more than 200,000 documents an even part. Licences come from a
`MANIFEST.tsv` with the columns `path` and `licence`, or a `LICENSE` file beside the source; none is
guessed.

## What `prepare` reads besides texts
JSON and CSV records of other shapes (questions, chats, preferences) become documents: all their texts,
one below the other, without single words such as roles and labels. Records that name a `doc` and hold
one text per language are segments of one text per language. `--no-records` leaves them to quarantine,
`--skip` leaves files out.

## What each rule did to the data kit
Measured with `caravan prepare` on every part of the test kit that holds text ({documents:,} documents,
{read:.0f} MB: books, web pages, Python's documentation in two languages, questions, chats, preferences,
532 translations of one declaration, benchmarks). {decontaminated}
{kept:,} documents, {left:.0f} MB stay{tokens}.

| step | rule | documents | share of what came | MB | what it asks | source |
|---|---|---|---|---|---|---|"""


def page() -> str:
    """The whole page, from rule files and effects.json."""
    effects = json.loads((FOLDER / "effects.json").read_text())
    return "\n".join([*_road(effects), *_sets(effects)]) + "\n"


def _road(effects: dict[str, Any]) -> list[str]:
    first, last = effects["road"][0], effects["road"][-1]
    there = {p.stem for p in FOLDER.glob("*.md")}
    tokens = effects["tokens"]
    asked = any(step["step"] == "decontaminate" for step in effects["road"])
    without = "This run was made without `--benchmarks`, so nothing was decontaminated."
    head = HEAD.format(
        pages="\n".join(f"- [{name}]({name}.md): {about}" for name, about in PAGES if name in there),
        documents=first["documents_in"], read=first["bytes_in"] / 1e6,
        decontaminated="The benchmarks were among the texts on purpose." if asked else without,
        kept=last["documents_out"], left=last["bytes_out"] / 1e6,
        tokens=f": {tokens / 1e6:.1f} M tokens, {effects['vocab']:,} kinds" if tokens else "",
    )  # fmt: skip
    out = [head]
    known = {r.name: (_short(r), s.source) for s in rules.load(rules.names()) for r in s.rules}
    for step in effects["road"]:
        for rule, (documents, size) in step["removed"].items():
            what, source = known.get(rule) or STEPS.get(rule, ("", "", ""))[1:]
            cells = [step["step"], f"`{rule}`", f"{documents:,}", f"{documents / step['documents_in']:.2%}"]
            out.append(f"| {' | '.join([*cells, f'{size / 1e6:.2f}', what, source])} |")
        if step["edited"]:
            out.append(f"| {step['step']} | (edited in what stays) | | | {step['edited'] / 1e6:.2f} | | |")
    return [*out, "", *_tables(effects)]


def _tables(effects: dict[str, Any]) -> list[str]:
    out = []
    if effects.get("benchmarks"):
        out += ["Benchmark items found in what came to `decontaminate` (checked: eight words or more):", "",
                "| benchmark | items | checked | found | share |", "|---|---|---|---|---|"]  # fmt: skip
        for name, row in _grouped(effects["benchmarks"]).items():
            share = row["hit"] / max(1, row["checked"])
            cells = [name, *(f"{row[k]:,}" for k in ("items", "checked", "hit")), f"{share:.1%}"]
            out.append(f"| {' | '.join(cells)} |")
        out.append("")
    if effects.get("pii"):
        found = ", ".join(f"{kind} {n:,}" for kind, n in effects["pii"].items())
        out += [f"Personal data replaced: {found}.", ""]
    if effects.get("spans"):
        s = effects["spans"]
        out += [
            f"Copied spans cut out: {s['spans']:,} in {s['documents']:,} documents ({s['tokens']:,} tokens).",
            "",
        ]
    return out


def _grouped(rows: dict[str, dict[str, Any]]) -> dict[str, Counter[str]]:
    """Benchmarks of many files (a subject each) by their folder."""
    out: dict[str, Counter[str]] = {}
    for name, row in rows.items():
        group = name.split("/")[0]
        out.setdefault(group, Counter()).update({k: row[k] for k in ("items", "checked", "hit")})
    return out


def _short(rule: rules.Rule) -> str:
    return f"`{rule.signal}` {rule.limit}"


def _sets(effects: dict[str, Any]) -> list[str]:
    out = [
        "## Every rule",
        "",
        "Broken by: share of the kit's documents that break it, of those `signals` saw and it judges.",
        "",
    ]
    for one in rules.load(rules.names()):
        out += [f"### {one.name}", "", f"{one.about} Source: {one.source}.", ""]
        if not one.rules:
            continue
        out += ["| rule | limit | why | broken by |", "|---|---|---|---|"]
        for rule in one.rules:
            judged, broken = effects["rules"].get(rule.name, (0, 0))
            share = f"{broken / judged:.1%} of {judged:,}" if judged else "not measured"
            out.append(f"| `{rule.name}` | {_short(rule)} | {rule.why} | {share} |")
        out.append("")
    out += ["### Rules that are code", "", "| rule | stage | what it asks | source |", "|---|---|---|---|"]
    return [*out, *(f"| `{name}` | {a} | {b} | {c} |" for name, (a, b, c) in STEPS.items())]


def measure(ref: str) -> dict[str, Any]:
    """Effects, from shards or a corpus in the store."""
    from caravan.report import cleaning
    from caravan.store import Store

    store = Store(None)
    found = store.open(ref)
    last = store.open(found.inputs["corpus"]) if found.kind == "shards" else found
    steps = [cleaning.step(art) for art in cleaning.chain(store, last)]
    road, facts = [], {}
    for s in steps:
        facts |= {str(s.art.manifest["stage"]): s.art.facts}
        numbers = {k: s.facts[k] for k in ("documents_in", "documents_out", "bytes_in", "bytes_out")}
        removed = {rule: (g.documents, g.bytes or 0) for rule, g in s.gone.items()}
        road.append({"step": s.art.manifest["stage"], **numbers, "removed": removed, "edited": s.edited})
    signals = next(s.art.inputs["signals"] for s in steps if "signals" in s.art.inputs)
    return {
        "road": road,
        "tokens": sum(int(found.facts.get(f"{split}_tokens", 0)) for split in ("train", "heldout")),
        "vocab": int(found.facts.get("vocab", 0)),
        "benchmarks": facts.get("decontaminate", {}).get("benchmarks", {}),
        "pii": facts.get("pii", {}).get("spans", {}),
        "spans": facts.get("dedup", {}).get("spans", {}),
        "rules": _broken(store.open(signals).path),
    }


def _broken(folder: Path) -> dict[str, tuple[int, int]]:
    import pyarrow.parquet as pq

    judged, broken = Counter[str](), Counter[str]()
    for split in ("train", "heldout"):
        file = pq.ParquetFile(folder / f"{split}.parquet")
        for batch in file.iter_batches():
            table = {n: batch.column(n).to_numpy(zero_copy_only=False) for n in batch.schema.names}
            for one in rules.load(rules.names()):
                for rule in one.rules:
                    if rule.signal not in table:
                        continue
                    mask = np.ones(len(table["id"]), np.bool_)
                    if rule.languages:
                        mask &= np.isin(table["lang"], rule.languages)
                    mask &= ~np.isin(table["lang"], rule.skip_languages)
                    judged[rule.name] += int(mask.sum())
                    broken[rule.name] += int(rule.breaks(table, 0).sum())
    return {name: (judged[name], broken[name]) for name in judged}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        found = measure(sys.argv[2])
        (FOLDER / "effects.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")

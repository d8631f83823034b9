"""The page of a corpus says what the stages did: counts, samples, limits, copies, licences; and it
escapes."""

import json
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from caravan import stage
from caravan.report import cleaning, corpus, passport, plots, thresholds
from caravan.stage import Runtime
from caravan.store import Artefact, Store
from caravan.types import UserError

EVIL = '<script>alert("x")</script><img src=x onerror=1>'
WORDS = ("the", "river", "of", "stones", "and", "bread", "that", "have", "been", "with", "winter", "to", "be")


def prose(seed: int, words: int = 160) -> str:
    rng = random.Random(seed)
    lines = [" ".join(rng.choice(WORDS) + str(rng.randrange(99)) * (rng.random() < 0.4) for _ in range(12))
             for _ in range(words // 12)]  # fmt: skip
    return ".\n".join(lines) + "."


def rows() -> list[dict[str, str]]:
    good = [{"id": f"good{k}", "text": prose(k), "source": f"https://a.example/{k}"} for k in range(40)]
    short = [{"id": f"short{k}", "text": f"{EVIL} short page number {k}"} for k in range(5)]
    copies = [{"id": f"copy{k}", "text": prose(3, 140) + f" one more {k} ending of {k}."} for k in range(4)]
    mail = [{"id": "mail", "text": prose(77) + " Write to anna.meier@example.org about it."}]
    return [*good, *short, *copies, *mail]


def run(store: Store, name: str, inputs: dict[str, Artefact], **settings: object) -> Artefact:
    config = stage.load("stages", name).Config(**settings)
    return stage.execute(store, name, config, inputs, Runtime(threads=1))


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Artefact]]:
    """raw -> corpus -> filter (with signals) -> dedup -> pii."""
    folder = tmp_path_factory.mktemp("page")
    raw = folder / "my <b>texts"
    (raw / "pages").mkdir(parents=True)
    with (raw / "pages" / "a.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows())
        file.write("{broken\n")
    (raw / "tale.txt").write_text(prose(500))
    (raw / "MANIFEST.tsv").write_text(f"path\tlicence\ntale.txt\tCC0 {EVIL}\n")
    store = Store(folder / "store")
    made = [run(store, "corpus", {"raw": store.add(raw)}, near_duplicates=0.0)]
    signals = run(store, "signals", {"corpus": made[0]})
    made.append(run(store, "filter", {"corpus": made[0], "signals": signals}, rules=("gopher",)))
    made.append(run(store, "dedup", {"corpus": made[1]}))
    made.append(run(store, "pii", {"corpus": made[2]}))
    return store, made


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_holds_everything_and_loads_nothing(
    road: tuple[Store, list[Artefact]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, made = road
    path = tmp_path / "corpus.html"
    assert passport.main(passport.Config(model=made[-1].ref, page=str(path)), store, Runtime()) == 0
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "form", "base"}
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    refs = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("href", "src")]
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert refs and {str(v)[1:] for v in refs} <= anchors and all(str(v).startswith("#") for v in refs)
    assert EVIL not in text and "&lt;script&gt;" in text and "my &lt;b&gt;texts" in text
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text
    for words in ("gopher words", "at least 50", "email", "near duplicate", "a.example", "CC0", "Quarantine",
                  "chance to meet", "{broken"):  # fmt: skip
        assert words in text or words.replace(" ", "_") in text, words
    assert str(tmp_path.parent) not in text


def test_bands_account_for_every_document_and_byte(road: tuple[Store, list[Artefact]]) -> None:
    store, made = road
    steps = [cleaning.step(art) for art in cleaning.chain(store, made[-1])]
    assert [s.art.id for s in steps] == [art.id for art in made]
    for s, after in pairwise(steps):
        assert s.facts["documents_out"] == after.facts["documents_in"]
        assert s.facts["bytes_out"] == after.facts["bytes_in"]
    for s in steps:
        gone = sum(g.documents for g in s.gone.values())
        assert s.facts["documents_in"] == s.facts["documents_out"] + gone
        assert {rule: g.documents for rule, g in s.gone.items()} == s.facts["removed"]
        assert s.edited is not None
    assert steps[1].gone["gopher_words"].documents == 5 and steps[1].edited == 0
    assert steps[3].edited == made[3].facts["bytes_in"] - made[3].facts["bytes_out"]
    assert steps[3].edited >= len("anna.meier@example.org") - len("[EMAIL]")
    assert steps[1].gone["gopher_words"].bytes == sum(len(r["text"]) for r in rows() if "short" in r["id"])


def test_copies_are_shown_with_the_text_that_stays(road: tuple[Store, list[Artefact]]) -> None:
    store, made = road
    facts = corpus.facts(store, made[-1])
    (cluster,) = facts["clusters"]
    assert cluster.count == made[2].facts["removed"]["near_duplicate"] == 4 == len(cluster.copies)
    assert cluster.kept is not None and cluster.kept.id == cluster.id
    assert all("5-grams agree" in text.reason for text in cluster.copies)


def test_histograms_count_every_document_and_colour_what_the_limit_forbids(
    road: tuple[Store, list[Artefact]],
) -> None:
    store, made = road
    table = made[1].facts["rules"]
    found = thresholds.histograms(store.open(made[1].inputs["signals"]), table)
    words = found["gopher_words"]
    assert sum(words.counts) == made[0].facts["documents_out"] and len(words.edges) == len(words.counts) + 1
    assert words.limits == (("at least", 50.0), ("at most", 100000.0))
    svg = ET.fromstring(plots.histogram(words))
    bars = [r for r in svg.iter("rect") if "count" in r.attrib["class"]]
    outside = [r for r in bars if "outside" in r.attrib["class"]]
    said = [int(re.findall(r": ([\d,]+) doc", r.find("title").text)[0].replace(",", "")) for r in outside]  # type: ignore[union-attr, arg-type]
    assert sum(said) == table["gopher_words"]["broken"] == 5
    assert len([p for p in svg.iter("path") if p.attrib["class"] == "limit"]) == 2


@pytest.mark.parametrize(
    ("limit", "forbidden"),
    [("at most 0", 2), ("at least 0.3", 2), ("at most 0.3", 1), ("less than 0.3", 2), ("more than 0.3", 3)],
)
def test_a_value_at_a_limit_is_on_its_side(limit: str, forbidden: int, tmp_path: Path) -> None:
    values = np.array([0, 0.1, 0.3, 0.9], np.float32)
    if limit == "at most 0":
        values = np.array([0, 0, 0.3, 0.9], np.float32)
    pq.write_table(pa.table({"x": values, "lang": ["en"] * 4}), tmp_path / "train.parquet")
    facts = {"quantiles": {"x": {"p1": 0.0, "p99": 0.9}}}
    art = Artefact(tmp_path, {"kind": "signals", "facts": facts})
    found = thresholds.histograms(art, {"mine": {"signal": "x", "limit": limit}})["mine"]
    bars = [r for r in ET.fromstring(plots.histogram(found)).iter("rect") if "outside" in r.attrib["class"]]
    said = [int(r.find("title").text.split(": ")[1].split()[0]) for r in bars]  # type: ignore[union-attr]
    assert sum(said) == forbidden and sum(found.counts) == 4


def test_only_documents_a_rule_judges_are_in_its_histogram(road: tuple[Store, list[Artefact]]) -> None:
    store, made = road
    rule = {"signal": "words", "limit": "at least 3", "skip_languages": ["en"], "languages": ["zh"]}
    found = thresholds.histograms(store.open(made[1].inputs["signals"]), {"mine": rule})
    assert sum(found["mine"].counts) == 0


def test_licences_follow_the_manifest_or_are_not_stated(road: tuple[Store, list[Artefact]]) -> None:
    store, made = road
    found = cleaning.census(made[-1], {}, 1000)
    raw = [art for _, art in store.lineage(made[-1]) if art.kind == "raw"]
    rows_ = {row["licence"]: row for row in cleaning.licences(raw, found)}
    assert rows_[f"CC0 {EVIL}"]["documents"] == 1 and rows_["not stated"]["sources"][0] == "a.example"
    assert sum(row["documents"] for row in rows_.values()) == made[-1].facts["documents_out"]


def test_a_part_of_a_large_corpus_is_scaled_up(road: tuple[Store, list[Artefact]]) -> None:
    _, made = road
    found = cleaning.census(made[-1], {}, 10)
    total = made[-1].facts["documents_out"]
    assert found.every > 1 and abs(found.looked_at * found.every - total) <= 2 * found.every


def test_a_sankey_is_to_scale() -> None:
    stops = [
        plots.Stop(name="a", came=100, gone=(("x", 30.0), ("y", 20.0)), left=50),
        plots.Stop(name="b", came=50, gone=(), left=50),
    ]
    svg = ET.fromstring(plots.sankey(stops, "documents", str))
    nodes = [float(r.attrib["height"]) for r in svg.iter("rect") if r.attrib["class"] == "node"]
    ends = [float(r.attrib["height"]) for r in svg.iter("rect") if r.attrib["class"] == "end"]
    assert nodes == [plots.BAND, plots.BAND / 2, plots.BAND / 2]
    assert ends == [plots.BAND * 0.3, plots.BAND * 0.2]
    assert ET.fromstring(plots.sankey([], "documents", str)) is not None


def test_rules_of_one_family_can_be_told_apart() -> None:
    names = [f"gopher_repeated_{n}grams" for n in (5, 6, 10)]
    stops = [plots.Stop(name=f"s{k}", came=9, gone=tuple((n, 1.0) for n in names), left=6) for k in range(6)]
    svg = ET.fromstring(plots.sankey(stops, "documents", str))
    shown = [t.text for t in svg.iter("text") if t.attrib["class"] == "rule start"][:3]
    assert shown == ["…repeated 5grams", "…repeated 6grams", "…10grams"]
    titles = {t.text for t in svg.iter("title")}
    assert "gopher_repeated_10grams: 1.0, 11.1% of what came" in titles


def test_ticks_at_the_edges_stay_in_the_picture() -> None:
    edges = tuple(10 ** (k / 2) for k in range(4, 11))
    picture = plots.histogram(plots.Histogram(name="n", note="", edges=edges, counts=(1,) * 6, log=True))
    sides = {t.text: t.attrib["class"] for t in ET.fromstring(picture).iter("text")}
    assert sides["100"] == "tick start" and sides["100,000"] == "tick end" and sides["1,000"] == "tick middle"


def test_benchmarks_are_no_source_of_a_corpus(road: tuple[Store, list[Artefact]], tmp_path: Path) -> None:
    store, made = road
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": prose(900, 24)}) + "\n")
    given = {"corpus": made[-1], "benchmarks": store.add(tmp_path / "questions.jsonl")}
    checked = run(store, "decontaminate", given)
    facts = corpus.facts(store, checked)
    assert facts["title"] == corpus.facts(store, made[-1])["title"] == "my <b>texts"


def test_removal_lists_without_sizes_still_make_a_page(
    road: tuple[Store, list[Artefact]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = road
    whole = cleaning._rows
    monkeypatch.setattr(
        cleaning, "_rows", lambda path: ({k: v for k, v in r.items() if k != "bytes"} for r in whole(path))
    )
    facts = corpus.facts(store, made[1])
    assert [name for name, *_ in facts["flows"]] == ["Documents"] and "do not tell" in facts["flows"][0][2]


def test_what_has_no_corpus_has_no_page(road: tuple[Store, list[Artefact]], tmp_path: Path) -> None:
    store, made = road
    raw = next(art for _, art in store.lineage(made[0]) if art.kind == "raw")
    with pytest.raises(UserError, match="not made from a corpus"):
        corpus.build(store, raw, tmp_path / "x.html")


def test_the_index_of_data_pages_is_made_from_rules_and_effects() -> None:
    from tests import data_index

    def fixed(text: str) -> list[str]:  # which pages there are is the folder's affair
        return [line for line in text.splitlines() if not line.startswith("- [")]

    text = (data_index.FOLDER / "README.md").read_text(encoding="utf-8")
    assert fixed(text) == fixed(data_index.page()), "python -m tests.data_index"
    for name in re.findall(r"\]\((\w+\.md)\)", text):
        assert (data_index.FOLDER / name).is_file(), name


def test_benchmarks_say_where_they_were_found(road: tuple[Store, list[Artefact]], tmp_path: Path) -> None:
    store, made = road
    (tmp_path / "seen_one.jsonl").write_text(
        "".join(json.dumps({"id": f"q{k}", "question": prose(k)[:120]}) + "\n" for k in (3, 8))
    )
    (tmp_path / "not_seen.jsonl").write_text(json.dumps({"question": "nobody " * 20}) + "\n")
    (tmp_path / "nor_this.jsonl").write_text(json.dumps({"question": "nothing " * 20}) + "\n")
    inputs = {"corpus": made[0], "benchmarks": store.add(tmp_path)}
    art = run(store, "decontaminate", inputs, common_documents=0)
    (table,) = [t for t in corpus.facts(store, art)["tables"] if t["title"].startswith("Benchmarks")]
    assert table["columns"] == ["items", "long enough", "found", "share", "in documents", "found in"]
    assert table["kinds"][-1] == "break" and table["kinds"][0] == "num"
    first, last = table["rows"]
    assert first[:5] == ["seen_one.jsonl", "2", "2", "2", "100.00%"] and "a.example" in first[6]
    assert last == ["2 other benchmarks", "2", "2", "0", "none", "–", "–"]
    (shown,) = table["shown"]
    assert shown.name == "seen_one.jsonl" and sum(n for _, n in shown.where) == int(first[5]) == 6
    assert len({text.reason for text in shown.shown}) == len(shown.shown) >= 2
    page = corpus.build(store, art, tmp_path / "page.html").read_text()
    assert "seen_one.jsonl" in page and "found in" in page

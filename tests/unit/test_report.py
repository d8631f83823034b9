"""The passport: complete, self-contained, and nothing in it can act."""

from __future__ import annotations

import json
import math
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from caravan.report import chats as chat_page
from caravan.report import draw, passport, read
from caravan.stage import Runtime
from caravan.store import Artefact, Store, digest
from caravan.types import UserError

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def publish(
    store: Store, stage: str, kind: str, inputs: dict[str, Artefact], files: dict[str, str], **more: Any
) -> Artefact:
    """An artefact as `execute` would leave it."""
    named = {role: f"{art.kind}/{art.id}" for role, art in inputs.items()}
    asked = {"stage": stage, "inputs": named, "config": more.get("config", {})}
    with store.work(stage, digest(asked)) as work:
        for name, text in files.items():
            (work / "out" / name).write_text(text, encoding="utf-8")
        record = {"stage": stage, "version": 1, "inputs": named, "seconds": 12.5, "attempts": 1, "facts": {}}
        record |= {"peak_memory_bytes": 700 << 20, "machine": {"processor": "A", "cores": 2}}
        return store.publish(work, kind=kind, asked=asked, record={**record, **more})


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def evaluation(store: Store, model: Artefact, questions: Artefact, level: float, answer: str) -> Artefact:
    scores = {
        "bits_per_byte": {"value": 1.4 - level / 3, "low": 1.3 - level / 3, "high": 1.5 - level / 3, "n": 80},
        "exact_match": {"value": level, "low": level - 0.05, "high": level + 0.05, "n": 120},
    }
    prompt = [{"role": "user", "content": "What does textwrap.dedent do?"}]
    row = {
        "task": "exact_match",
        "id": "q1",
        "prompt": prompt,
        "answer": answer,
        "scores": {"exact_match": level},
    }
    evil = {"task": "kl", "id": "q2", "prompt": "你是谁？", "answer": EVIL, "reference": None, "scores": {}}
    reference = "Removes common leading whitespace."
    files = {
        "scores.json": json.dumps(scores),
        "samples.jsonl": lines([{**row, "reference": reference}, evil]),
    }
    return publish(
        store, "evaluate", "evaluation", {"model": model, "questions": questions, "reference": model}, files
    )


def make_road(store: Store, folder: Path) -> list[Artefact]:
    """A small road: corpus to PPO, with two evaluations."""
    texts, chats = folder / "python docs", folder / "chats.jsonl"
    texts.mkdir()
    (texts / "a.txt").write_text("hello")
    (texts / "LICENSE").write_text("PSF")
    chats.write_text("{}\n")
    raw, talk = store.add(texts), store.add(chats)
    removed = {"removed": {"short": 31, "near_duplicate": 7}, "removed_samples": {"short": [EVIL]}}
    facts = {
        "documents_in": 1000,
        "quarantined": 2,
        "quarantined_first": ["a.txt:3: expected text"],
        **removed,
    }
    corpus = publish(store, "corpus", "corpus", {"raw": raw}, {"train.jsonl": "x"}, facts=facts)
    tok = publish(store, "tokenizer", "tokenizer", {"corpus": corpus}, {"tokenizer.json": "{}"})
    shards = publish(store, "shards", "shards", {"corpus": corpus, "tokenizer": tok}, {"train.bin": "x"})
    loss: list[dict[str, Any]] = [
        {"step": n, "loss": 8.3 / math.sqrt(n + 1) + 1, "lr": 1e-3 * (1 - n / 400), "same": 1, "nan": "nan"}
        for n in range(400)
    ]
    for n in range(0, 400, 50):
        loss[n]["eval"] = {"loss": loss[n]["loss"] + 0.1, "bits_per_byte": 2.0 - n / 400}
    files = {"model.safetensors": "x", "metrics.jsonl": lines(loss)}
    facts = {"parameters": 5_900_000, "tokens": 2_000_000}
    config = {"size": "tiny", "optim": {"lr": 1e-3}, "api_key": "s3cret", "note": EVIL}
    base = publish(store, "pretrain", "model", {"shards": shards}, files, config=config, facts=facts)
    conversations = publish(store, "conversations", "conversations", {"raw": talk}, {"train.jsonl": "y"})
    inputs = {"base": base, "data": conversations}
    sft = publish(store, "sft", "model", inputs, {"m": "s", "metrics.jsonl": lines(loss[:99])})
    reward = publish(store, "reward", "reward", {"base": sft, "data": conversations}, {"m": "r"})
    inputs = {"policy": sft, "reward": reward, "prompts": conversations}
    ppo = publish(
        store, "rl", "model", inputs, {"m": "p", "metrics.jsonl": lines(loss)}, config={"algo": "ppo"}
    )
    before = evaluation(store, sft, talk, 0.6, "It dedents.")
    after = evaluation(store, ppo, talk, 0.8, "Removes common leading whitespace.")
    return [corpus, tok, shards, base, conversations, sft, reward, ppo, before, after]


class Page(HTMLParser):
    """Counts what a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Store, list[Artefact]]:
    store = Store(tmp_path / "store")
    return store, make_road(store, tmp_path)


def test_the_page_holds_everything_and_loads_nothing(
    made: tuple[Store, list[Artefact]], tmp_path: Path
) -> None:
    store, road = made
    path = passport.build(store, road[::-1], None, tmp_path / "out" / "report.html")
    text = path.read_text()
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "form", "base"}
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    refs = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("href", "src")]
    assert refs and all(value and value.startswith("#") for value in refs)
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {value[1:] for value in refs if value} <= anchors, "every link must lead somewhere"
    assert "http-equiv" in text and "default-src 'none'" in text
    assert EVIL not in text and "&lt;script&gt;" in text
    for art in road:
        assert art.id in text
    for words in (
        "5.9 M",
        "near duplicate",
        "a.txt:3: expected text",
        "python docs",
        "see LICENSE",
        "optim.lr",
    ):
        assert words in text, words
    assert "s3cret" not in text and str(tmp_path) not in text
    assert len(re.findall(r'class="chart"', text)) >= 6


def test_lineage_is_valid_svg_with_parents_above_children(made: tuple[Store, list[Artefact]]) -> None:
    store, road = made
    everything = passport._complete(store, road)
    assert len(everything) == len(road) + 2, "the raw files are found through the store"
    boxes = passport._boxes(everything, read.labels(everything))
    svg = ET.fromstring(draw.lineage(boxes))
    rects = {a.attrib["href"]: a for a in svg.iter("a")}
    assert len(rects) == len(boxes)
    top = {box.key: float(rects[f"#{draw.anchor(box.key)}"].find("rect").attrib["y"]) for box in boxes}  # type: ignore[union-attr]
    for box in boxes:
        assert all(top[parent] < top[box.key] for parent in box.parents if parent not in box.aside)
    edges = [path for path in svg.iter("path") if path.attrib["class"].startswith("edge")]
    assert len(edges) == sum(len([p for p in box.parents if p not in box.aside]) for box in boxes)
    faint = [path for path in edges if "faint" in path.attrib["class"]]
    assert faint, "corpus -> shards repeats corpus -> tokenizer -> shards"


def test_names_tell_models_and_evaluations_apart(made: tuple[Store, list[Artefact]]) -> None:
    _, road = made
    names = read.labels(road)
    assert names[read.key_of(road[7])] == "ppo" and names[read.key_of(road[9])] == "evaluate ppo"
    assert len(set(names.values())) == len(names)


def test_curves_put_held_out_beside_training_and_leave_out_what_does_not_move(
    made: tuple[Store, list[Artefact]],
) -> None:
    found = read.curves(made[1][3])
    assert list(found)[:2] == ["loss", "bits_per_byte"] and set(found["loss"]) == {"training", "held-out"}
    assert "same" not in found and "nan" not in found and len(found["loss"]["training"]) == 400
    ET.fromstring(draw.chart("loss", found["loss"]))


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0, 1e-9], [-5.0, 3e6], [1e-30, 2e-30], [0.0]])
def test_charts_stand_any_range(values: list[float]) -> None:
    svg = ET.fromstring(draw.chart("x", {"training": list(enumerate(values))}))
    numbers = re.findall(r"-?\d+\.?\d*", " ".join(p.attrib["d"] for p in svg.iter("path")))
    assert numbers and all(-1 <= float(n) <= draw.CHART_WIDTH for n in numbers)


def test_a_table_is_shown_as_given(made: tuple[Store, list[Artefact]], tmp_path: Path) -> None:
    store, road = made
    cell = {"value": 0.81, "low": 0.75, "high": 0.86, "better": True}
    cell["difference"] = {"value": 0.2, "low": 0.1, "high": 0.3}
    table = [
        {"model": "sft", "right": {"value": 0.615, "format": "{:.1%}"}},
        {"model": EVIL, "right": cell, "kl": None},
    ]
    text = passport.build(store, road, table, tmp_path / "r.html").read_text()
    assert (
        "0.75 to 0.86" in text
        and "+0.2 (+0.1 to +0.3)" in text
        and "61.5%" in text
        and "better" in text
        and EVIL not in text
    )


def test_runs_of_line_breaks_take_one_line() -> None:
    assert read.clip("a" + "\n" * 64 + "b") == "a\n[64 line breaks]\nb" and read.clip("a\n\nb") == "a\n\nb"


def test_samples_follow_the_road(made: tuple[Store, list[Artefact]]) -> None:
    _, road = made
    found = read.samples(road[-2:], read.labels(road))
    first = next(sample for sample in found if sample.task == "exact_match")
    assert [model for model, _, _ in first.answers] == ["sft", "ppo"]
    assert first.answers[1][1] == "Removes common leading whitespace."


def test_main_walks_the_lineage_and_finds_the_evaluations(
    made: tuple[Store, list[Artefact]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, road = made
    page = tmp_path / "page.html"
    assert passport.main(passport.Config(model=road[7].ref, page=str(page)), store, Runtime()) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert all(art.id in text for art in road)
    with pytest.raises(UserError):
        passport.main(passport.Config(model="model/abcd", page=str(page)), store, Runtime())
    with pytest.raises(UserError):
        passport.build(store, road, None, Path("/proc/nowhere/report.html"))


def test_an_empty_road_is_a_page_too(tmp_path: Path) -> None:
    assert "No raw files" in passport.build(Store(tmp_path), [], None, tmp_path / "r.html").read_text()


def test_numbers_read_well() -> None:
    assert [draw.number(x) for x in (1234, 0.5, 5.9e6, 2e-5, 0, 123.456)] == [
        "1,234", "0.5", "5.9 M", "2.0e-05", "0", "123",
    ]  # fmt: skip
    assert [passport.duration(x) for x in (0.2, 42, 185, 7800)] == [
        "0.2 s",
        "42 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert [passport.size(x) for x in (0, 900, 3 << 20, 5 << 30)] == ["–", "900 B", "3.0 MiB", "5.0 GiB"]


def test_chats_tell_lengths_languages_and_what_was_removed(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    facts: dict[str, Any] = {
        "conversations": 1200, "multi_turn": 0, "removed": 3, "near_duplicates": 2, "quarantined": 1,
        "quarantined_first": ["a.jsonl, line 3"], "quarantined_why": {EVIL: 1},
        "question_chars": {"p50": 11, "p90": 22, "p99": 33, "max": 4444}, "answer_chars": 99,
        "answer_chars_spread": {"p50": 55}, "languages": {"zh": 900, "en": 300},
        "formats": {"openai: records hold a list 'messages'": 1},
    }  # fmt: skip
    gone = [{"id": f"r{n}", "rule": rule, "reason": "resembles k1, which stays (0.9)", "text": EVIL}
            for n, rule in enumerate(("near duplicate", "benchmark", "near duplicate"))]  # fmt: skip
    chats = publish(store, "conversations", "conversations", {}, {"removed.jsonl": lines(gone)}, facts=facts)
    text = passport.build(store, [chats], None, tmp_path / "page.html", chats).read_text()
    assert "<script>" not in text and "onerror=alert(2)>" not in text
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    assert "1,200 conversations" in words and "of several turns" not in words and "3 removed" in words
    assert "questions 11 22 33 4,444" in words and "answers 55 0 0 0" in words
    assert "zh 900 75.0%" in words and "en 300 25.0%" in words
    assert "near duplicate 2 r0 resembles k1, which stays (0.9)" in words and "benchmark 1 r1" in words
    flow = re.search(r"<svg[^>]*What each rule removed.*?</svg>", text, re.DOTALL)
    assert flow and re.findall(r"([\d,]+) stay<", flow.group()) == ["1,200"]
    assert re.findall(r"(near duplicate|benchmark|expected: .*?): (\d+), ", flow.group()) == [
        ("near duplicate", "2"), (f"expected: {escape(EVIL, quote=False)}", "1"), ("benchmark", "1"),
    ]  # fmt: skip
    assert (
        chat_page.section(publish(store, "c", "conversations", {}, {"x": "y"}, facts={}), "c")["flow"] == ""
    )

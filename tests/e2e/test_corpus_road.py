"""From a folder of raw text of many kinds to shards in one command, with its page."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caravan.data import records
from caravan.data.shards import Shards
from caravan.recipes import corpus as recipe
from caravan.recipes.flow import Caravan
from caravan.report import corpus as page
from caravan.stage import Runtime
from caravan.store import Artefact, Store
from caravan.types import UserError

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
BENCH = [f"Which of the {k} towers on the northern hill was built by the baker's second son, and when did it "
         f"fall? Count {k + 3} bricks." for k in range(12)]  # fmt: skip
STEPS = ["corpus", "filter", "dedup", "decontaminate", "pii"]


STOPS = ("the", "of", "and", "to", "that", "with", "have", "be")
PARTS = ("ba", "ker", "lan", "tor", "min", "sel", "dro", "vin", "ca", "pel", "ost", "ur")
HAN = "天地人山水火风云春夏秋冬江河湖海花草树木鸟鱼马牛羊村城路桥门窗书画琴棋米面茶酒衣食住行"


def prose(seed: int, lines: int = 9) -> str:
    """Lines of made-up words between real ones."""
    rng = random.Random(seed)
    words = lambda: ["".join(rng.choices(PARTS, k=2)) if n % 2 else rng.choice(STOPS) for n in range(14)]  # noqa: E731
    return "\n".join(" ".join(words()).capitalize() + "." for _ in range(lines))


def chinese(seed: int) -> str:
    rng = random.Random(seed)
    return "。".join("，".join("".join(rng.choices(HAN, k=9)) for _ in range(3)) for _ in range(3)) + "。"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Texts, records of other shapes, segments in two languages, a benchmark, copies, an address, rubbish."""
    folder = tmp_path / "my texts"
    (folder / "tales").mkdir(parents=True)
    for k in range(60):
        (folder / "tales" / f"{k}.txt").write_text(prose(k))
    (folder / "tales" / "again.txt").write_text(prose(5) + "\nAnd a last line.")
    (folder / "tales" / "mail.txt").write_text(prose(70) + "\nWrite to anna.meier@example.org today.")
    (folder / "tales" / "leak.txt").write_text(prose(80) + "\n" + BENCH[4])
    chats = [{"conversations": [{"from": "human", "value": f"What is page {k}?"},
                                {"from": "gpt", "value": prose(100 + k)}]} for k in range(5)]  # fmt: skip
    (folder / "chats.json").write_text(json.dumps(chats))
    parts = [
        {"doc": f"d{k // 4}", "i": k, "en": prose(200 + k), "zh": f"第{k}章。{chinese(k)}"} for k in range(8)
    ]
    (folder / "aligned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in parts))
    (folder / "table.csv").write_text('"What are ten rivers?",A,B\n"Who bakes, and when?",C,D\n')
    (folder / "left").mkdir()
    (folder / "left" / "out.txt").write_text("not to be read " * 40)
    (folder / "empty.jsonl").write_text("")
    (tmp_path / "bench.jsonl").write_text(
        "".join(json.dumps({"question": q, "answer": "1999"}) + "\n" for q in BENCH)
    )
    return folder


def test_one_command_goes_from_raw_text_to_shards(raw: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "caravan", "prepare", "--raw", str(raw), "--skip", "left"]
    command += ["--vocab", "400", "--benchmarks", str(tmp_path / "bench.jsonl"), "--threads", "1"]
    command += ["--page", str(tmp_path / "c.html")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CARAVAN_STORE": str(tmp_path / "store")}
    done = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    store = Store(tmp_path / "store")
    shards = store.open(done.stdout.strip())
    corpora = _way(store, shards)
    assert [art.manifest["stage"] for art in corpora] == STEPS
    kept = _texts(corpora[-1])
    whole = "\n".join(kept.values())
    assert BENCH[4] not in whole and "anna.meier" not in whole and "[EMAIL]" in whole
    assert "not to be read" not in whole and chinese(3) in whole
    gone = {rule for art in corpora for rule in art.facts["removed"]}
    assert "near_duplicate" in gone and "gopher_words" in gone
    assert len(Shards.open(shards.path, "train").tokens) == shards.facts["train_tokens"] > 1000
    text = (tmp_path / "c.html").read_text()
    for words in (
        "Benchmarks found in the text",
        "Personal data by type",
        "near duplicate",
        "tokens to train on",
    ):
        assert words in text, words
    for art in corpora:
        assert art.facts["documents_in"] == art.facts["documents_out"] + sum(art.facts["removed"].values())


def _way(store: Store, shards: Artefact) -> list[Artefact]:
    way = [store.open(shards.inputs["corpus"])]
    while "corpus" in way[0].inputs:
        way.insert(0, store.open(way[0].inputs["corpus"]))
    return way


def _texts(art: Artefact) -> dict[str, str]:
    return {d.id: d.text for s in records.SPLITS for d in records.read_documents(art / f"{s}.jsonl.zst")}


def test_records_of_other_shapes_become_documents(raw: Path, tmp_path: Path) -> None:
    whole = recipe.gathered(recipe.Config(raw=raw, skip=("left",)), tmp_path / "work")
    rows = [json.loads(line) for line in (whole / "aligned.jsonl.jsonl").open()]
    assert [(r["lang"], r["id"]) for r in rows] == [
        (lang, f"aligned.jsonl/{k}") for k, lang in enumerate(("en", "zh", "en", "zh"))
    ]
    assert rows[1]["text"].count("章") == 4 and rows[0]["source"] == "aligned.jsonl"
    chats = [json.loads(line) for line in (whole / "chats.json.jsonl").open()]
    assert chats[2]["text"].startswith("What is page 2?\n" + prose(102)[:40])
    table = [json.loads(line)["text"] for line in (whole / "table.csv.jsonl").open()]
    assert table == ["What are ten rivers?", "Who bakes, and when?"]
    assert (whole / "tales" / "7.txt").read_text() == prose(7) and not (whole / "left").exists()
    assert (whole / "empty.jsonl").exists(), "what cannot be read goes to quarantine, not away"


def test_what_cannot_be_prepared_is_said(raw: Path, tmp_path: Path) -> None:
    store, rt = Store(tmp_path / "store"), Runtime()
    with pytest.raises(UserError, match="no file or folder"):
        recipe.main(recipe.Config(raw=tmp_path / "nothing"), store, rt)
    with pytest.raises(UserError, match="`burn` is no way"):
        recipe.main(recipe.Config(raw=raw, pii="burn"), store, rt)
    with pytest.raises(UserError, match="there is no missing"):
        recipe.gathered(recipe.Config(raw=raw, skip=("missing",)), tmp_path / "work")


@pytest.mark.slow
def test_the_whole_kit_goes_from_raw_to_shards(kit: Path, tmp_path: Path) -> None:
    """Every part that holds text is read, cleaned by every step, and on the page."""
    store = Store(tmp_path / "store")
    config = recipe.Config(
        raw=kit,
        skip=("tokenizers", "model", "README.md"),
        benchmarks=kit / "bench",
        page=tmp_path / "kit.html",
    )
    road = recipe.walk(Caravan(store, Runtime()), config)
    text = recipe.write_page(store, road, config.page).read_text()
    first, last = road.corpora[0].facts, road.corpora[-1].facts
    assert first["documents_in"] > 70_000
    # A table of files is no text, and neither are 500 sums: "91-33=" has no two words.
    refused = {row["file"] for row in records.read_lines(road.corpora[0] / "quarantine.jsonl")}
    assert refused == {"MANIFEST.tsv", "sft/zh_qa/整数加减法.json"} and first["quarantined"] == 2
    assert 0.5 * first["bytes_in"] < last["bytes_out"] < first["bytes_in"]
    read = {s.split("/")[0] for s in page.cleaning.census(road.corpora[0], {}, 10**9).sources}
    parts = {p.name for p in kit.iterdir() if p.is_dir()} - {"tokenizers", "model"}
    assert parts <= read, parts - read
    assert road.shards.facts["train_tokens"] > 5_000_000 and "lambada" in text
    _found_in_the_kit(road.corpora[3])


def _found_in_the_kit(art: Artefact) -> None:
    """The benchmarks lie among the texts; besides, five questions on Chinese history quote the books they
    are about, and two programming tasks stand in Python's documentation."""
    found = json.loads((art / "contamination.json").read_text())
    items, checked = (sum(row[key] for row in found.values()) for key in ("items", "checked"))
    assert (items, checked, len(found)) == (36_666, 36_595, 131)
    outside = {name: {s for s in row["sources"] if not s.startswith("bench/")} for name, row in found.items()}
    assert {name: sources for name, sources in outside.items() if sources} == {
        "agieval/gaokao-history.jsonl": {
            f"pretrain/zh_books/{book}.txt" for book in ("史记", "汉书", "资治通鉴")
        },
        "code/mbpp_sanitized.jsonl": {f"pretrain/docs_en_zh/{part}.jsonl" for part in ("library", "howto")},
    }


@pytest.mark.browser
def test_the_page_stands_in_a_browser_in_light_and_dark(raw: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    store = Store(tmp_path / "store")
    config = recipe.Config(raw=raw, skip=("left",), vocab=400, page=tmp_path / "c.html")
    recipe.write_page(store, recipe.walk(Caravan(store, Runtime(threads=1)), config), config.page)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            tab = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            said: list[str] = []
            tab.on("console", lambda message: said.append(message.text))  # noqa: B023
            asked: list[str] = []
            tab.on("request", lambda request: asked.append(request.url))  # noqa: B023
            tab.goto(config.page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
            assert tab.locator("svg.sankey").count() == 2 and tab.locator("svg.sankey >> nth=0").is_visible()
            ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (ground == "rgb(26, 25, 23)") == (scheme == "dark")
            assert not said and len(asked) == 1, "no script, no request but the page itself"
        browser.close()

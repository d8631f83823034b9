"""The chat page in a real browser, against a scripted engine: what a person does, and what a hostile model
tries.

Run with `pytest -m browser`. CHAT_SCREENSHOT=FILE keeps a picture.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from serving import ScriptedEngine, Server, until

from caravan.serve.api import create_app
from caravan.serve.feedback import FeedbackStore
from caravan.serve.turn import ServedModel
from caravan.serve.worker import Worker
from caravan.types import Message, Sampling

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
HOSTILE = "<img src=x onerror=alert(1)> **<script>alert(2)</script>** [go](javascript:alert(3))"
ANSWERS = {
    "What does textwrap.dedent do?": "`textwrap.dedent` removes **common** whitespace.\n\n- one\n- two",
    "12+29=?": "12+29=41",
    "你是谁？": "我是一个小助手。",
    "be hostile": HOSTILE,
    "never end": "on and " * 400,
}


class Speaker(ScriptedEngine):
    """Says what ANSWERS says to the last question, three characters per step; warmer answers say so."""

    def __init__(self) -> None:
        super().__init__(self.answer, step_seconds=0.005)
        self.heard: list[list[Message]] = []

    def render(self, messages: list[Message]) -> list[int]:
        self.heard.append(messages)
        return [len(self.heard) - 1] * (1 + sum(len(m.content) for m in messages))

    def answer(self, prompt_ids: list[int], sampling: Sampling) -> list[str]:
        question = self.heard[prompt_ids[0]][-1].content
        text = ANSWERS.get(question, f"You said: {question}")
        text += " (again)" if sampling.temperature >= 0.8 else ""
        return [text[k : k + 3] for k in range(0, len(text), 3)]


@dataclass
class Site:
    url: str
    engine: Speaker
    feedback: FeedbackStore


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine (set CHROMIUM)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def site(serve: Callable[[Any], Server]) -> Site:
    engine, feedback = Speaker(), FeedbackStore("sqlite://")
    model = ServedModel(
        name="ppo",
        worker=Worker(engine),
        render=engine.render,
        context_length=4000,
        weights="0123456789ab",
        defaults=Sampling(temperature=0.3, max_tokens=2000),
    )
    return Site(serve(create_app({"ppo": model}, feedback)).url, engine, feedback)


def visit(browser: Any, site: Site, **options: Any) -> Any:
    """A fresh page; anything the browser complains of fails the test at its end."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(15_000)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
    page.on("dialog", lambda dialog: page.complaints.append(f"dialog {dialog.message}"))
    page.goto(site.url)
    page.locator(".example").first.wait_for()
    return page


def ask(page: Any, text: str) -> Any:
    """Type, press Enter, wait for the answer's buttons; gives the answer."""
    answers = page.locator(".said.assistant")
    number = answers.count()
    page.fill("#question", text)
    page.keyboard.press("Enter")
    answers.nth(number).locator(".tools").wait_for()
    return answers.nth(number)


def test_the_three_questions_and_several_turns(browser: Any, site: Site) -> None:
    page = visit(browser, site, viewport={"width": 1000, "height": 760})
    page.get_by_text("What does textwrap.dedent do?").click()
    first = page.locator(".said.assistant").first
    first.locator(".tools").wait_for()
    assert first.locator("code").inner_text() == "textwrap.dedent"
    assert first.locator("li").count() == 2 and first.locator("strong").inner_text() == "common"
    assert "12+29=41" in ask(page, "12+29=?").inner_text()
    assert "我是一个小助手。" in ask(page, "你是谁？").inner_text()
    heard = site.engine.heard[-1]
    assert [m.role for m in heard] == ["user", "assistant"] * 2 + ["user"]
    assert heard[1].content == ANSWERS["What does textwrap.dedent do?"]
    assert page.locator("#announce").inner_text() == "我是一个小助手。", "screen readers hear the answer"
    picture = os.environ.get("CHAT_SCREENSHOT")
    if picture:
        page.screenshot(path=picture)
    page.click("#new")
    assert page.locator(".said").count() == 0 and page.locator("#welcome").is_visible()
    assert page.complaints == []


def test_what_a_model_writes_never_becomes_markup(browser: Any, site: Site) -> None:
    page = visit(browser, site)
    answer = ask(page, "be hostile")
    assert answer.locator(".text").inner_text() == HOSTILE.replace("**", "")
    assert page.locator("main img, main script, main a").count() == 0
    ask(page, "<b>mine</b>")
    assert page.locator(".said.user").last.inner_text() == "<b>mine</b>"
    assert page.complaints == []


def test_escape_stops_the_answer_and_the_engine(browser: Any, site: Site) -> None:
    page = visit(browser, site)
    page.fill("#question", "never end")
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for()
    page.get_by_text("on and on").wait_for()
    page.keyboard.press("Escape")
    page.locator(".tools").wait_for()
    assert "stopped" in page.locator(".tools").inner_text()
    until(lambda: len(site.engine.aborted) == 1)
    assert page.locator("#send").is_visible()
    assert page.locator(".tools .up").count() == 0, "half an answer is not to be judged"


def test_regenerate_and_pick_writes_a_preference(browser: Any, site: Site) -> None:
    page = visit(browser, site)
    ask(page, "12+29=?").locator(".again").click()
    page.locator(".two .row").wait_for()
    assert page.locator(".two article").nth(1).locator(".text").inner_text() == "12+29=41 (again)"
    page.locator(".two article").nth(1).get_by_role("button").click()
    page.locator(".why").wait_for()
    assert page.locator(".two").count() == 0
    (ranking,) = site.feedback.collect().rankings
    assert ranking.responses == ("12+29=41 (again)", "12+29=41") and ranking.prompt[-1].content == "12+29=?"
    ask(page, "next")
    assert site.engine.heard[-1][1].content == "12+29=41 (again)", "the chat goes on with the chosen answer"
    assert page.complaints == []


def test_thumbs_are_kept_and_taken_back(browser: Any, site: Site) -> None:
    page = visit(browser, site)
    up = ask(page, "12+29=?").locator(".up")
    up.click()
    page.locator('.up[aria-pressed="true"]').wait_for()
    until(lambda: site.feedback.collect().counts["votes"] == 1)
    up.click()
    page.locator('.up[aria-pressed="false"]').wait_for()
    assert site.feedback.collect().counts["votes"] == 0


def test_settings_are_sent_and_remembered(browser: Any, site: Site) -> None:
    page = visit(browser, site)
    page.click("#open-settings")
    page.fill("#system", "be brief")
    page.locator("#settings button").click()
    ask(page, "hello")
    assert site.engine.heard[-1][0] == Message("system", "be brief")
    page.reload()
    page.locator(".example").first.wait_for()
    ask(page, "hello")
    assert site.engine.heard[-1][0].role == "system"


def test_a_conversation_too_long_loses_its_oldest_turns(browser: Any, site: Site) -> None:
    page = visit(browser, site)
    ask(page, "a" * 1500)
    ask(page, "b" * 1200)
    assert page.locator(".aside").count() == 1 and site.engine.heard[-1][0].content == "b" * 1200
    page.fill("#question", "c" * 5000)
    page.keyboard.press("Enter")
    page.locator(".problem").wait_for()
    assert "context of 4000" in page.locator(".problem").inner_text()
    assert page.locator("#question").input_value() == "c" * 5000, "a refused question can be mended"


def test_chinese_dark_and_small(browser: Any, site: Site) -> None:
    page = visit(browser, site, locale="zh-CN", color_scheme="dark", viewport={"width": 375, "height": 667})
    assert page.locator("h1").inner_text() == "想知道些什么？"
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    ask(page, "What does textwrap.dedent do?")
    page.fill("#question", "一")
    page.keyboard.press("Shift+Enter")
    assert page.locator("#question").input_value() == "一\n"
    box = page.locator("#composer").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375, "nothing sticks out on a phone"
    for name in ("#send", "#new", "#open-settings"):
        assert page.locator(name).get_attribute("aria-label")

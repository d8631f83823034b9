"""Web pages with a known main content: gold paragraphs inside five kinds of layout, and the F1 of a text.

Layouts: semantic elements, telling class names, meaningless class names, tables, a blog with comments.
Around the content stands what the web puts there: menus, breadcrumbs, share bars, teasers, a cookie banner,
a newsletter box, comments, link lists, a legal footer; scripts and styles give it the weight of real pages.
"""

from __future__ import annotations

import html
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from caravan.data import formats

STORY = [
    "The harbour master had kept the same notebook since the spring of the great flood, and nobody "
    "else wrote in it.",
    "Every ship that passed the outer light was entered there with her name, her draught and the "
    "hour she was seen.",
    "When the railway came the entries grew short. A line for a week, then a line for a month, then "
    "only the weather.",
    "His daughter found the book behind the stove in 1931 and read it through in one night without "
    "lighting the lamp.",
    "She gave it to the museum on one condition: that it should lie open, at a new page, every "
    "first day of the month.",
]
ZH = "人人生而自由，在尊严和权利上一律平等。他们有理性和良心。"
HANT = "人人生而自由，在尊嚴和權利上一律平等。他們有理性和良心。"
JA = "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。"
RU = "Все люди рождаются свободными и равными в своём достоинстве."
FR = "Les êtres humains naissent libres et égaux où ça."

_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]+"
)
_MENU = (
    "Home",
    "News",
    "Sport",
    "Business",
    "Weather",
    "Travel",
    "Culture",
    "Shop",
    "Podcasts",
    "Video",
    "About",
    "Contact",
    "Careers",
    "Help",
    "Archive",
    "Events",
    "Science",
    "Health",
    "Opinion",
    "Jobs",
    "Photos",
    "Forum",
    "Login",
    "Register",
)
_TEASERS = (
    "Ten things nobody told you about the harbour", "Council votes on the new bridge tomorrow",
    "Why the old mill had to close after ninety years", "Readers share their best photographs of the storm",
    "How to repair a bicycle with nothing but a spoon", "The quiet return of the night train",
    "Local team wins again in front of a record crowd", "What the budget means for small shops",
)  # fmt: skip
_COMMENTS = (
    "I could not agree more, this is exactly what happened to my neighbour last year when they came.",
    "Sorry but this is nonsense. Has anybody here even read the report before they started to write?",
    "Thanks for posting, I have shared it with my class and we had a long talk about it.",
    "First! Also, the picture is from another town altogether, please do your homework next time.",
)
_BANNER = (
    "We and our partners use cookies to store and access information on your device, to show you personal "
    "advertisements and to understand our audience. You can change your choice at any time in the settings."
)
_LEGAL = (
    "© 2024 Example Media Group. All rights reserved. No part of this site may be reproduced without our "
    "written permission. Registered in England and Wales, number 01234567."
)
_LETTER = (
    "Get the best of our stories in your inbox every Friday. No spam, and you can leave whenever you want."
)
LAYOUTS = ("semantic", "named", "nameless", "tables", "blog")


def page(
    title: str, paragraphs: Sequence[str], layout: str, seed: int, weight: int = 0, links: int = 0
) -> str:
    """An HTML page of `layout` whose main content is the title and the paragraphs.

    `weight` is how many bytes of scripts and styles it carries, `links` how many entries its menus have
    beyond ten.
    """
    draw = random.Random(seed)
    body = f"<h1>{html.escape(title)}</h1>\n" + "\n".join(f"<p>{html.escape(p)}</p>" for p in paragraphs)
    menu = "".join(f'<li><a href="/{w.lower()}">{w}</a></li>' for w in draw.sample(_MENU, 10))
    menu += "".join(
        f'<li class="i i-{i}"><a href="/s/{i}" title="Part {i}"><span>{_MENU[i % 24]} {i}</span></a></li>'
        for i in range(links)
    )
    teasers = "".join(f'<li><a href="/a/{i}">{t}</a></li>' for i, t in enumerate(draw.sample(_TEASERS, 5)))
    says = "".join(
        f'<div class="comment"><b>user{draw.randrange(999)}</b> <i>{draw.randrange(9)} days ago</i>'
        f'<p>{c}</p><a href="#">Reply</a></div>'
        for c in draw.sample(_COMMENTS, 3)
    )
    share = "".join(
        f'<a class="btn" href="#">{s}</a> ' for s in ("Share", "Tweet", "Pin it", "Print", "E-mail")
    )
    head = (
        f"<!DOCTYPE html><html><head><meta charset='utf-8'><title>{html.escape(title)} | Example</title>"
        f"<style>{_filler(draw, weight // 4, '.c%d{margin:%dpx}')}</style>"
        f"<script>{_filler(draw, weight // 2, 'var v%d=%d;')}</script></head><body>"
    )
    tail = f"<script>{_filler(draw, weight // 4, 'f(%d,%d);')}</script></body></html>"
    return head + _LAYOUT[layout](body, menu, teasers, says, share) + tail


def _filler(draw: random.Random, size: int, unit: str) -> str:
    part = unit % (draw.randrange(10**6), draw.randrange(10**6))
    return part * (size // len(part))


def _semantic(body: str, menu: str, teasers: str, says: str, share: str) -> str:
    return (
        f"<header><a href='/'>Example</a><nav><ul>{menu}</ul></nav></header><main><article>{body}</article>"
        f"<div class='share'>{share}</div></main><aside><h2>Most read</h2><ul>{teasers}</ul><p>{_LETTER}</p>"
        f"</aside><footer><p>{_LEGAL}</p><ul>{menu}</ul></footer>"
    )


def _named(body: str, menu: str, teasers: str, says: str, share: str) -> str:
    return (
        f"<div id='cookie-banner' class='cookie-consent'><p>{_BANNER}</p><button>Accept all</button></div>"
        f"<div id='header'><div class='logo'>Example</div><ul class='main-menu nav'>{menu}</ul></div>"
        f"<div class='breadcrumb'><a href='/'>Home</a> &raquo; <a href='/n'>News</a></div>"
        f"<div id='content' class='post-content'>{body}</div><div class='social-share'>{share}</div>"
        f"<div class='sidebar'><h3>Related articles</h3><ul class='related'>{teasers}</ul></div>"
        f"<div class='newsletter-signup'><h3>Newsletter</h3><p>{_LETTER}</p></div>"
        f"<div id='comments' class='comments'><h3>3 comments</h3>{says}</div>"
        f"<div id='footer' class='site-footer'><p>{_LEGAL}</p><ul>{menu}</ul></div>"
    )


def _nameless(body: str, menu: str, teasers: str, says: str, share: str) -> str:
    return (
        f"<div class='x1a'><div class='k9'><ul class='q2'>{menu}</ul></div><div class='b7'><div class='z3'>{body}"  # noqa: E501
        f"</div><div class='z4'>{share}</div></div><div class='b8'><div class='t5'>Most read</div><ul>{teasers}"  # noqa: E501
        f"</ul></div><div class='k8'><ul>{menu}</ul><div class='y1'>{_LEGAL}</div></div></div>"
    )


def _tables(body: str, menu: str, teasers: str, says: str, share: str) -> str:
    links = menu.replace("<li>", "<tr><td>").replace("</li>", "</td></tr>")
    return (
        f"<table width='100%'><tr><td colspan='3'><font size='5'>Example</font></td></tr><tr><td width='150'>"
        f"<table>{links}</table></td><td>{body}</td><td width='200'><b>Also read</b><ul>{teasers}</ul></td></tr>"  # noqa: E501
        f"<tr><td colspan='3'><font size='1'>{_LEGAL}</font></td></tr></table>"
    )


def _blog(body: str, menu: str, teasers: str, says: str, share: str) -> str:
    return (
        f"<div id='page'><div id='masthead'><ul id='menu-top' class='menu'>{menu}</ul></div><div id='primary'>"  # noqa: E501
        f"<div class='entry'><div class='entry-meta'>Posted on <a href='#'>3 May</a> by <a href='#'>admin</a></div>"  # noqa: E501
        f"<div class='entry-content'>{body}</div><div class='sharedaddy'>{share}</div></div>"
        f"<ol class='commentlist'>{says}</ol><div id='respond'><h3>Leave a reply</h3><form><textarea></textarea>"  # noqa: E501
        f"<p>Your email address will not be published. Required fields are marked.</p></form></div></div>"
        f"<div id='secondary' class='widget-area'><div class='widget'><h3>Recent posts</h3><ul>{teasers}</ul></div>"  # noqa: E501
        f"</div><div id='colophon'>{_LEGAL}</div></div>"
    )


_LAYOUT = {"semantic": _semantic, "named": _named, "nameless": _nameless, "tables": _tables, "blog": _blog}


def shingles(text: str, n: int = 4) -> Counter[tuple[str, ...]]:
    """Runs of n words; Han, kana and Thai characters count as words. A shorter text is one run."""
    words = _TOKEN.findall(text.lower())
    return Counter(tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))) if words else Counter()


def score(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Precision, recall and F1 over (gold, found), as the article-extraction benchmark counts them.

    Hits, extras and misses of 4-word runs, each page weighing 1 in all, summed over the pages.
    """
    hits = extras = misses = 0.0
    for gold, found in pairs:
        g, f = shingles(gold), shingles(found)
        tp = sum((g & f).values())
        fp, fn = sum(f.values()) - tp, sum(g.values()) - tp
        whole = tp + fp + fn
        if whole:
            hits, extras, misses = hits + tp / whole, extras + fp / whole, misses + fn / whole
    precision, recall = hits / ((hits + extras) or 1), hits / ((hits + misses) or 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / ((precision + recall) or 1),
    }


def read(root: Path, **limits: Any) -> tuple[list[Any], list[formats.Problem], dict[str, str]]:
    """(documents, problems, file -> format and reason) of a folder."""
    problems: list[formats.Problem] = []
    chosen: dict[str, str] = {}
    found = list(formats.read_all(root, "corpus", problems.append, formats.Limits(**limits), chosen))
    return [f.value for f in found], problems, chosen

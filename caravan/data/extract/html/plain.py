"""The standard library's parser and a few rules, for when no extra is installed.

A page is a list of blocks (paragraphs, headings, list items, cells). Left out: what stands in elements that
never hold content (script, nav, footer, aside ...) or whose class, id or role names something around
the content; blocks that are mostly links; and short blocks with no longer one near (Kohlschütter et al. 2010,
"Boilerplate Detection using Shallow Text Features": words per block, link density and the neighbours decide).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from caravan.data.extract.html._menus import WORDS, trimmed

NEEDS: tuple[str, ...] = ()
_DROP = frozenset((
    "script", "style", "noscript", "template", "svg", "math", "iframe", "object", "canvas", "nav", "footer",
    "aside", "button", "select", "option", "textarea", "dialog", "menu", "audio", "video", "map",
))  # fmt: skip
_BLOCK = frozenset((
    "p", "div", "section", "article", "main", "header", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr",
    "td", "th", "blockquote", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "body", "br", "hr", "figure",
    "figcaption", "address", "center", "details", "summary", "title", "head", "html",
))  # fmt: skip
_VOID = frozenset((
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr",
))  # fmt: skip
_AROUND = re.compile(
    r"(?:^|[\s_-])(?:nav(?:bar|igation)?|menu|breadcrumbs?|footer|side-?bar|comments?|respond|related|"
    r"recommend(?:ed|ations)?|share|sharing|social|cookies?|consent|banner|advert(?:isement)?s?|ads?|promo|"
    r"sponsor(?:ed)?|popup|modal|newsletter|subscribe|login|widget|toolbar|pagination|pager|masthead|"
    r"site-?header|skip-?link|toc|tags?|byline|copyright|disclaimer|sitemap)(?:$|[\s_-])",
    re.I,
)
_CONTENT = frozenset(("html", "body", "main", "article"))
_DEPTH = 2000
_SENTENCE = re.compile(r"[.!?。！？।]['\"”’)]*$")
LONG = 12
"""Words from which a block counts as running text; SHORT, if they end as a sentence and hold no link."""
SHORT = 6


@dataclass(slots=True)
class _Block:
    tag: str
    parts: list[str] = field(default_factory=list)
    linked: int = 0
    """Characters inside links."""

    def text(self) -> str:
        joined = "".join(self.parts)
        return joined.strip("\n") if self.tag == "pre" else " ".join(joined.split())


class _Reader(HTMLParser):
    """Blocks of a page in order; elements around the content are counted in and out by depth."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[_Block] = [_Block("body")]
        self.open: list[tuple[str, bool]] = []
        self.dropping = 0
        self.links = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCK and not self.dropping:
            self.blocks.append(_Block(tag))
        if tag in _VOID or len(self.open) >= _DEPTH:
            return
        if (
            tag in ("p", "li", "td", "th", "tr", "dt", "dd", "option")
            and self.open
            and self.open[-1][0] == tag
        ):
            self._close(tag)  # end tags that may be left out
        drops = tag in _DROP or (tag not in _CONTENT and _is_around(attrs))
        self.open.append((tag, drops))
        self.dropping += drops
        self.links += tag == "a"

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in reversed(self.open[-64:])):
            self._close(tag)
        if tag in _BLOCK and not self.dropping:
            self.blocks.append(_Block("body"))

    def _close(self, tag: str) -> None:
        while self.open:
            name, drops = self.open.pop()
            self.dropping -= drops
            self.links -= name == "a"
            if name == tag:
                return

    def handle_data(self, data: str) -> None:
        if not self.dropping:
            block = self.blocks[-1]
            if any(name == "pre" for name, _ in self.open[-4:]):
                block.tag = "pre"
            block.parts.append(data)
            block.linked += len(data.strip()) if self.links else 0

    def unknown_decl(self, data: str) -> None:
        """CDATA and the like: no text."""


def _is_around(attrs: list[tuple[str, str | None]]) -> bool:
    named = [v for k, v in attrs if v and k in ("class", "id", "role")]
    gone = any(k == "hidden" or (k == "aria-hidden" and v == "true") for k, v in attrs)
    styled = any(k == "style" and v and "display:none" in v.replace(" ", "").lower() for k, v in attrs)
    return gone or styled or any(_AROUND.search(v[:500]) for v in named)


def text(html: str, url: str | None = None) -> str:
    """Main text of a page, a line per block; empty if it has none."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    blocks = [(b, t) for b in reader.blocks if (t := b.text())]
    counts = [len(WORDS.findall(t)) for _, t in blocks]
    runs = [_is_running(b, t, n) for (b, t), n in zip(blocks, counts, strict=True)]
    if not any(runs):
        return "\n".join(t for b, t in blocks if b.linked < 0.5 * len(t))
    first, last = runs.index(True), len(runs) - 1 - runs[::-1].index(True)
    kept = []
    for i, (block, said) in enumerate(blocks):
        heading = block.tag in ("h1", "h2", "h3", "h4", "h5", "h6")
        near = any(runs[max(0, i - 2) : i + 3])
        inside = first - 2 <= i <= last + 1
        if runs[i] or (inside and block.linked < 0.5 * len(said) and (heading or near or block.tag == "pre")):
            kept.append(said)
    return trimmed("\n".join(kept))


def _is_running(block: _Block, text: str, words: int) -> bool:
    if words >= LONG:
        return block.linked < 0.4 * len(text)
    return words >= SHORT and not block.linked and bool(_SENTENCE.search(text))

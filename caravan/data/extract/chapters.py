"""All the text of an HTML document that is content through and through (a chapter of a book)."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCK = frozenset((
    "p", "div", "section", "article", "header", "footer", "aside", "ul", "ol", "li", "dl", "dt", "dd",
    "table", "tr", "blockquote", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "body", "br", "hr", "figure",
    "figcaption", "title",
))  # fmt: skip
_SILENT = frozenset((
    "script", "style", "head", "template", "svg", "math",
))  # fmt: skip
_SPACE = re.compile(r"\s+")
_TRAILING = re.compile(r"[ \t\r\f\v\xa0]+\n")


class _All(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in _SILENT
        self.pre += tag == "pre"
        if tag in _BLOCK:
            self.parts.append("\n\n" if tag != "br" else "\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCK:  # <script/> closes itself in XHTML
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in _SILENT and self.silent > 0
        self.pre -= tag == "pre" and self.pre > 0
        if tag in _BLOCK:
            self.parts.append("\n\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if self.silent:
            return
        if not self.pre:
            data = _SPACE.sub(" ", data)
            if self.parts and self.parts[-1].endswith("\n"):
                data = data.lstrip()
        self.parts.append(data)


def text(html: str) -> str:
    """Text with an empty line between blocks; <pre> keeps its lines."""
    reader = _All()
    reader.feed(html)
    reader.close()
    return re.sub(r"\n{3,}", "\n\n", _TRAILING.sub("\n", "".join(reader.parts))).strip()

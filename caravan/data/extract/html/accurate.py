"""trafilatura (Barbaresi 2021), precision first, comments left out; the fast engine where it finds nothing.

Its `fast` mode skips the comparison with two other extractors. Its time grows with the tree, so what can hold
no content goes first: elements it would drop itself, and lists and tables of nothing but short links (menus).
Pages with nothing but a list or a table defeat its rules; those are read by `fast`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

NEEDS = ("trafilatura", "lxml_html_clean", "resiliparse")
_FEW = 25
_NEVER = (
    "script", "style", "noscript", "template", "svg", "iframe", "object", "embed", "nav", "footer", "aside",
    "button", "select", "input", "textarea", "link", "canvas", "menu", "dialog",
)  # fmt: skip
MENU_LINKS = 8
"""A list with at least so many links ..."""
MENU_CHARS = 40
"""... of at most so many characters each, and hardly anything else, is a menu."""


def text(html: str, url: str | None = None) -> str:
    """Main text of a page; empty if it has none."""
    import trafilatura

    from caravan.data.extract.html import _menus, fast

    tree = trafilatura.load_html(html.replace("\0", ""))  # as browsers read them; lxml refuses them
    if tree is None:
        return fast.text(html, url)
    _prune(tree)
    found = trafilatura.extract(tree, url=url, fast=True, favor_precision=True, include_comments=False) or ""
    return _menus.trimmed(found) if len(found) >= _FEW else fast.text(html, url)


@cache
def _paths() -> tuple[Any, Any, Any]:
    """Links of an element, their text and all text, read in C without an object per element."""
    from lxml import etree

    paths = ("count(.//a)", ".//a//text()", "string()")
    return tuple(etree.XPath(path, smart_strings=False) for path in paths)  # type: ignore[return-value]


def _prune(tree: Any) -> None:
    from lxml import etree

    etree.strip_elements(tree, *_NEVER, with_tail=False)
    count, linked, said = _paths()
    for group in [*tree.iter("ul", "ol", "table")]:
        links = count(group)
        if links < MENU_LINKS or group.getparent() is None:
            continue
        shown = "".join(linked(group))
        mostly = len("".join(shown.split())) >= 0.9 * len("".join(said(group).split()))
        if mostly and len(shown) <= MENU_CHARS * links:
            group.drop_tree()

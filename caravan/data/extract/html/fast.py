"""resiliparse (Bevendorff et al. 2018): a DOM in C and content rules on tag and class names; and ours.

Ours name what its rules let through (comment threads, share bars, widgets of the usual publishing systems)
and cut menus at either end. Where nothing is left of a page (all of it inside an element called "header" or
"sidebar"), the plain engine reads it.
"""

from __future__ import annotations

NEEDS = ("resiliparse",)
_FEW = 25
# Each selector is held against each element, a hundredth of the time of a page; what resiliparse's own rules
# take out (share bars, sign-ups, hidden elements) is not said again.
SKIP = [
    "#comments", "#respond", "#disqus_thread", "#secondary", "#colophon", "#masthead", ".comments",
    ".comment-list", ".commentlist", ".comments-area", ".comment-respond", ".entry-meta", ".post-meta",
    ".widget", ".widget-area", ".related-posts", ".post-navigation", ".nav-links", ".breadcrumb",
    ".breadcrumbs", ".cookie-consent", ".tagcloud", ".pagination", ".mw-editsection", ".noprint",
    "[role=navigation]", "[role=complementary]", "[role=contentinfo]",
]  # fmt: skip


def text(html: str, url: str | None = None) -> str:
    """Main text of a page; empty if it has none."""
    from resiliparse.extract.html2text import extract_plain_text

    from caravan.data.extract.html import _menus

    found = extract_plain_text(
        html, main_content=True, alt_texts=False, list_bullets=False, skip_elements=SKIP
    )
    if len(found) >= _FEW:
        return _menus.trimmed(found)
    from caravan.data.extract.html import plain

    return plain.text(html, url)

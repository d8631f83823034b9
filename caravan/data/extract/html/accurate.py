"""trafilatura (Barbaresi 2021), precision first, comments left out; the fast engine where it finds nothing.

Its `fast` mode skips the comparison with two other extractors: on article pages that costs nothing and saves
a third of the time. Pages with nothing but a list or a table defeat its rules; those are read by `fast`.
"""

from __future__ import annotations

NEEDS = ("trafilatura", "lxml_html_clean", "resiliparse")
_FEW = 25


def text(html: str, url: str | None = None) -> str:
    """Main text of a page; empty if it has none."""
    import trafilatura

    from caravan.data.extract.html import _menus, fast

    found = trafilatura.extract(html, url=url, fast=True, favor_precision=True, include_comments=False) or ""
    return _menus.trimmed(found) if len(found) >= _FEW else fast.text(html, url)

"""resiliparse (Bevendorff et al. 2018): a DOM in C and content rules on tag and class names.

Where its rules throw nearly everything away (a whole page inside an element called "header" or "sidebar"),
the text of the page without its menus is taken instead.
"""

from __future__ import annotations

NEEDS = ("resiliparse",)
_FEW = 25


def text(html: str, url: str | None = None) -> str:
    """Main text of a page; empty if it has none."""
    from resiliparse.extract.html2text import extract_plain_text

    found = extract_plain_text(html, main_content=True, alt_texts=False, preserve_formatting=True)
    if len(found) >= _FEW:
        return found
    from caravan.data.extract.html import plain

    return plain.text(html, url)

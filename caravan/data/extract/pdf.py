"""PDF through pypdf (extra `extract`): text layer only; scanned pages hold no text and are not read.

Lines that head or foot more than half of at least four pages (running titles) and bare page numbers are left
out, and words cut at a line's end are joined: "inter-\\nnational" is one word if the next line begins small.
"""

from __future__ import annotations

import re
from collections import Counter

from caravan.data.extract.problems import Unreadable

NEEDS = ("pypdf",)
_NUMBER = re.compile(r"^\W*(?:page\s+|第\s*)?\d{1,4}(?:\s*(?:/|of)\s*\d{1,4})?\s*页?\W*$", re.I)
_DIGITS = re.compile(r"\d+")
_CUT = re.compile(r"(?<=[a-zà-ÿ])-\n(?=[a-zà-ÿ])")


def text(path: str, limit: int = 256 << 20) -> tuple[str, str]:
    """(text, title) of a PDF; raises Unreadable if it is damaged, needs a password or has no text layer."""
    import pypdf

    pages: list[list[str]] = []
    size = 0
    try:
        with pypdf.PdfReader(path) as reader:
            if reader.is_encrypted and not reader.decrypt(""):
                raise Unreadable("a PDF without a password")
            for page in reader.pages:
                said = page.extract_text() or ""
                size += len(said)
                if size > limit:
                    raise Unreadable(f"a PDF with at most {limit:,} characters of text")
                pages.append([line.rstrip() for line in said.split("\n")])
            title = str((reader.metadata and reader.metadata.get("/Title")) or "")
    except Unreadable:
        raise
    except Exception as error:  # pypdf raises whatever a damaged object provokes
        raise Unreadable(f"a sound PDF ({type(error).__name__}: {str(error)[:150]})") from error
    found = "\n\n".join(p for page in _without_running_titles(pages) if (p := "\n".join(page).strip()))
    if not found:
        raise Unreadable("a PDF with a text layer (scanned pages need OCR)")
    return _CUT.sub("", found), " ".join(title.split())


def _without_running_titles(pages: list[list[str]]) -> list[list[str]]:
    def key(line: str) -> str:
        return _DIGITS.sub("0", line.strip())

    edges = Counter(k for page in pages for k in {key(x) for x in _edges(page) if x.strip()})
    running = {k for k, n in edges.items() if len(pages) >= 4 and n > len(pages) / 2}
    out = []
    for page in pages:
        start, stop = 0, len(page)
        while start < stop and (not page[start].strip() or key(page[start]) in running):
            start += 1
        while stop > start and (
            not page[stop - 1].strip() or key(page[stop - 1]) in running or _NUMBER.match(page[stop - 1])
        ):
            stop -= 1
        out.append(page[start:stop])
    return out


def _edges(page: list[str]) -> list[str]:
    said = [line for line in page if line.strip()]
    return said[:2] + said[-2:]

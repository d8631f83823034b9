"""Word documents (.docx, ISO 29500): the paragraphs and table cells of the body, by the standard library."""

from __future__ import annotations

from caravan.data.extract.archive import Archive
from caravan.data.extract.problems import Unreadable

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"


def text(path: str, limit: int = 256 << 20) -> tuple[str, str]:
    """(text, "") of a document, a line per paragraph, without deleted text; raises Unreadable."""
    body = Archive(path, limit).xml("word/document.xml").find(f"{_W}body")
    if body is None:
        raise Unreadable("a Word document with a body")
    lines = []
    for paragraph in body.iter(f"{_W}p"):
        said = []
        for node in paragraph.iter():
            if node.tag == f"{_W}t":  # deleted text stands in w:delText
                said.append(node.text or "")
            elif node.tag == f"{_W}tab":
                said.append("\t")
            elif node.tag in (f"{_W}br", f"{_W}cr"):
                said.append("\n")
        lines.append("".join(said).rstrip())
    found = "\n".join(lines).strip()
    if not found:
        raise Unreadable("a Word document with text")
    return found, ""

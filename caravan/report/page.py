"""A self-contained page: our template filled in, written in one rename. Also times and sizes for people."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caravan.types import UserError

STYLE = Path(__file__).with_name("page.css")


def render(template: Path, facts: Mapping[str, Any]) -> str:
    """The page. Pictures are our own finished SVG; everything else is escaped by the template."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["picture"] = Markup
    style = STYLE.read_text(encoding="utf-8")
    return environment.from_string(template.read_text(encoding="utf-8")).render(style=style, **facts)


def write(text: str, path: Path) -> Path:
    """Put the page there in one rename. UserError when the folder cannot be written."""
    draft = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".html")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except OSError as problem:
        if draft:
            Path(draft).unlink(missing_ok=True)
        raise UserError(f"the page cannot be written: {problem.strerror}", f"see {path.parent}") from problem
    return path


def duration(seconds: float) -> str:
    """0.2 s · 42 s · 3 min 05 s · 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """Bytes for people, in powers of 1024; a dash when unknown."""
    if not count:
        return "–"
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"

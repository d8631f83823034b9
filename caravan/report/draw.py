"""Pictures for the passport, as SVG text of our own: the lineage as boxes and arrows, and curves over steps.

Everything is built as XML elements, so that whatever a name or a number holds comes out escaped. Colours are
classes of the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 152, 46, 20, 44
CHART_WIDTH, CHART_HEIGHT = 340, 170
POINTS = 240
"""Points drawn per curve; more are averaged in equal stretches of steps."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """One artefact of the lineage."""

    key: str
    """`kind/id`."""
    title: str
    note: str
    kind: str
    parents: tuple[str, ...]
    aside: frozenset[str] = frozenset()
    """Parents that only served: what an evaluation measured with."""


def lineage(boxes: Sequence[Box]) -> str:
    """The boxes from top to bottom, each below everything it was made from. Arrows that only repeat a longer
    way are drawn faintly; what merely served an evaluation has an arrow only where it would have none
    otherwise."""
    by_key = {box.key: box for box in boxes}
    every = {box.key: [p for p in box.parents if p in by_key] for box in boxes}
    main = {key: [p for p in found if p not in by_key[key].aside] for key, found in every.items()}
    tied = {key for key in main if main[key]} | {p for found in main.values() for p in found}
    parents = {key: [p for p in found if p in main[key] or p not in tied] for key, found in every.items()}
    rows = _rows(parents)
    place: dict[str, tuple[float, float]] = {}
    width = max(len(row) for row in rows) * (BOX_WIDTH + GAP_X) - GAP_X + 8
    for level, row in enumerate(rows):
        left = (width - len(row) * (BOX_WIDTH + GAP_X) + GAP_X) / 2
        for n, key in enumerate(row):
            place[key] = (left + n * (BOX_WIDTH + GAP_X), 4 + level * (BOX_HEIGHT + GAP_Y))
    height = len(rows) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 8
    svg = _svg(width, height, "lineage", "Lineage: what was made from what")
    above = _ancestors(main)
    edges = [(parent, key) for key in by_key for parent in parents[key]]
    faint = {(p, k) for p, k in edges if p in by_key[k].aside or _roundabout((p, k), main, above)}
    for edge in sorted(edges, key=lambda edge: edge not in faint):
        _arrow(svg, place[edge[0]], place[edge[1]], edge in faint)
    for box in boxes:
        _box(svg, box, *place[box.key])
    return ET.tostring(svg, encoding="unicode")


def _rows(parents: Mapping[str, list[str]]) -> list[list[str]]:
    """Keys by level. Everything stands just above its first use, so that arrows are short; within a level
    boxes are ordered by where their neighbours stand."""
    level = dict.fromkeys(parents, 0)
    children: dict[str, list[str]] = {key: [] for key in parents}
    order = _parents_first(parents)
    for key in order:
        level[key] = 1 + max((level[p] for p in parents[key]), default=-1)
        for parent in parents[key]:
            children[parent].append(key)
    for key in reversed(order):
        if children[key]:
            level[key] = min(level[child] for child in children[key]) - 1
    rows: list[list[str]] = [[] for _ in range(max(level.values(), default=0) + 1)]
    for key in order:
        rows[level[key]].append(key)
    for sweep in range(8):
        numbers = range(len(rows)) if sweep % 2 == 0 else range(len(rows) - 1, -1, -1)
        near = parents if sweep % 2 == 0 else children
        spot = {key: n - len(row) / 2 for row in rows for n, key in enumerate(row)}
        for number in numbers:
            rows[number].sort(key=lambda key: _mean([spot[k] for k in near[key]], spot[key]))
            spot |= {key: n - len(rows[number]) / 2 for n, key in enumerate(rows[number])}
    return rows


def _parents_first(parents: Mapping[str, list[str]]) -> list[str]:
    done: dict[str, None] = {}

    def visit(key: str) -> None:
        if key not in done:
            for parent in parents[key]:
                visit(parent)
            done[key] = None

    for key in parents:
        visit(key)
    return list(done)


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _ancestors(parents: Mapping[str, list[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}

    def of(key: str) -> set[str]:
        if key not in found:
            found[key] = set(parents[key]).union(*(of(p) for p in parents[key]))
        return found[key]

    for key in parents:
        of(key)
    return found


def _roundabout(
    edge: tuple[str, str], parents: Mapping[str, list[str]], above: Mapping[str, set[str]]
) -> bool:
    """Whether the parent is reached through another parent as well."""
    parent, key = edge
    return any(parent in above[other] for other in parents[key] if other != parent)


def _arrow(svg: ET.Element, start: tuple[float, float], end: tuple[float, float], faint: bool) -> None:
    x1, y1 = start[0] + BOX_WIDTH / 2, start[1] + BOX_HEIGHT
    x2, y2 = end[0] + BOX_WIDTH / 2, end[1]
    bend = min(60.0, (y2 - y1) / 2)
    path = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2 - 5:.1f}"
    look = "edge faint" if faint else "edge"
    ET.SubElement(svg, "path", {"class": look, "d": path})
    if not faint:
        ET.SubElement(svg, "path", {"class": "tip", "d": f"M{x2 - 4:.1f} {y2 - 7:.1f}h8l-4 7z"})


def _box(svg: ET.Element, box: Box, x: float, y: float) -> None:
    link = ET.SubElement(svg, "a", {"href": f"#{anchor(box.key)}"})
    ET.SubElement(link, "title").text = f"{box.title}: {box.key}"
    size = {"width": str(BOX_WIDTH), "height": str(BOX_HEIGHT), "rx": "9"}
    ET.SubElement(link, "rect", {"class": f"box k-{box.kind}", "x": f"{x:.1f}", "y": f"{y:.1f}", **size})
    middle = f"{x + BOX_WIDTH / 2:.1f}"
    ET.SubElement(link, "text", {"class": "title", "x": middle, "y": f"{y + 20:.1f}"}).text = _short(
        box.title, 19
    )
    ET.SubElement(link, "text", {"class": "note", "x": middle, "y": f"{y + 36:.1f}"}).text = _short(
        box.note, 25
    )


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def anchor(key: str) -> str:
    """Name of an artefact's section in the page."""
    kind, _, id = key.partition("/")
    return f"{kind}-{id[:12]}"


def chart(name: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One small chart: every line is (step, value) pairs, in order. Steps along, values up, on a linear
    scale."""
    drawn = {label: _thin(points) for label, points in lines.items() if points}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    svg = _svg(CHART_WIDTH, CHART_HEIGHT, "chart", f"{name} over steps")
    left, right, top, bottom = 48.0, CHART_WIDTH - 12.0, 28.0, CHART_HEIGHT - 22.0
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    ticks = _ticks(min(ys), max(ys))
    y0, y1 = min(ticks[0], min(ys)), max(ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    ET.SubElement(svg, "text", {"class": "name", "x": "8", "y": "16"}).text = name
    for tick in ticks:
        _, y = at(x0, tick)
        ET.SubElement(svg, "path", {"class": "grid", "d": f"M{left:.1f} {y:.1f}H{right:.1f}"})
        ET.SubElement(
            svg, "text", {"class": "tick end", "x": f"{left - 5:.1f}", "y": f"{y + 3.5:.1f}"}
        ).text = number(tick)
    for x, look in ((x0, "tick start"), (x1, "tick end")):
        spot = {"class": look, "x": f"{at(x, y0)[0]:.1f}", "y": f"{bottom + 15:.1f}"}
        ET.SubElement(svg, "text", spot).text = number(x)
    for n, (label, points) in enumerate(drawn.items()):
        spots = [at(*point) for point in points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        ET.SubElement(svg, "path", {"class": f"line l{n % 4}", "d": path})
        x, y = spots[-1]
        ET.SubElement(
            svg, "circle", {"class": f"dot l{n % 4}", "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "2.6"}
        )
        legend = f"{label} {number(points[-1][1])}" if len(drawn) > 1 else number(points[-1][1])
        # Legends stand in the title line, from the right, so that no curve crosses them.
        ET.SubElement(
            svg, "text", {"class": f"legend l{n % 4}", "x": f"{right - n * 92:.1f}", "y": "16"}
        ).text = legend
    return ET.tostring(svg, encoding="unicode")


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points, means of equal stretches."""
    if len(points) <= POINTS:
        return list(points)
    out = []
    for n in range(POINTS):
        some = points[n * len(points) // POINTS : (n + 1) * len(points) // POINTS]
        out.append((some[-1][0], sum(y for _, y in some) / len(some)))
    return out


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that span low to high."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [n * step for n in range(first, last + 1)]


def number(value: float) -> str:
    """A number for people: 1,234 · 0.123 · 1.2e-05."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}" if abs(value) < 1e6 else _large(value)
    if abs(value) >= 1e6:
        return _large(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _large(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def bar(share: float) -> str:
    """A bar of a length from 0 to 1."""
    svg = _svg(120, 10, "bar", "")
    ET.SubElement(svg, "rect", {"class": "track", "width": "120", "height": "10", "rx": "5"})
    width = f"{max(3.0, 120 * min(max(share, 0.0), 1.0)):.1f}"
    ET.SubElement(svg, "rect", {"class": "fill", "width": width, "height": "10", "rx": "5"})
    return ET.tostring(svg, encoding="unicode")


def _svg(width: float, height: float, look: str, label: str) -> ET.Element:
    size = {"width": f"{width:.0f}", "height": f"{height:.0f}", "viewBox": f"0 0 {width:.0f} {height:.0f}"}
    said = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    return ET.Element("svg", {"class": look, **size, **said})

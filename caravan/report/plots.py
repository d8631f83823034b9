"""Pictures for the page of a corpus, as SVG text of our own: what went where, histograms with limits, bars.

Built as XML elements like `draw`, so that whatever a name holds comes out escaped; colours are classes of the
page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from caravan.report.draw import _short, _svg, _ticks, number

WIDTH, BAND, NODE, ROW = 1090.0, 170.0, 9.0, 17.0
HIST_WIDTH, HIST_HEIGHT = 348, 150


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One step of the way: what came in, what was taken out and by which rule (largest first), what went
    on."""

    name: str
    came: float
    gone: tuple[tuple[str, float], ...]
    """(rule, amount), amounts above zero."""
    left: float


def sankey(stops: Sequence[Stop], unit: str, shown: Callable[[float], str]) -> str:
    """A band from left to right, as wide as what is still there; what a rule takes bends down and ends at its
    name. Widths are to one scale; what would be thinner than a pixel is drawn one wide. `shown` writes an
    amount."""
    top, most = 46.0, max((s.came for s in stops), default=0) or 1.0
    column = min(max((WIDTH - 110) / max(1, len(stops)), 200.0), 330.0)
    down = max((sum(max(ROW, _wide(x, most) + 4) for _, x in s.gone) for s in stops), default=0.0)
    width = 8 + max(1, len(stops)) * column + 110
    svg = _svg(width, top + BAND + 52 + down, "sankey", f"What each rule removed, in {unit}")
    for n, stop in enumerate(stops):
        x = 8 + n * column
        _node(svg, stop.name, shown(stop.came), x, top, BAND * stop.came / most)
        _stop(svg, stop, x, column, top, most, shown)
    if stops:
        left = stops[-1].left
        _node(svg, "kept", shown(left), 8 + len(stops) * column, top, BAND * left / most)
    return ET.tostring(svg, encoding="unicode")


def _wide(amount: float, most: float) -> float:
    return max(1.0, BAND * amount / most)


def _node(svg: ET.Element, name: str, amount: str, x: float, top: float, tall: float) -> None:
    _rect(svg, "node", x, top, NODE, max(tall, 1))
    _text(svg, "title start", x, 16, _short(name, 26))
    _text(svg, "note start", x, 32, amount)


def _stop(
    svg: ET.Element,
    stop: Stop,
    x: float,
    column: float,
    top: float,
    most: float,
    shown: Callable[[float], str],
) -> None:
    """What goes on to the right, and what bends down to the names of its rules."""
    came, left = BAND * stop.came / most, BAND * stop.left / most
    if left:
        words = f"{stop.name}: {shown(stop.left)} stay"
        _ribbon(svg, "kept", (x + NODE, top, left), (x + column, top, left), words)
    y, down = top + left, top + BAND + 40
    for rule, amount in stop.gone:
        wide = _wide(amount, most)
        words = f"{rule}: {shown(amount)}, {_percent(amount, stop.came)} of what came"
        start = (x + NODE, min(y, top + max(came, 1) - 1), wide)
        _ribbon(svg, "gone", start, (x + 40, down, wide), words)
        _rect(svg, "end", x + 40, down, 4, wide)
        name = _squeezed(rule.replace("_", " "), int((column - 110) / 5.4))
        label = _text(svg, "rule start", x + 49, down + wide / 2 + 3.5, name)
        ET.SubElement(label, "tspan", {"class": "amount"}).text = f" {shown(amount)}"
        y += BAND * amount / most
        down += max(ROW, wide + 4)


def _squeezed(name: str, most: int) -> str:
    """A long name without its first words: rules of one family begin alike, and differ at the end."""
    short = name
    while len(short) > most and " " in short:
        short = "…" + short.lstrip("…").partition(" ")[2]
    return _short(short, most)


def _rect(svg: ET.Element, look: str, x: float, y: float, width: float, height: float) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    ET.SubElement(svg, "rect", {"class": look, **place})


def _ribbon(
    svg: ET.Element, look: str, start: tuple[float, float, float], end: tuple[float, float, float], words: str
) -> None:
    """From (x, y, width) to (x, y, width)."""
    (x1, y1, w1), (x2, y2, w2) = start, end
    bend = (x2 - x1) * 0.55
    path = (
        f"M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
        f"V{y2 + w2:.1f}C{x2 - bend:.1f} {y2 + w2:.1f} {x1 + bend:.1f} {y1 + w1:.1f} {x1:.1f} {y1 + w1:.1f}Z"
    )
    ribbon = ET.SubElement(svg, "path", {"class": f"ribbon {look}", "d": path})
    ET.SubElement(ribbon, "title").text = words


def _text(svg: ET.Element, look: str, x: float, y: float, words: str) -> ET.Element:
    element = ET.SubElement(svg, "text", {"class": look, "x": f"{x:.1f}", "y": f"{y:.1f}"})
    element.text = words
    return element


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between edges (one more than counts), limits with their words, and which sides they forbid."""

    name: str
    note: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    limits: tuple[tuple[str, float], ...] = ()
    """("at least", 50.0): also at most, more than, less than."""
    log: bool = False
    """Whether the edges grow by a factor."""


def histogram(h: Histogram) -> str:
    """Bars of documents over a signal; bars that a limit forbids are drawn in the colour of what is removed.
    Heights are square roots of counts, so that the tail a limit cuts can be seen."""
    svg = _svg(HIST_WIDTH, HIST_HEIGHT, "chart", f"{h.name}: documents by value")
    left, right, top, bottom = 12.0, HIST_WIDTH - 12.0, 50.0, HIST_HEIGHT - 22.0
    low, high = _scaled(h.edges[0], h), _scaled(h.edges[-1], h)

    def at(value: float) -> float:
        return left + (min(max(_scaled(value, h), low), high) - low) / ((high - low) or 1) * (right - left)

    tallest = math.sqrt(max((*h.counts, 1)))
    for count, a, b in zip(h.counts, h.edges, h.edges[1:], strict=False):
        tall = math.sqrt(count) / tallest * (bottom - top)
        if not count:
            continue
        place = {"x": f"{at(a):.1f}", "width": f"{max(at(b) - at(a) - 0.6, 0.8):.1f}"}
        size = {"y": f"{bottom - max(tall, 1):.1f}", "height": f"{max(tall, 1):.1f}"}
        look = "outside" if _forbidden(a, h) else "inside"
        bar = ET.SubElement(svg, "rect", {"class": f"count {look}", **place, **size})
        ET.SubElement(bar, "title").text = f"{number(a)} to {number(b)}: {count:,} documents"
    ET.SubElement(svg, "path", {"class": "grid", "d": f"M{left:.1f} {bottom:.1f}H{right:.1f}"})
    crowded = len(h.limits) == 2 and abs(at(h.limits[1][1]) - at(h.limits[0][1])) < 150
    for n, (words, limit) in enumerate(h.limits):
        x = at(limit)
        ET.SubElement(svg, "path", {"class": "limit", "d": f"M{x:.1f} {top - 8:.1f}V{bottom:.1f}"})
        side = "end" if x > (left + right) / 2 else "start"
        y = top - 3 + (11 if crowded and n else 0)
        spot = x + (-4 if side == "end" else 4)
        _text(svg, f"limit-word {side}", spot, y, f"{words} {number(limit)}")
    _text(svg, "name start", 8, 16, _short(h.name.replace("_", " "), 40))
    _text(svg, "tick start", 8, 31, _short(h.note, 60))
    ticks = [10.0**p for p in range(math.floor(low), math.ceil(high) + 1)] if h.log else _ticks(low, high)
    shown = [t for t in ticks if low <= _scaled(t, h) <= high]
    for tick in shown[:: max(1, math.ceil(len(shown) / 6))]:
        edge = 4 * len(number(tick))  # about half of its width
        side = "start" if at(tick) < left + edge else "end" if at(tick) > right - edge else "middle"
        _text(svg, f"tick {side}", at(tick), bottom + 15, number(tick))
    return ET.tostring(svg, encoding="unicode")


def _scaled(value: float, h: Histogram) -> float:
    return math.log10(max(value, 1e-12)) if h.log else value


def _forbidden(value: float, h: Histogram) -> bool:
    tests = {
        "at least": lambda limit: value < limit,
        "more than": lambda limit: value <= limit,
        "at most": lambda limit: value > limit,
        "less than": lambda limit: value >= limit,
    }
    return any(tests[words](limit) for words, limit in h.limits if words in tests)


def curve(name: str, points: Sequence[tuple[float, float]], marks: Sequence[tuple[str, float]] = ()) -> str:
    """A curve over [0, 1] with values in [0, 1], and upright marks."""
    svg = _svg(HIST_WIDTH, HIST_HEIGHT, "chart", name)
    left, right, top, bottom = 34.0, HIST_WIDTH - 14.0, 34.0, HIST_HEIGHT - 22.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * (right - left), bottom - y * (bottom - top)

    for tick in (0.0, 0.5, 1.0):
        ET.SubElement(svg, "path", {"class": "grid", "d": f"M{left:.1f} {at(0, tick)[1]:.1f}H{right:.1f}"})
        _text(svg, "tick end", left - 5, at(0, tick)[1] + 3.5, number(tick))
        _text(svg, "tick middle", at(tick, 0)[0], bottom + 15, number(tick))
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*p) for p in points))
    ET.SubElement(svg, "path", {"class": "line l0", "d": path})
    for words, x in marks:
        ET.SubElement(svg, "path", {"class": "limit", "d": f"M{at(x, 0)[0]:.1f} {top:.1f}V{bottom:.1f}"})
        _text(svg, "limit-word end", at(x, 0)[0] - 4, top + 10, words)
    _text(svg, "name start", 8, 16, name)
    return ET.tostring(svg, encoding="unicode")

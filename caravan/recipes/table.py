"""*Did each stage help?*: one row per model, each compared with the row before it on the same items.

A difference is shown with its paired 95 % bootstrap interval; it counts as help or harm only if the interval
excludes zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.evals.compare import compare
from caravan.store import Artefact

COLUMNS: dict[str, tuple[str, int, str]] = {
    "bits_per_byte": ("bits per byte", -1, "{:.3f}"),
    "exact_match": ("answers right", +1, "{:.1%}"),
    "arithmetic": ("sums right", +1, "{:.1%}"),
    "reward_score": ("reward", +1, "{:.2f}"),
    "kl": ("KL to SFT", 0, "{:.2f}"),
}
"""Metric -> heading, which way is better (0: neither), format."""


@dataclass(frozen=True)
class Row:
    """One model: `cells` by heading, ready for the passport, the first being its name."""

    name: str
    cells: dict[str, Any]


def rows_of(evaluations: Mapping[str, Artefact], before: Mapping[str, str]) -> list[Row]:
    """One row per evaluation; row X is compared with row `before[X]`, item by item."""
    scores = {name: json.loads((art / "scores.json").read_text()) for name, art in evaluations.items()}
    rows = []
    for name, found in scores.items():
        against = before.get(name)
        changes = compare(evaluations[against].path, evaluations[name].path) if against else {}
        cells: dict[str, Any] = {"model": name if against is None else f"{name} vs {against}"}
        for metric, (heading, direction, form) in COLUMNS.items():
            if metric not in found:
                continue
            cell = {key: found[metric][key] for key in ("value", "low", "high", "n")}
            cell["format"] = form
            if metric in changes:
                change = changes[metric]
                cell["difference"] = {"value": change.value, "low": change.low, "high": change.high}
                cell["better"] = _verdict(change.low, change.high, direction)
            cells[heading] = cell
        rows.append(Row(name, cells))
    return rows


def _verdict(low: float, high: float, direction: int) -> bool | None:
    """Help, harm, or None where the interval holds zero or neither way is better."""
    if direction == 0 or low <= 0 <= high:
        return None
    return (low > 0) == (direction > 0)


LEGEND = (
    "bits per byte: of held-out text, lower is better. answers right: held-out phrasings of questions about "
    "what was taught. sums right: pairs of numbers never trained. reward: mean score that the reward model "
    "gives to sampled answers. KL: nats per sampled answer. Below each value: the change against the model "
    "named on the left, and its paired 95 % interval; green helped, red harmed, grey cannot be told from "
    "chance."
)


def print_table(rows: Sequence[Row]) -> None:
    """The table on stdout: value, and below it the change against the row's predecessor with its interval."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Did each stage help?", title_justify="left", box=box.SIMPLE_HEAD)
    headings = list(dict.fromkeys(h for row in rows for h in row.cells))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_text(row.cells.get(h)) for h in headings))
    console = Console()
    console.width = max(console.width, 116)  # a pipe has no width; the table needs this much
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown, from `cells` or from the JSON that `write_table` wrote."""
    headings = list(dict.fromkeys(h for cells in rows for h in cells))
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for cells in rows:
        texts = []
        for heading in headings:
            value, change, _ = _parts(cells.get(heading))
            texts.append(value + (f"<br><sub>{change}</sub>" if change else ""))
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _text(cell: Any) -> str:
    value, change, colour = _parts(cell)
    if not change:
        return value
    moved, interval = change.split(" ", 1)
    return f"{value}\n[{colour}]{moved}\n\\{interval}[/{colour}]"


def _parts(cell: Any) -> tuple[str, str, str]:
    """Value, change with interval, colour of the change."""
    if cell is None:
        return "–", "", ""
    if isinstance(cell, str):
        return cell, "", ""
    form = cell["format"]
    if "difference" not in cell:
        return form.format(cell["value"]), "", ""
    scale, digits = (100, "{:.1f}") if "%" in form else (1, form)
    value, low, high = (cell["difference"][key] * scale for key in ("value", "low", "high"))
    change = f"{digits.replace('{:', '{:+').format(value)} [{digits.format(low)}, {digits.format(high)}]"
    return (
        form.format(cell["value"]),
        change,
        {True: "green", False: "red", None: "bright_black"}[cell["better"]],
    )


def write_table(rows: Sequence[Row], path: Path) -> None:
    """The same numbers as JSON."""
    path.write_text(
        json.dumps([row.cells for row in rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )

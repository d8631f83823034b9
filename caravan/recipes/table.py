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
    "bits_per_byte": ("bits/byte, held-out text", -1, "{:.3f}"),
    "exact_match.fact": ("facts right", +1, "{:.1%}"),
    "exact_match.chat": ("answers right", +1, "{:.1%}"),
    "arithmetic": ("sums right", +1, "{:.1%}"),
    "reward_score": ("reward score", +1, "{:.2f}"),
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
        cells: dict[str, Any] = {"model": name if against is None else f"{name} (against {against})"}
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


def print_table(rows: Sequence[Row]) -> None:
    """The table on stdout: value, and the change against the row's predecessor with its interval."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Did each stage help?", box=box.SIMPLE_HEAD, caption=LEGEND)
    headings = list(dict.fromkeys(h for row in rows for h in row.cells))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(*(_text(row.cells.get(h)) for h in headings))
    Console(width=max(120, Console().width)).print(table)


LEGEND = (
    "second line: change against the model in brackets, 95 % interval, paired by item; "
    "green helped, red harmed, no colour: not told apart from chance"
)


def _text(cell: Any) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    text = cell["format"].format(cell["value"])
    if "difference" not in cell:
        return text
    change = cell["difference"]
    signed = cell["format"].replace("{:", "{:+")
    low, value, high = (signed.format(change[key]) for key in ("low", "value", "high"))
    colour = {True: "green", False: "red", None: "dim"}[cell["better"]]
    return f"{text}\n[{colour}]{value} \\[{low}, {high}][/{colour}]"


def write_table(rows: Sequence[Row], path: Path) -> None:
    """The same numbers as JSON."""
    path.write_text(json.dumps([row.cells for row in rows], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

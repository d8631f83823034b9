"""Two evaluations of the same questions, side by side: what changed, and how sure we are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from caravan.evals.items import metrics_of
from caravan.evals.stats import RESAMPLES, Difference, paired_difference
from caravan.types import UserError


def read_items(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Metric -> rows of items.jsonl, in order; per kind of question too, as in scores.json."""
    path = folder / "items.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no evaluation: {error}") from error
    out: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for metric in metrics_of(row["task"], row.get("kind", "")):
            out.setdefault(metric, []).append(row)
    return out


def compare(before: Path, after: Path, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Difference]:
    """`after - before` for each metric both folders have, paired by item, with interval and p-value.

    Raises UserError if the items are not the same in the same order: another question set, limit or version.
    """
    first, second = read_items(before), read_items(after)
    out = {}
    for metric in sorted(first.keys() & second.keys()):
        a, b = first[metric], second[metric]
        if [row["id"] for row in a] != [row["id"] for row in b]:
            raise UserError(
                f"the two evaluations did not ask the same items for {metric}",
                "evaluate both models with the same questions, shards and settings",
            )
        columns = ([float(row[key]) for row in rows] for key in ("score", "weight") for rows in (a, b))
        out[metric] = paired_difference(*columns, seed=seed, resamples=resamples)
    return out

"""Histograms of signals with the limits that rules put on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data import measure, parquet, records
from caravan.report.plots import Histogram
from caravan.store import Artefact

BINS = 36


def histograms(signals: Artefact, rules: Mapping[str, Mapping[str, Any]]) -> dict[str, Histogram]:
    """Rule -> documents by the value of its signal, with its limits. Values beyond what the picture shows are
    in the outermost bars. Rules on words or draws have no histogram."""
    wanted = {name: _limits(str(rule.get("limit", ""))) for name, rule in rules.items()}
    quantiles = signals.facts.get("quantiles", {})
    plans = {
        name: _edges(quantiles[rules[name]["signal"]], [limit for _, limit in limits])
        for name, limits in wanted.items()
        if limits and rules[name].get("signal") in quantiles
    }
    plans = {n: (_aligned(edges, wanted[n]), log) for n, (edges, log) in plans.items()}
    counted = _counted(signals, {n: (rules[n], *plan) for n, plan in plans.items()})
    out = {}
    for name, (edges, log) in plans.items():
        rule = rules[name]
        note = (
            f"{rule['signal']}: {rule.get('broken', 0):,} break it, {rule.get('removed', 0):,} removed first"
        )
        out[name] = Histogram(
            name=name, note=note, edges=edges, counts=counted[name], limits=wanted[name], log=log
        )
    return out


def _limits(text: str) -> tuple[tuple[str, float], ...]:
    """("at least", 50.0), ... of "at least 50, at most 100"."""
    out = []
    for part in text.split(", "):
        words, _, value = part.rpartition(" ")
        try:
            if words in ("at least", "at most", "more than", "less than"):
                out.append((words, float(value)))
        except ValueError:
            continue
    return tuple((words, float(np.float32(limit))) for words, limit in out)


def _aligned(edges: tuple[float, ...], limits: Iterable[tuple[str, float]]) -> tuple[float, ...]:
    """Edges moved so that no bar has values on both sides of a limit; a value at a limit is on its side."""
    out = list(edges)
    for words, limit in limits:
        if edges[0] <= limit < edges[-1]:
            over = words in ("at most", "more than")
            edge = float(np.nextafter(np.float32(limit), np.float32(np.inf))) if over else limit
            near = min(range(1, len(edges) - 1), key=lambda k: abs(edges[k] - limit))
            out[near] = edge
    return tuple(sorted(out))


def _edges(quantiles: Mapping[str, float], limits: list[float]) -> tuple[tuple[float, ...], bool]:
    """Edges over what is common and the limits near it; in equal ratios where values span more than a
    hundredfold."""
    low, high = float(quantiles["p1"]), float(quantiles["p99"])
    near = [x for x in limits if x <= 3 * max(high, 1e-9) or x <= 1]
    low, high = min([low, *near]), max([high, *near])
    if high <= low:
        high = low + (abs(low) or 1.0)
    if low > 0 and high > 100 * low:
        low, high = low / 1.15, high * 1.15
        return tuple(low * (high / low) ** (k / BINS) for k in range(BINS + 1)), True
    pad = (high - low) * 0.04
    low = max(0.0, low - pad) if low >= 0 else low - pad
    return tuple(low + (high + pad - low) * k / BINS for k in range(BINS + 1)), False


def _counted(
    signals: Artefact, plans: Mapping[str, tuple[Mapping[str, Any], tuple[float, ...], bool]]
) -> dict[str, tuple[int, ...]]:
    totals = {name: np.zeros(BINS, np.int64) for name in plans}
    for split in records.SPLITS:
        path = signals / f"{split}.parquet"
        if not plans or not path.is_file():
            continue
        columns = sorted({str(rule["signal"]) for rule, *_ in plans.values()} | {"lang"})
        for batch in itertools.chain.from_iterable(_batches(part, columns) for part in measure.parts(path)):
            table = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}
            for name, (rule, edges, _) in plans.items():
                values = table[rule["signal"]].astype(np.float64)
                mask = ~np.isnan(values)
                if rule.get("languages") and "lang" in table:
                    mask &= np.isin(table["lang"].astype(str), rule["languages"])
                if rule.get("skip_languages") and "lang" in table:
                    mask &= ~np.isin(table["lang"].astype(str), rule["skip_languages"])
                inside = np.clip(values[mask], edges[0], edges[-1])
                totals[name] += np.histogram(inside, bins=np.array(edges))[0]
    return {name: tuple(int(x) for x in counts) for name, counts in totals.items()}


def _batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Those of the columns that a Parquet file has."""
    file = parquet.opened(path)
    return iter(file.iter_batches(columns=[c for c in columns if c in file.schema_arrow.names]))

"""What the server counts, in Prometheus' text format (version 0.0.4), without a client library.

    requests_total{model_name, route, outcome}     how: stop, length, abort, error, or the status of a refusal
    prompt_tokens_total, generation_tokens_total   tokens in and out
    num_requests_running, num_requests_waiting     choices in the engine and in the queue, now
    time_to_first_token_seconds                    histogram: asked to first token, the queue included
    time_per_output_token_seconds                  histogram: between two pieces of one answer, per token
    request_queue_time_seconds, e2e_request_latency_seconds
    prefix_cache_queries_total, prefix_cache_hits_total   prompt tokens, and those found in the cache
    kv_cache_usage_perc, num_preemptions_total     share of cache blocks in use; sequences computed again

All begin with `caravan_`; the rest of the names is vLLM's, so that its dashboards need one replacement.
Observations come from the event loop and from the engines' threads; one lock orders them.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Protocol

PREFIX = "caravan_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
Labels = tuple[tuple[str, str], ...]

COUNTERS = {
    "requests": "Requests that ended, by how.",
    "prompt_tokens": "Prompt tokens of admitted requests.",
    "generation_tokens": "Generated tokens.",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From asking to the first token.", SECONDS),
    "time_per_output_token_seconds": ("Between tokens of one answer.", SECONDS_PER_TOKEN),
    "request_queue_time_seconds": ("Waiting before the engine took the request.", SECONDS),
    "e2e_request_latency_seconds": ("From asking to the end of the answer.", SECONDS),
}
ENGINE = {
    "preemptions": ("num_preemptions_total", "counter", "Sequences that lost their cache and began again."),
    "prompt_tokens": (
        "prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
    ),
    "cached_tokens": ("prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache."),
}


class Source(Protocol):
    """What is asked at every reading: a model's worker."""

    def stats(self) -> dict[str, int]: ...

    def engine_stats(self) -> dict[str, int]: ...


class Metrics:
    """Counters and histograms of one server, each with the labels it is first counted with."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, float]] = {name: {} for name in COUNTERS}
        self._histograms: dict[str, dict[Labels, _Histogram]] = {name: {} for name in HISTOGRAMS}

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter of COUNTERS."""
        key = tuple(labels.items())
        with self._lock:
            counts = self._counts[name]
            counts[key] = counts.get(key, 0) + by

    def observe(self, name: str, value: float, times: int = 1, **labels: str) -> None:
        """`times` observations of `value` in a histogram of HISTOGRAMS."""
        key = tuple(labels.items())
        with self._lock:
            cells = self._histograms[name]
            if key not in cells:
                cells[key] = _Histogram(HISTOGRAMS[name][1])
            cells[key].add(value, times)

    def text(self, sources: Mapping[str, Source]) -> str:
        """The page a Prometheus server reads. `sources`: model name -> worker, asked now."""
        with self._lock:
            lines = [*self._counter_lines(), *self._histogram_lines()]
        lines += _gauge_lines(sources)
        return "\n".join(lines) + "\n"

    def _counter_lines(self) -> Iterator[str]:
        for name, words in COUNTERS.items():
            yield from _head(f"{name}_total", "counter", words)
            for labels, value in self._counts[name].items():
                yield _line(f"{name}_total", labels, value)

    def _histogram_lines(self) -> Iterator[str]:
        for name, (words, _) in HISTOGRAMS.items():
            yield from _head(name, "histogram", words)
            for labels, histogram in self._histograms[name].items():
                for edge, count in histogram.cumulated():
                    yield _line(f"{name}_bucket", (*labels, ("le", edge)), count)
                yield _line(f"{name}_sum", labels, histogram.sum)
                yield _line(f"{name}_count", labels, histogram.count)


class _Histogram:
    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int) -> None:
        self.counts[bisect_left(self.edges, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulated(self) -> Iterator[tuple[str, int]]:
        """(upper edge, observations up to it)."""
        seen = 0
        for edge, count in zip([*map(str, self.edges), "+Inf"], self.counts, strict=True):
            seen += count
            yield edge, seen


def _gauge_lines(sources: Mapping[str, Source]) -> list[str]:
    now = {name: source.stats() for name, source in sources.items()}
    engines = {name: source.engine_stats() for name, source in sources.items()}
    lines: list[str] = []
    for key, words in (("running", "Choices being computed."), ("waiting", "Choices in the queue.")):
        lines += _head(f"num_requests_{key}", "gauge", words)
        lines += [_line(f"num_requests_{key}", (("model_name", n),), s[key]) for n, s in now.items()]
    for key, (name, kind, words) in ENGINE.items():
        lines += _head(name, kind, words)
        lines += [_line(name, (("model_name", n),), s[key]) for n, s in engines.items() if key in s]
    lines += _head("kv_cache_usage_perc", "gauge", "Share of the cache's blocks in use, 0 to 1.")
    for n, s in engines.items():
        if s.get("blocks"):
            lines.append(_line("kv_cache_usage_perc", (("model_name", n),), s["blocks_owned"] / s["blocks"]))
    return lines


def _head(name: str, kind: str, words: str) -> list[str]:
    return [f"# HELP {PREFIX}{name} {words}", f"# TYPE {PREFIX}{name} {kind}"]


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    shown = str(int(value)) if value == int(value) else repr(float(value))
    return f"{PREFIX}{name}{{{inside}}} {shown}" if inside else f"{PREFIX}{name} {shown}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

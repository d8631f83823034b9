"""What the passport says about each artefact, read from manifests and files. Anything missing is left out."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caravan.store import Artefact

CURVES_FIRST = (
    "loss",
    "bits_per_byte",
    "score",
    "reward",
    "kl",
    "accuracy",
    "margin",
    "length",
    "entropy",
    "lr",
)
MOST_CURVES = 9
MOST_PROMPTS = 12
SAMPLE_LENGTH = 600
"""Characters of a text shown."""


@dataclass(frozen=True, kw_only=True)
class Removed:
    """Rows of one stage that went no further."""

    label: str
    rule: str
    count: int
    example: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with what each model answered."""

    task: str
    prompt: list[tuple[str, str]]
    reference: str
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """(model, answer, scores)."""


def key_of(art: Artefact) -> str:
    """`kind/id`, as manifests name inputs."""
    return f"{art.kind}/{art.id}"


def label(art: Artefact) -> str:
    """What people call it: the algorithm or width where a stage has several, else the stage."""
    config = art.manifest.get("config", {})
    if config.get("algo"):
        return str(config["algo"])
    if art.manifest.get("stage") == "add":
        return Path(str(art.manifest.get("source", art.kind))).name
    if "bits" in config:
        return f"int{config['bits']}"
    return str(art.manifest.get("stage", art.kind))


def labels(artefacts: Sequence[Artefact]) -> dict[str, str]:
    """A name for each artefact; evaluations by the model they measured, doubles told apart by their id."""
    names = {key_of(art): label(art) for art in artefacts}
    for art in artefacts:
        measured = names.get(art.inputs.get("model", ""))
        if art.kind == "evaluation" and measured:
            names[key_of(art)] = f"evaluate {measured}"
    kinds = [(name, key.partition("/")[0]) for key, name in names.items()]
    return {
        key: f"{name} {key.partition('/')[2][:4]}" if kinds.count((name, key.partition("/")[0])) > 1 else name
        for key, name in names.items()
    }


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a JSONL file; none if it is absent, and an unreadable line is skipped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def curves(art: Artefact) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Chart name -> line name -> (step, value): every number of metrics.jsonl that moves, held-out beside
    training."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for n, row in enumerate(rows(art / "metrics.jsonl")):
        step = float(row.get("step", n))
        for name, value in _numbers(row):
            if name != "step":
                lines.setdefault(name, []).append((step, value))
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, points in lines.items():
        held_out = name.startswith("eval.")
        chart = name.removeprefix("eval.")
        if len(points) > 1 and (len({value for _, value in points}) > 1):
            charts.setdefault(chart, {})["held-out" if held_out else "training"] = points
    order = {name: n for n, name in enumerate(CURVES_FIRST)}
    chosen = sorted(charts, key=lambda name: (order.get(name, len(order)), name))[:MOST_CURVES]
    return {name: charts[name] for name in chosen}


def _numbers(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield prefix + name, float(value)


def removed(artefacts: Sequence[Artefact], names: Mapping[str, str]) -> list[Removed]:
    """Documents and conversations that went no further: by which rule, how many, and one of them."""
    out = []
    for art in artefacts:
        name, facts = names[key_of(art)], art.facts
        by_rule = facts.get("removed", {})
        shown = facts.get("removed_samples", {})
        if isinstance(by_rule, Mapping):
            for rule, count in by_rule.items():
                example = shown.get(rule, [""]) if isinstance(shown, Mapping) else [""]
                first = (example[0] if isinstance(example, list) and example else example) or ""
                out.append(
                    Removed(label=name, rule=str(rule), count=int(count), example=clip(text_of(first), 200))
                )
        elif by_rule:  # of chats: the list itself says more
            counts: Counter[str] = Counter()
            first_of: dict[str, Mapping[str, Any]] = {}
            for row in rows(art / "removed.jsonl"):
                counts[rule := str(row.get("rule", ""))] += 1
                first_of.setdefault(rule, row)
            out += [
                Removed(label=name, rule=rule, count=count, example=clip(_why(first_of[rule]), 200))
                for rule, count in counts.items()
            ]
        if count := facts.get("quarantined"):
            first = (facts.get("quarantined_first") or [""])[0]
            out.append(
                Removed(label=name, rule="malformed", count=int(count), example=clip(text_of(first), 200))
            )
    return sorted(out, key=lambda row: (-row.count, row.label, row.rule))


def _why(row: Mapping[str, Any]) -> str:
    """A line of a removal list in words."""
    return f"{row.get('id', '')} {row.get('reason', '')}: {text_of(row.get('text', ''))}"


def samples(evaluations: Sequence[Artefact], names: Mapping[str, str]) -> list[Sample]:
    """The same questions to every model, in the order of the road; those most models answered come first."""
    found: dict[tuple[str, str], Sample] = {}
    for art in evaluations:
        model = names[key_of(art)].removeprefix("evaluate ")
        for row in rows(art / "samples.jsonl"):
            key = (str(row.get("task", "")), str(row.get("id", "")))
            if key not in found:
                prompt = [(str(m.get("role", "")), clip(str(m.get("content", "")))) for m in messages_of(row)]
                found[key] = Sample(task=key[0], prompt=prompt, reference=clip(text_of(row.get("reference"))))
            scores = ", ".join(
                f"{k.replace('_', ' ')} {_score(v)}" for k, v in _numbers(row.get("scores") or {})
            )
            found[key].answers.append((model, clip(text_of(row.get("answer"))), scores))
    best = sorted(found.values(), key=lambda sample: -len(sample.answers))
    by_task: dict[str, list[Sample]] = {}
    for sample in best:
        by_task.setdefault(sample.task, []).append(sample)
    turns = [group[n] for n in range(MOST_PROMPTS) for group in by_task.values() if n < len(group)]
    return turns[:MOST_PROMPTS]


def messages_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The prompt as messages; a plain text counts as the user's."""
    prompt = row.get("prompt", "")
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": str(prompt)}]


def _score(value: float) -> str:
    return f"{value:.3g}"


def scores_table(evaluations: Sequence[Artefact], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row per evaluation from its scores.json: `model`, then each metric with its interval."""
    table = []
    for art in evaluations:
        path = art / "scores.json"
        if path.is_file():
            scores = json.loads(path.read_text(encoding="utf-8"))
            table.append({"model": names[key_of(art)].removeprefix("evaluate "), **scores})
    return table


def text_of(value: Any) -> str:
    """Any plain value as text."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def clip(text: str, most: int = SAMPLE_LENGTH) -> str:
    """Not longer than `most` characters; a run of line breaks, as untrained models write them, as its
    count."""
    text = re.sub(r"\n{3,}", lambda run: f"\n[{len(run.group())} line breaks]\n", text)
    return text if len(text) <= most else text[:most].rstrip() + " …"


def peak_bytes(art: Artefact) -> int:
    """Largest memory any process or device of the stage took, bytes; 0 when it was not recorded."""
    found = [v for k, v in art.manifest.items() if k.startswith("peak_memory") and isinstance(v, int)]
    return max(found, default=0)

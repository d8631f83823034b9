"""Read preferences of any known format (pairs or rankings), check and deduplicate them, keep a part out of
training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caravan.data import formats, records
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Ranking, UserError

INPUTS = {"raw": "raw"}
OUTPUT = "preferences"
USES: dict[str, str] = {}
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    heldout_share: float = 0.05
    """Share kept out of training, by a hash of the prompt; `"split"` in a record wins."""
    max_chars: int = 200_000
    """Rankings with a longer prompt and answer go to quarantine (characters)."""
    record_bytes: int = 16 << 20
    """Longer lines are not read but put into quarantine (bytes)."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    root = inputs["raw"].path
    quarantine = records.Quarantine(out / "quarantine.jsonl", root, rt.strict)
    limits = formats.Limits(record_bytes=cfg.record_bytes)
    chosen: dict[str, str] = {}
    spool = records.Spool(rt.work / "preferences.jsonl")
    known: set[str] = set()
    prompts: set[str] = set()
    counts: Counter[str] = Counter()
    for found in formats.read_all(root, "preferences", quarantine, limits, chosen):
        assert isinstance(found.value, Ranking)
        ranking = found.value
        counts["read"] += 1
        if problem := _problem(ranking, cfg.max_chars):
            quarantine(formats.Problem(root / found.file, found.place, problem, _shown(ranking)))
            continue
        key = records.digest_of(*(t for m in ranking.prompt for t in (m.role, m.content)))
        digest = records.digest_of(key, *ranking.responses, *map(str, ranking.ranks))
        if digest in known:
            counts["duplicates"] += 1
            continue
        known.add(digest)
        prompts.add(key)
        ranking = replace(ranking, id=ranking.id or digest[:16])
        spool.add(records.dump(ranking), key, found.split)
        _count(ranking, counts)
        rt.report(counts["read"], 0, "rankings")
    if not len(spool):
        facts = quarantine.facts()
        raise UserError(
            f"no preference is left: {counts['read']} read, {quarantine.count} quarantined",
            (facts["quarantined_first"] or ["the files hold no records"])[0],
        )
    split = records.write_splits(out, spool, cfg.heldout_share)
    return {
        "rankings": len(spool),
        **split,
        "prompts": len(prompts),
        "pairs": counts["pairs"],
        "kwise": counts["kwise"],
        "duplicates": counts["duplicates"],
        "better_is_longer": round(counts["better_is_longer"] / max(1, counts["pairs"]), 4),
        "files": len(chosen),
        "formats": dict(sorted(Counter(chosen.values()).items())),
        **quarantine.facts(),
    }


def _problem(ranking: Ranking, max_chars: int) -> str | None:
    """What was expected of a ranking and is not there."""
    if not ranking.prompt or not any(m.role == "user" for m in ranking.prompt):
        return "a question before the answers"
    if any(m.role == "system" for m in ranking.prompt[1:]):
        return "a system turn at the beginning only"
    if len(ranking.responses) < 2:
        return "two answers or more"
    for k, response in enumerate(ranking.responses):
        if not response.strip():
            return f"answers with a text (answer {k + 1}, rank {ranking.ranks[k]}, is empty)"
    if len(set(ranking.ranks)) < 2:
        return "answers of which one is better than another"
    if any(p.chosen == p.rejected for p in ranking.pairs()):
        return "different texts where one is better than the other"
    size = sum(len(m.content) for m in ranking.prompt) + max(map(len, ranking.responses))
    if size > max_chars:
        return f"at most {max_chars:,} characters (there are {size:,})"
    return None


def _count(ranking: Ranking, counts: Counter[str]) -> None:
    counts["kwise"] += len(ranking.responses) > 2
    for pair in ranking.pairs():
        counts["pairs"] += 1
        counts["better_is_longer"] += len(pair.chosen) > len(pair.rejected)


def _shown(ranking: Ranking) -> str:
    return " | ".join(
        [
            *(f"{m.role}: {m.content[:40]}" for m in ranking.prompt),
            *(f"answer: {r[:40]}" for r in ranking.responses),
        ]
    )[:200]

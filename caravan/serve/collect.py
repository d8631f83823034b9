"""Turn what people thought of the answers into a preferences artefact, for the next generation.

    caravan feedback
    caravan reward --base model/... --data preferences/...

Thumbs up against thumbs down on the same prompt, and choices between an answer and its regeneration, become
rankings. A thumb without a counterpart is no comparison: it is counted, said, and not used.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caravan.data.records import dump
from caravan.types import Ranking, UserError

if TYPE_CHECKING:
    from caravan.stage import Runtime
    from caravan.store import Store


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where the feedback is."""

    database: str = ""
    """SQLAlchemy URL of the feedback store; empty for feedback.db in the store."""
    jsonl: str = ""
    """Also write the rankings to this file, one per line; empty for none."""


def main(cfg: Config, store: Store, rt: Runtime) -> int:
    """Print the reference of the preferences artefact. UserError when there is nothing to compare."""
    from caravan import stage
    from caravan.serve.feedback import FeedbackStore
    from caravan.serve.run import default_url

    if not cfg.database and not (store.root / "feedback.db").is_file():
        raise UserError("there is no feedback yet", "chat on the page of `caravan serve`, and use the thumbs")
    source = FeedbackStore(cfg.database or default_url(store.root))
    try:
        collected = source.collect()
    finally:
        source.close()
    print(sentence(collected.counts), file=sys.stderr)
    if not collected.rankings:
        raise UserError(
            "no two answers to the same prompt can be compared yet",
            "regenerate an answer and pick the better one, or give both a thumb",
        )
    text = lines(collected.rankings)
    if cfg.jsonl:
        Path(cfg.jsonl).expanduser().write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "feedback.jsonl"  # a fixed name: it is part of the content's id
        path.write_text(text, encoding="utf-8")
        raw = store.add(path, kind="raw")
    module = stage.load("stages", "preferences")
    made = stage.execute(store, "preferences", module.Config(), {"raw": raw}, rt)
    print(made.ref)
    return 0


def lines(rankings: list[Ranking]) -> str:
    """One JSON object per ranking (prompt, responses, ranks), the same text for the same feedback."""
    return "".join(
        json.dumps(json.loads(dump(ranking)), ensure_ascii=False, sort_keys=True) + "\n"
        for ranking in rankings
    )


def sentence(counts: dict[str, int]) -> str:
    """What was found and what of it is of use, in words."""
    alone = counts["votes_without_counterpart"]
    return (
        f"{counts['votes']} votes and {counts['choices']} choices on {counts['answers']} answers: "
        f"{counts['rankings']} rankings, {counts['pairs']} pairs; "
        f"{alone} votes without a counterpart not used, "
        f"{counts['ties']} ties, {counts['same_text_both_ways']} texts voted both ways"
    )

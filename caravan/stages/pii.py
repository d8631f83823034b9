"""Find personal data and secrets in a corpus; replace them, or drop the documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caravan.data import pii, rewrite, steps
from caravan.data.clean import Rejection
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Document, UserError

INPUTS = {"corpus": "corpus"}
OUTPUT = "corpus"
USES: dict[str, str] = {}
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    kinds: tuple[str, ...] = ("auto",)
    """What to look for: secret, cn_id, iban, credit_card, email, us_ssn, ip, phone, address; auto is all."""
    action: str = "replace"
    """replace writes [EMAIL] in place of a span; pseudonym writes [EMAIL_1f2e3d4c], equal for equal values;
    drop removes the document."""
    most: int = 0
    """Documents with more spans than this are removed whatever the action; 0 sets no limit."""
    salt: str = ""
    """Keeps pseudonyms from being guessed back: without it they cannot be made."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    if cfg.action not in pii.ACTIONS:
        raise UserError(f"there is no action `{cfg.action}`", f"there are: {', '.join(pii.ACTIONS)}")
    if cfg.action == "pseudonym" and not cfg.salt:
        raise UserError(
            "pseudonyms need --salt", "any secret string; the same one gives the same pseudonyms again"
        )
    find = _Find(pii.chosen(cfg.kinds), cfg.action, cfg.salt)
    spans: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    done, corpus = 0, inputs["corpus"]
    batches = steps.batches(rewrite.read(corpus.path), lambda row: len(row[1].text), 1 << 18)
    with rewrite.Rewrite(out) as files:
        for batch in steps.mapped(find, batches, steps.workers(rt.threads), rt.engine):
            for split, document, text, found in batch:
                spans.update(found)
                documents.update(found.keys())
                count = sum(found.values())
                if (count and cfg.action == "drop") or count > (cfg.most or count):
                    what = ", ".join(f"{n} {kind}" for kind, n in sorted(found.items()))
                    files.remove(document, Rejection("personal_data", what), shown=text)
                else:
                    files.keep(split, replace(document, text=text), document)
            done += len(batch)
            rt.report(done, int(corpus.facts.get("documents_out", 0)), "documents")
    return {
        **files.facts(),
        "spans": dict(sorted(spans.items())),
        "documents_with": dict(sorted(documents.items())),
    }


@dataclass(frozen=True)
class _Find:
    """batch -> (split, document, text without what was found, spans by kind). Never the values."""

    kinds: tuple[str, ...]
    action: str
    salt: str

    def __call__(
        self, batch: Sequence[tuple[str, Document]]
    ) -> list[tuple[str, Document, str, Counter[str]]]:
        put = pii.placeholder(self.salt if self.action == "pseudonym" else None)
        out = []
        found = pii.find_all([document.text for _, document in batch], self.kinds)
        for (split, document), spans in zip(batch, found, strict=True):
            text = pii.replaced(document.text, spans, put) if spans else document.text
            out.append((split, document, text, Counter(span.kind for span in spans)))
        return out

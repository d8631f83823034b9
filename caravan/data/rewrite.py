"""A corpus made from a corpus: what stays, what goes and why, and the facts about both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from caravan.data import records
from caravan.data.clean import Rejection
from caravan.types import Document, UserError


def size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text.encode("utf-8", "replace"))


def read(corpus: Path) -> Iterator[tuple[str, Document]]:
    """(split, document) of a corpus folder: train first, then held out."""
    for split in records.SPLITS:
        for document in records.read_documents(corpus / f"{split}.jsonl.zst"):
            yield split, document


class Rewrite:
    """Writes train, heldout and removed files into `out`, and counts."""

    def __init__(self, out: Path) -> None:
        self._stack = ExitStack()
        names = (*records.SPLITS, "removed")
        self._files = {
            n: self._stack.enter_context(records.packed_writer(out / f"{n}.jsonl.zst")) for n in names
        }
        (out / "quarantine.jsonl").touch()
        self.kept: Counter[str] = Counter()
        self.removed: Counter[str] = Counter()
        self._seen = self._bytes_in = 0
        self._samples: dict[str, list[str]] = {}
        self._languages: dict[str, Counter[str]] = {}

    def __enter__(self) -> Rewrite:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def keep(self, split: str, document: Document, before: Document | None = None) -> None:
        """A document stays, as it is now; `before` is what it was."""
        self._seen += 1
        self._bytes_in += size((before or document).text)
        self._files[split].write(records.dump(document))
        bytes_out = size(document.text)
        self.kept[split] += 1
        self.kept[f"{split}_bytes"] += bytes_out
        self._languages.setdefault(document.lang, Counter()).update(documents=1, bytes=bytes_out)

    def remove(self, document: Document, verdict: Rejection, shown: str | None = None, **more: Any) -> None:
        """A document goes; `more` is written beside the reason, `shown` in place of how its text begins."""
        self._seen += 1
        self._bytes_in += size(document.text)
        self.removed[verdict.rule] += 1
        text = document.text if shown is None else shown
        samples = self._samples.setdefault(verdict.rule, [])
        if len(samples) < 3:
            samples.append(f"{verdict.reason}: {text[:120]}")
        row = {
            "id": document.id, "source": document.source, "rule": verdict.rule, "reason": verdict.reason,
            "bytes": size(document.text), "text": text[:500], **more,
        }  # fmt: skip
        self._files["removed"].write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def facts(self) -> dict[str, Any]:
        """Counts by split, language and rule. Raises UserError if no training text is left."""
        if not self.kept["train"]:
            why = ", ".join(f"{n} by {rule}" for rule, n in self.removed.most_common(5))
            raise UserError(
                f"nothing is left of {self._seen} documents: {why or 'there were none to train on'}"
            )
        count = self.kept["train"] + self.kept["heldout"]
        return {
            "documents_in": self._seen,
            "documents_out": count,
            "bytes_in": self._bytes_in,
            "bytes_out": self.kept["train_bytes"] + self.kept["heldout_bytes"],
            **{k: self.kept[k] for k in ("train", "heldout", "train_bytes", "heldout_bytes")},
            "heldout_share": round(self.kept["heldout"] / count, 4),
            "languages": {k: dict(v) for k, v in sorted(self._languages.items())},
            "removed": dict(sorted(self.removed.items())),
            "removed_samples": dict(sorted(self._samples.items())),
        }

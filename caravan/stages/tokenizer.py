"""Train a byte-level BPE tokenizer on a corpus (and on conversations, if given)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.data import records
from caravan.data.tokenizer import Tokenizer, train
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import UserError

INPUTS = {"corpus": "corpus", "chats": "conversations?"}
OUTPUT = "tokenizer"
USES: dict[str, str] = {}
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab: int = 8192
    """Entries at most: 256 bytes, 4 special tokens, the rest merges."""
    min_count: int = 2
    """A pair must occur this often to be merged."""
    sample_bytes: int = 256 << 20
    """Of a larger corpus, a sample of about this size is read (bytes; chosen by a hash of each document)."""
    measure_bytes: int = 2 << 20
    """Bytes per token are measured on this much held-out text (bytes)."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    corpus, chats = inputs["corpus"], inputs.get("chats")
    rt.report(0, 0, "bytes")
    tokenizer = train(_texts(cfg, corpus, chats, rt), cfg.vocab, cfg.min_count)
    tokenizer.save(out)
    measured, used = _measure(cfg, Tokenizer.load(out), corpus, chats)
    return {
        "vocab": tokenizer.vocab_size,
        "vocab_asked": cfg.vocab,
        **measured,
        "ids_used": round(used / tokenizer.vocab_size, 4),
    }


def _texts(cfg: Config, corpus: Artefact, chats: Artefact | None, rt: Runtime) -> Iterator[str]:
    total = max(1, int(corpus.facts.get("train_bytes", 1)))
    share = cfg.sample_bytes / total
    done = 0
    for document in records.read_documents(corpus / "train.jsonl.zst"):
        if share >= 1 or records.share_of(records.digest_of("sample", document.id, document.text)) < share:
            yield document.text
        done += len(document.text.encode("utf-8", "replace"))
        rt.report(done, total, "bytes")
    if chats is not None:
        yield from records.texts_of(records.read_conversations(chats / "train.jsonl"))


def _measure(
    cfg: Config, tokenizer: Tokenizer, corpus: Artefact, chats: Artefact | None
) -> tuple[dict[str, Any], int]:
    """Bytes per token, overall, per language and on chats; how many ids occur. Checks that text comes back
    whole."""
    sizes: dict[str, list[int]] = {}
    used: set[int] = set()

    def take(label: str, text: str) -> int:
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            raise UserError(f"the tokenizer does not give back its text: {text[:80]!r}")
        used.update(ids)
        size = len(text.encode())
        entry = sizes.setdefault(label, [0, 0])
        entry[0] += size
        entry[1] += len(ids)
        return size

    left = cfg.measure_bytes
    for split in ("heldout", "train"):
        for document in records.read_documents(corpus / f"{split}.jsonl.zst"):
            if left <= 0:
                break
            left -= take(document.lang or "none", document.text)
    overall = _ratio([sum(s[k] for s in sizes.values()) for k in (0, 1)])
    facts: dict[str, Any] = {
        "bytes_per_token": overall,
        "bytes_per_token_by_language": {k: _ratio(v) for k, v in sorted(sizes.items())},
    }
    if chats is not None:
        left = cfg.measure_bytes
        sizes.clear()
        for text in records.texts_of(records.read_conversations(chats / "train.jsonl")):
            if left <= 0:
                break
            left -= take("chats", text)
        facts["bytes_per_token_of_chats"] = _ratio(sizes.get("chats", [0, 0]))
    return facts, len(used)


def _ratio(sizes: list[int]) -> float:
    return round(sizes[0] / sizes[1], 3) if sizes[1] else 0.0

"""Turn a corpus into token shards: flat ids, document ends, and a page that says what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caravan.data import records, shards
from caravan.data.tokenizer import Tokenizer, copy_files
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import UserError

INPUTS = {"corpus": "corpus", "tokenizer": "tokenizer|model"}
OUTPUT = "shards"
USES: dict[str, str] = {}
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    max_tokens: int = 0
    """Stop after about this many training tokens; 0 takes the whole corpus."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    corpus, folder = inputs["corpus"], inputs["tokenizer"].path
    tokenizer = Tokenizer.load(folder)
    total = int(corpus.facts.get("documents_out", 0))
    done = 0

    def encoded(split: str) -> Iterator[tuple[list[int], int]]:
        nonlocal done
        tokens = 0
        texts = (d.text for d in records.read_documents(corpus / f"{split}.jsonl.zst"))
        for ids, size in shards.encode_documents(texts, tokenizer):
            yield ids, size
            done, tokens = done + 1, tokens + len(ids)
            rt.report(done, total, "documents")
            if split == "train" and cfg.max_tokens and tokens >= cfg.max_tokens:
                return

    page = shards.write(out, {s: encoded(s) for s in records.SPLITS}, tokenizer.vocab_size)
    if not page["splits"]["train"]["tokens"]:
        raise UserError("the corpus has no training text", "look at the facts of the corpus")
    copy_files(folder, out / "tokenizer")
    tokenizer.save(out / "tokenizer")
    facts: dict[str, Any] = {"vocab": tokenizer.vocab_size, "dtype": page["dtype"]}
    for split, about in page["splits"].items():
        facts[f"{split}_tokens"], facts[f"{split}_documents"] = about["tokens"], about["documents"]
        facts[f"{split}_bytes_per_token"] = round(about["utf8_bytes"] / max(1, about["tokens"]), 3)
    return facts

"""Train a tokenizer on a corpus (and on conversations), or extend or prune one that exists.

Without `base` a new vocabulary is trained. With `base` its vocabulary grows by what the corpus needs, or
shrinks to what the corpus uses; then `kept_ids.json` lists the old id of each new one, so that rows of
embeddings can follow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from caravan.data import records
from caravan.data.tokenizer import Tokenizer, train
from caravan.data.vocabulary.report import Report
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import Document, UserError

INPUTS = {"corpus": "corpus", "chats": "conversations?", "base": "tokenizer|model?"}
OUTPUT = "tokenizer"
USES: dict[str, str] = {}
VERSION = 3
MEASURED_CHARS = 1 << 14
"""Of a corpus too large to be measured whole, this much of a document at most (characters): otherwise a few
books, of one language perhaps, would be all that is looked at."""
BY_LANGUAGE = ("bytes_per_token", "tokens_per_word", "tokens_per_character", "whole")


@dataclass(frozen=True, kw_only=True)
class Config:
    kind: Literal["bpe", "sentencepiece", "unigram", "bytes"] = "bpe"
    """Of a new vocabulary: bpe over bytes; SentencePiece's BPE; its unigram model; or bytes, untrained."""
    vocab: int = 8192
    """Entries at most: bytes, special tokens, the rest merges. With `base`: of the extended vocabulary."""
    change: Literal["extend", "prune"] = "extend"
    """What becomes of `base`: more entries for what the corpus holds, or only the entries it uses."""
    coverage: float = 0.9995
    """Share of all characters that get an entry of their own (sentencepiece, unigram, extend)."""
    template: str = ""
    """Built-in chat template, by name; of a new vocabulary, its tokens are added. Empty: ChatML, or what
    `base` has."""
    special: tuple[str, ...] = ()
    """Further special tokens of a new vocabulary, such as <think> </think>."""
    min_count: int = 2
    """A pair must occur this often to be merged."""
    sample_bytes: int = 256 << 20
    """Of a larger corpus, a sample of about this size is read (bytes; chosen by a hash of each document)."""
    measure_bytes: int = 2 << 20
    """Bytes per token are measured on this much held-out text (bytes)."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    corpus, chats = inputs["corpus"], inputs.get("chats")
    rt.report(0, 0, "bytes")
    texts = _texts(cfg, corpus, chats, rt)
    about: dict[str, Any] = {}
    if "base" in inputs:
        if cfg.special:
            raise UserError("--special is for new vocabularies", "leave it out, or leave --base out")
        base = Tokenizer.load(inputs["base"].path, cfg.template or None)
        tokenizer, about = _changed(cfg, base, texts, out)
    else:
        chat = cfg.template or "chatml"
        if chat == "encoder" or not all(t.strip() == t and t for t in cfg.special):
            what = "the encoder template is" if chat == "encoder" else "special tokens with white space are"
            raise UserError(f"{what} not for a new vocabulary", "see docs/tokenizers.md for those that are")
        tokenizer = train(
            texts, cfg.vocab, cfg.min_count, cfg.kind, cfg.coverage, chat=chat, special=cfg.special
        )
    tokenizer.save(out)
    strict = "base" not in inputs
    measured, used = _measure(cfg, Tokenizer.load(out), corpus, chats, strict)
    return {
        "vocab": tokenizer.vocab_size,
        "vocab_asked": cfg.vocab,
        "algorithm": tokenizer.kind,
        "split": tokenizer.split_name,
        **about,
        **measured,
        "ids_used": round(used / tokenizer.vocab_size, 4),
    }


def _changed(
    cfg: Config, base: Tokenizer, texts: Iterator[str], out: Path
) -> tuple[Tokenizer, dict[str, Any]]:
    """The base, extended or pruned, and what to say about it."""
    if cfg.change == "prune":
        made, kept = base.pruned(texts)
        (out / "kept_ids.json").write_text(json.dumps(kept), encoding="utf-8")
        return made, {"vocab_of_base": base.vocab_size}
    more = cfg.vocab - base.vocab_size
    if more <= 0:
        raise UserError(
            f"the base has {base.vocab_size} entries already: there is no room for more in {cfg.vocab}",
            f"use --vocab {base.vocab_size + 8192} or so, or --change prune",
        )
    made = base.extended(texts, more, cfg.min_count, cfg.coverage)
    return made, {"vocab_of_base": base.vocab_size, "added": made.vocab_size - base.vocab_size}


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
    rt.report(0, 0, "all text read; learning from it")


def _measure(
    cfg: Config, tokenizer: Tokenizer, corpus: Artefact, chats: Artefact | None, strict: bool
) -> tuple[dict[str, Any], int]:
    """What text costs, overall, per language, per script and on chats; how many ids occur. Checks that text
    comes back whole; `strict`: it must."""
    used: set[int] = set()
    report, of_chats = (Report(tokenizer.bytes_of, tokenizer.unknown) for _ in range(2))
    changed = 0
    left = cfg.measure_bytes

    def take(into: Report, label: str, text: str) -> None:
        nonlocal changed, left
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            changed += 1
            if strict and "\u2581" not in text:
                raise UserError(f"the tokenizer does not give back its text: {text[:80]!r}")
        used.update(ids)
        into.add(text, ids, label)
        left -= len(text.encode())

    for split in ("heldout", "train"):
        share = left / max(1, int(corpus.facts.get(f"{split}_bytes", 1)))
        for document in records.read_documents(corpus / f"{split}.jsonl.zst"):
            if left <= 0:
                break
            if text := _sampled(document, share):
                take(report, document.lang, text)
    languages = report.by_language()
    facts: dict[str, Any] = {
        "bytes_per_token": report.bytes_per_token(),
        **{f"{what}_by_language": {k: v[what] for k, v in languages.items()} for what in BY_LANGUAGE},
        "by_script": report.by_script(),
        "unknown": report.unknown(),
        "texts_changed": changed,
    }
    if chats is not None:
        left = cfg.measure_bytes
        for text in records.texts_of(records.read_conversations(chats / "train.jsonl")):
            if left <= 0:
                break
            take(of_chats, "chats", text)
        facts["bytes_per_token_of_chats"] = of_chats.bytes_per_token()
    return facts, len(used)


def _sampled(document: Document, share: float) -> str:
    """The part of a document that is measured: all of it if there is room for everything (`share` >= 1), else
    from its middle or nothing, so that every language has its share of what is measured."""
    if share >= 1:
        return document.text
    size = min(len(document.text), MEASURED_CHARS)
    chance = share * len(document.text) / max(1, size)
    if records.share_of(records.digest_of("measured", document.id, document.text)) >= chance:
        return ""
    start = (len(document.text) - size) // 2
    return document.text[start : start + size]

"""Turn a corpus, or token files of other programs, into token shards: flat ids, document ends, and a page
that says what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from caravan.data import pool, records, shards
from caravan.data.foreign import Importer
from caravan.data.shardio import megatron
from caravan.data.shards import Block, Shards
from caravan.data.tokenizer import Tokenizer, copy_files
from caravan.stage import Runtime
from caravan.store import Artefact
from caravan.types import UserError

INPUTS = {"corpus": "corpus?", "raw": "raw?", "tokenizer": "tokenizer|model"}
OUTPUT = "shards"
USES = {"format": "data/shardio"}
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    max_tokens: int = 0
    """Stop after about this many training tokens; 0 takes all."""
    languages: tuple[str, ...] = ()
    """Documents of these languages only; empty takes all. Shards per language can be mixed by pretrain."""
    format: str = "auto"
    """Of token files given as --raw: megatron, datatrove, llmc, olmo, nanogpt; auto looks at each file."""
    dtype: Literal["auto", "uint16", "uint32", "int32", "int64"] = "auto"
    """Of token files that do not say theirs (nanoGPT, OLMo)."""
    heldout_share: float = 0.02
    """Of the documents of token files none of which is called validation or test data."""
    write_megatron: bool = False
    """Also write megatron/train.bin and .idx, and heldout, for Megatron-LM."""


def run(cfg: Config, inputs: Mapping[str, Artefact], out: Path, rt: Runtime) -> dict[str, Any]:
    folder = inputs["tokenizer"].path
    tok = Tokenizer.load(folder)
    facts: dict[str, Any] = {"vocab": tok.vocab_size}
    copy_files(folder, out / "tokenizer")
    tok.save(out / "tokenizer")
    about: dict[str, Any] = {"eos": tok.eos, "bos": tok.bos}
    about["tokenizer_sha256"] = hashlib.sha256(
        (out / "tokenizer" / "tokenizer.json").read_bytes()
    ).hexdigest()
    if ("corpus" in inputs) == ("raw" in inputs):
        raise UserError("shards needs one of --corpus and --raw", "text as --corpus, token files as --raw")
    if "corpus" in inputs:
        encode = shards.Encode(str(out / "tokenizer"), about["tokenizer_sha256"])
        source = _Encoded(cfg, inputs["corpus"], encode, rt)
        page = shards.write_blocks(out, _splits(cfg, source), tok.vocab_size, about)
    else:
        files = Importer(inputs["raw"].path, tok, cfg.format, cfg.dtype, cfg.heldout_share)
        if not files.chosen:
            raise UserError(
                "there are no token files", "a .bin, .npy or .ds file is wanted; text is a --corpus"
            )
        page = shards.write_blocks(out, _splits(cfg, files), tok.vocab_size, about)
        facts["formats"] = files.chosen
        facts["boundaries"] = "end-of-text ids" if files.separators else "index"
    if not page["splits"]["train"]["tokens"]:
        there = ", ".join(inputs["corpus"].facts.get("languages", {})) if "corpus" in inputs else ""
        hint = f"languages of the corpus: {there}" if cfg.languages else "look at the facts of the corpus"
        raise UserError("there is no training text", hint)
    if cfg.write_megatron:
        (out / "megatron").mkdir()
        for split in records.SPLITS:
            megatron.write(out / "megatron" / split, Shards.open(out, split).documents(), tok.vocab_size)
    facts |= {"dtype": page["dtype"], "content_sha256": page["content_sha256"]}
    for split, made in page["splits"].items():
        facts[f"{split}_tokens"], facts[f"{split}_documents"] = made["tokens"], made["documents"]
        facts[f"{split}_bytes_per_token"] = round(made["utf8_bytes"] / max(1, made["tokens"]), 3)
    return facts


class _Encoded:
    """A corpus, encoded by every core."""

    def __init__(self, cfg: Config, corpus: Artefact, encode: shards.Encode, rt: Runtime) -> None:
        self._cfg, self._corpus, self._encode, self._rt = cfg, corpus, encode, rt
        self._done = 0

    def blocks(self, split: str) -> Iterator[Block]:
        total = int(self._corpus.facts.get("documents_out", 0))
        documents = records.read_documents(self._corpus / f"{split}.jsonl.zst")
        chosen = self._cfg.languages
        texts = (d.text for d in documents if not chosen or d.lang in chosen)
        workers = pool.workers(self._rt.threads)
        for block in pool.mapped(self._encode, shards.text_chunks(texts), workers, self._rt.engine):
            self._done += len(block.lengths)
            self._rt.report(self._done, total, "documents")
            yield block


def _splits(cfg: Config, source: _Encoded | Importer) -> dict[str, Iterator[Block]]:
    return {s: _limited(source.blocks(s), cfg.max_tokens if s == "train" else 0) for s in records.SPLITS}


def _limited(blocks: Iterator[Block], most: int) -> Iterator[Block]:
    left = most
    for block in blocks:
        if not most:
            yield block
            continue
        kept = block.first(left)
        yield kept
        left -= len(kept.ids)
        if left <= 0:
            return

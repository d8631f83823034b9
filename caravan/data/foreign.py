"""Foreign token files as blocks of documents: where documents end, how many bytes they were, which are held
out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from caravan.data import records, shardio
from caravan.data.shardio import TokenFile
from caravan.data.shards import Block, check_ids
from caravan.data.tokenizer import Tokenizer

BLOCK_TOKENS = 4 << 20
"""Tokens looked at in one go: bounds memory."""


def document_ends(file: TokenFile, end_of_text: int | None) -> np.ndarray:
    """int64 [documents]: what the file says, else behind (or in front of) each end-of-text id.

    An id found in the tokens is the last resort of formats without an index: text that happens to hold it is
    cut there too.
    """
    if file.ends is not None:
        return file.ends
    total = len(file.tokens)
    ends = [np.zeros(0, np.int64)]
    for at in range(0, total if end_of_text is not None else 0, BLOCK_TOKENS):
        ends.append(np.flatnonzero(file.tokens[at : at + BLOCK_TOKENS] == end_of_text) + at)
    found = np.concatenate(ends) + (file.separator == "end")
    found = found[found > 0]
    return found if not total or (len(found) and found[-1] == total) else np.append(found, total)


class Importer:
    """All token files below a folder, split by split. `chosen`: format of each file, with the reason."""

    def __init__(self, root: Path, tok: Tokenizer, format: str, dtype: str, heldout_share: float) -> None:
        self._tok, self._dtype, self._heldout_share = tok, dtype, heldout_share
        self._files = list(shardio.find(root, format))
        self.chosen = {path.relative_to(root).as_posix(): f"{name}: {why}" for path, name, why in self._files}
        self.separators: set[str] = set()
        self._named = any(shardio.split_of(path) == "heldout" for path, _, _ in self._files)
        self._bytes_V = np.array([len(tok.bytes_of(i)) for i in range(tok.vocab_size)], np.int64)
        self._bytes_V[list(tok.special.values())] = 0

    def blocks(self, split: str) -> Iterator[Block]:
        """The documents of a split: what files say in their names; if none is named as held out, a share of
        the documents by a hash of their ids."""
        for path, name, _ in self._files:
            by_name = shardio.split_of(path)
            if self._named and (by_name or "train") != split:
                continue
            file = shardio.module(name).read(path, self._tok.vocab_size, self._dtype)
            if file.ends is None:
                self.separators.add(file.separator)
            for block in self._cut(file, path.name):
                yield block if self._named else self._chosen(block, split)

    def _cut(self, file: TokenFile, name: str) -> Iterator[Block]:
        """Blocks of whole documents, about BLOCK_TOKENS each (or one longer document) of the file `name`."""
        ends = document_ends(file, self._tok.eos)
        first = start = 0
        while first < len(ends):
            last = max(first + 1, int(np.searchsorted(ends, start + BLOCK_TOKENS, side="right")))
            stop = int(ends[last - 1])
            lengths = np.diff(ends[first:last], prepend=start)
            yield Block(file.tokens[start:stop], lengths, self._sizes(file.tokens, start, lengths, name))
            first, start = last, stop

    def _sizes(self, tokens: np.ndarray, start: int, lengths: np.ndarray, name: str) -> np.ndarray:
        """UTF-8 bytes of each document, which its tokens spell."""
        out = np.zeros(len(lengths), np.int64)
        stop = start + int(lengths.sum())
        owner_starts = start + np.cumsum(lengths) - lengths
        for at in range(start, stop, BLOCK_TOKENS):
            ids = np.asarray(tokens[at : min(stop, at + BLOCK_TOKENS)])
            check_ids(int(ids.min()), int(ids.max()), len(self._bytes_V), name)
            summed = np.concatenate([[0], np.cumsum(self._bytes_V[ids])])
            low = np.clip(owner_starts - at, 0, len(ids))
            high = np.clip(owner_starts + lengths - at, 0, len(ids))
            out += summed[high] - summed[low]
        return out

    def _chosen(self, block: Block, split: str) -> Block:
        starts = np.cumsum(block.lengths) - block.lengths
        rows = [block.ids[s : s + n] for s, n in zip(starts, block.lengths, strict=True)]
        keep = np.array([self._held_out(row) == (split == "heldout") for row in rows], bool)
        ids = block.ids[np.repeat(keep, block.lengths)]
        return Block(ids, block.lengths[keep], block.sizes[keep])

    def _held_out(self, row: np.ndarray) -> bool:
        h = hashlib.blake2b(digest_size=16)
        for at in range(0, len(row), BLOCK_TOKENS):
            h.update(row[at : at + BLOCK_TOKENS].astype("<u4").tobytes())
        return records.share_of(h.hexdigest()) < self._heldout_share

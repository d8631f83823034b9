"""Fewer entries: what a text never uses goes, and the ids close ranks.

For texts that use nothing but what was kept, the ids are the old ones under one map. Kept are the special
tokens, every byte, the entries in use, and for BPE whatever those are merged from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from caravan.data.vocabulary import cpm, merges
from caravan.types import UserError


def prune(definition: dict[str, Any], used: Iterable[int]) -> tuple[dict[str, Any], list[int]]:
    """(tokenizer.json with new ids, the old id of each new one). `used`: ids that must stay. Raises
    UserError."""
    model = definition["model"]
    kind = model.get("type", "BPE")
    if kind not in ("BPE", "Unigram", "WordPiece"):
        raise UserError(f"a {kind} vocabulary cannot be pruned")
    entries = enumerate(model["vocab"]) if kind == "Unigram" else ()
    vocab = {text: i for i, (text, _) in entries} if kind == "Unigram" else dict(model["vocab"])
    vocab |= {t["content"]: t["id"] for t in definition.get("added_tokens") or []}
    keep = set(used) | {t["id"] for t in definition.get("added_tokens") or []}
    keep |= {
        i for text, i in vocab.items() if text in merges.BYTE_OF or re.fullmatch("<0x[0-9A-F]{2}>", text)
    }
    keep |= {vocab[t] for t in (model.get("unk_token"),) if t in vocab}
    pairs = merges.pairs_of(model.get("merges") or [])
    family = cpm.family_of(definition)
    if family:
        # With the characters of what stays, so that the library still reads it (cpm.py).
        there = (text for text, i in vocab.items() if i in keep)
        keep |= {vocab[c] for text in (*cpm.WRITTEN, *there) for c in text if c in vocab}
    if kind == "Unigram":
        keep |= {i for i in (model.get("unk_id"),) if i is not None}
        # An unknown character costs a fixed amount more than the rarest entry: keep that one.
        keep.add(min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1]))
    _with_parts(keep, vocab, pairs)
    kept = sorted(keep & set(vocab.values()))
    new = {old: at for at, old in enumerate(kept)}
    changed = dict(model)
    if kind == "Unigram":
        by_id = {i: text for text, i in vocab.items()}
        rows = [list(row) for row in model["vocab"]]
        changed["vocab"] = [rows[old] if old < len(rows) else [by_id[old], 0.0] for old in kept]
        if model.get("unk_id") is not None:
            changed["unk_id"] = new[model["unk_id"]]
    else:
        changed["vocab"] = {text: new[i] for text, i in vocab.items() if i in new}
    if kind == "BPE":
        changed["merges"] = [
            [left, right]
            for left, right in pairs
            if all(vocab.get(t) in new for t in (left, right, left + right))
        ]
    if family:
        return cpm.definition(changed["vocab"], family), kept
    added = [{**t, "id": new[t["id"]]} for t in definition.get("added_tokens") or []]
    after = _renumbered(definition.get("post_processor"), new.__getitem__)
    return {**definition, "model": changed, "added_tokens": added, "post_processor": after}, kept


def _with_parts(keep: set[int], vocab: dict[str, int], pairs: list[tuple[str, str]]) -> None:
    """Add what the kept entries are merged from, and what that is merged from."""
    made_of: dict[int, list[int]] = {}
    for left, right in pairs:
        whole = vocab.get(left + right)
        if whole is not None:
            made_of.setdefault(whole, []).extend([vocab[left], vocab[right]])
    left_to_see = list(keep)
    while left_to_see:
        for part in made_of.get(left_to_see.pop(), ()):
            if part not in keep:
                keep.add(part)
                left_to_see.append(part)


def _renumbered(part: Any, new: Callable[[int], int]) -> Any:
    """A post-processor with new ids: it names them as `ids` lists and as (text, id) pairs."""
    if isinstance(part, list):
        return [_renumbered(p, new) for p in part]
    if not isinstance(part, dict):
        return part
    changed = {key: _renumbered(value, new) for key, value in part.items()}
    for key in ("sep", "cls"):
        if isinstance(part.get(key), list) and isinstance(part[key][-1], int):
            changed[key] = [part[key][0], new(part[key][1])]
    if isinstance(part.get("ids"), list):
        changed["ids"] = [new(i) for i in part["ids"]]
    return changed

"""Parts of a `tokenizer.json`, the one form in which every vocabulary ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
"""Bytes to GPT-2's stand-ins and back, without a split of its own."""


def added_token(text: str, token: int, special: bool = True) -> dict[str, Any]:
    """An entry of added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": text, **flags, "special": special}


def split(pattern: str) -> dict[str, Any]:
    """A step that cuts text at the matches of a regular expression, and keeps everything."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def bpe(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], **flags: Any) -> dict[str, Any]:
    """A BPE model. `flags`: unk_token, fuse_unk, byte_fallback, ignore_merges."""
    plain: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**plain, **flags, "vocab": dict(vocab), "merges": [[left, right] for left, right in merges]}


def whole(
    model: Mapping[str, Any],
    added: Iterable[dict[str, Any]],
    *,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    decoder: Any = None,
) -> dict[str, Any]:
    """A tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda t: t["id"]),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": dict(model),
    }

"""Regular expressions that cut text into words before byte-level BPE, and the names others know them by.

A GGUF file names its split; a reader that does not know the name refuses the file. So the names here are the
ones of llama.cpp (`tokenizer.ggml.pre`). Patterns are those published with each tokenizer, written without
possessive repeats, which the `tokenizers` library reads differently (no match changes: nothing that follows
such a repeat could use what it would give back).
"""

from __future__ import annotations

from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

SPLITS: dict[str, str] = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "gpt-4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""llama.cpp's name -> pattern. `qwen2` is what we train with: digits one by one."""


def name_of(definition: dict[str, Any]) -> str | None:
    """llama.cpp's name of a byte-level tokenizer's split; None if it has no name there."""
    before = definition.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    patterns = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    if not patterns and any(s.get("type") == "ByteLevel" and s.get("use_regex", True) for s in steps):
        return "gpt-2"
    return next((name for name, split in SPLITS.items() if patterns == [split]), None)

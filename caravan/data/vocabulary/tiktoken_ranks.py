"""tiktoken files: one line `base64 rank` per token, and a split that stands somewhere else.

tiktoken merges the adjacent pair whose bytes have the lowest rank, and takes a word whole if it is a token:
that is BPE with one merge per token (`merges.canonical`) and `ignore_merges`. The split and the special
tokens are code in the originals; they are recognised by the number of ranks, or read from
tokenizer_config.json (`pat_str`, or `split` with a name of `splits.SPLITS`; `added_tokens_decoder`).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caravan.data.vocabulary import merges
from caravan.data.vocabulary.definition import BYTE_LEVEL, added_token, bpe, split, whole
from caravan.data.vocabulary.splits import SPLITS
from caravan.types import UserError

END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Known:
    """A published vocabulary. `bos`/`eos`: texts of special tokens."""

    split: str
    special: Mapping[str, int] = field(default_factory=dict)
    bos: str = END
    eos: str = END


def _llama3() -> dict[str, int]:
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    named |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    reserved = iter(range(256))
    return {
        f"<|{named.get(k) or f'reserved_special_token_{next(reserved)}'}|>": 128000 + k for k in range(256)
    }


_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
_QWEN = {END: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
KNOWN: dict[int, Known] = {
    50256: Known("gpt-2", {END: 50256}),
    50280: Known("gpt-2", {END: 50256}),
    100256: Known("llama-bpe", {END: 100257, **_FIM, "<|endofprompt|>": 100276}),
    128000: Known("llama-bpe", _llama3(), "<|begin_of_text|>", "<|end_of_text|>"),
    151329: Known("llama-bpe", {END: 151329}),
    151643: Known("qwen2", {**_QWEN, **{f"<|extra_{k}|>": 151646 + k for k in range(205)}}),
    199998: Known("gpt-4o", {END: 199999, "<|endofprompt|>": 200018}),
}
"""By number of ranks: gpt2, p50k_base, cl100k_base, Llama 3, GLM-4, Qwen, o200k_base."""


def is_ranks(data: bytes) -> bool:
    """Whether a file looks like a tiktoken file."""
    word, _, rank = data.partition(b"\n")[0].strip().partition(b" ")
    return bool(word) and rank.isdigit() and _decoded(word) is not None


def read(data: bytes, path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, defaults of tokenizer_config.json). Raises UserError."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        word, _, rank = line.strip().partition(b" ")
        if not word:
            continue
        piece = _decoded(word)
        if piece is None or not rank.isdigit():
            raise UserError(f"{path} line {number} is not `base64 rank`", "the file may be cut short")
        ranks[piece] = int(rank)
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UserError(f"{path} has no rank for byte {missing[0]}", "the file may be cut short")
    known = KNOWN.get(len(ranks))
    pattern = config.get("pat_str") or SPLITS.get(config.get("split") or (known.split if known else ""))
    if not pattern:
        raise UserError(
            f"{path} has {len(ranks)} ranks, which no published vocabulary has: its split is not known",
            f'write {{"split": NAME}} into tokenizer_config.json beside it, NAME one of {", ".join(SPLITS)}; '
            'or {"pat_str": REGEX}',
        )
    special = dict(known.special) if known else {}
    defaults: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if known:
        defaults |= {"bos_token": known.bos, "eos_token": known.eos}
    return definition(ranks, str(pattern), special), defaults


def definition(ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer.json with the same ids."""
    vocab = {merges.as_text(piece): rank for piece, rank in ranks.items()}
    pairs = merges.canonical(dict(ranks), merges.single_bytes)
    return whole(
        bpe(
            vocab | dict(special),
            [(merges.as_text(left), merges.as_text(right)) for left, right in pairs],
            ignore_merges=True,
        ),
        [added_token(text, token) for text, token in special.items()],
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split(pattern), BYTE_LEVEL]},
        decoder=BYTE_LEVEL,
    )


def _decoded(word: bytes) -> bytes | None:
    try:
        return base64.b64decode(word, validate=True) or None
    except binascii.Error:
        return None

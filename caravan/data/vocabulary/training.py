"""Training vocabularies: byte-level BPE, SentencePiece BPE and unigram, and bytes, which need none.

**Byte-level BPE** (Sennrich et al. 2016, arXiv 1508.07909, over bytes as in GPT-2): count the words that the
split cuts; merge the most frequent adjacent pair; repeat. Of equally frequent pairs the one with the smaller
left id goes first, then the smaller right id. Ids: special tokens, the 256 bytes by the code point of their
stand-in, then one per merge.

**SentencePiece** (Kudo & Richardson 2018, arXiv 1808.06226; unigram: Kudo 2018, arXiv 1804.10959) is trained
by the `sentencepiece` library itself, the extra of that name, rather than by the look-alikes of the
`tokenizers` library: its models are what everybody's readers are tested with, and the `.model` file it writes
goes into the artefact beside `tokenizer.json`. No normalisation, byte fallback, digits one by one, spaces
kept: `decode(encode(x)) == x` as for bytes, but for U+2581 itself, which stands for a space.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from caravan.data.vocabulary import merges, sentencepiece_model
from caravan.data.vocabulary.definition import BYTE_LEVEL, added_token, bpe, whole
from caravan.data.vocabulary.splits import SPLITS
from caravan.types import UserError

Trained = tuple[dict[str, Any], dict[str, Any]]
"""(tokenizer.json, tokenizer_config.json)"""


def byte_bpe(
    texts: Iterable[str], vocab_size: int, special: Sequence[str], min_count: int = 2, split: str = "qwen2"
) -> Trained:
    """Byte-level BPE of `vocab_size` ids at most. `special`: end of text, pad, then others. Same texts, same
    vocabulary. Raises UserError."""
    if vocab_size < 256 + len(special):
        raise UserError(
            f"a byte-level vocabulary needs at least {256 + len(special)} entries, not {vocab_size}",
            "use --vocab 4096 or more",
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_count,
        show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(pieces(texts), trainer=trainer)
    return json.loads(backend.to_str()), _config(special)


def single_bytes(special: Sequence[str]) -> Trained:
    """No vocabulary at all: id = byte, the special tokens from 256 on. BPE without a merge."""
    vocab = {merges.CHARACTER_OF[b]: b for b in range(256)}
    vocab |= {text: 256 + k for k, text in enumerate(special)}
    added = [added_token(text, 256 + k) for k, text in enumerate(special)]
    return whole(bpe(vocab, []), added, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL), _config(special)


def patches(ids: Sequence[int], size: int = 16, end: int = 256) -> list[list[int]]:
    """bGPT's input (Wu et al. 2024, arXiv 2402.19155): byte ids in patches of `size`, the last one filled up
    with `end`, and one patch of `end` alone behind them."""
    rows = [list(ids[at : at + size]) for at in range(0, len(ids), size)]
    return [[*row, *[end] * (size - len(row))] for row in [*rows, []]]


def sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    algorithm: Literal["bpe", "unigram"],
    special: Sequence[str],
    coverage: float = 0.9995,
) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """(.model file, tokenizer.json, tokenizer_config.json). `coverage`: share of all characters that get a
    piece of their own; the others are spelt in bytes. Raises UserError."""
    try:
        import sentencepiece as library
    except ImportError as error:
        raise UserError(
            f"training a SentencePiece {algorithm} vocabulary needs the sentencepiece library",
            'pip install "caravan-llm[sentencepiece]"',
        ) from error
    written = io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=(line for text in pieces(texts, 4096) for line in text.splitlines() if line),
            model_writer=written,
            model_type=algorithm,
            vocab_size=vocab_size,
            character_coverage=coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            hard_vocab_limit=False,
            num_threads=1,  # several threads add counts in another order
            max_sentence_length=1 << 16,
            pad_id=3,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            control_symbols=[t for t in special if t not in ("<unk>", "<s>", "</s>", "<pad>")],
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"sentencepiece refuses: {str(error).partition(']')[2].strip() or error}",
            "a larger --vocab, a lower --coverage, or more text",
        ) from error
    data = written.getvalue()
    return (data, *sentencepiece_model.definition(sentencepiece_model.read(data)))


def pieces(texts: Iterable[str], limit: int = 1 << 16) -> Iterator[str]:
    """Long texts in parts: the trainer holds whole pieces in memory. Cut at line ends, where the split cuts
    too."""
    for text in texts:
        start = 0
        while start < len(text):
            stop = start + limit
            if stop < len(text):
                line = text.rfind("\n", start, stop) + 1
                stop = line if line > start else stop
            yield text[start:stop]
            start = stop


def _config(special: Sequence[str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[0],
        "pad_token": special[1] if len(special) > 1 else special[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }

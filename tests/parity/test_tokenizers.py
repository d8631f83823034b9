"""Foreign vocabularies give the ids of their reference, and transformers opens what we save."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from caravan.data.tokenizer import Tokenizer
from caravan.data.vocabulary import merges, tiktoken_ranks
from caravan.data.vocabulary.splits import SPLITS
from caravan.types import UserError

UGLY = [
    "", " ", "  ", "\n", "\r\n\t", " a  b ", "trailing   ", "\n\n\n x",
    "🙂", "👩‍👩‍👧‍👦🏳️‍🌈", "👍🏽", "你好，世界！", "人工智能", "한국어 ᄒ", "नमस्ते", "שלום", "مرحبا",
    "\x00\x01\x7f\x85", "\u200b\u00ad\ufeff", "\U000e0041", "\U0010fffd",
    "123456789012345678901234567890", "3.14159e-10",
    "½①ﬁＡｱﾞｶﾞﾊﾟΪ́℡", "e\u0301\u0300Å", "½\u0300①\u0301", "ǅ ʰ", "▁", "a▁b▁",
    "<s>", "</s>", "<unk>", "<0x41>", "<|endoftext|>", "<|im_start|>user\n",
    "it's WE'LL 'ſ", "aaaaaaaaaaaaa", "the the", "def f(x):\n\treturn x",
]  # fmt: skip
ugly = st.one_of(
    st.text(max_size=20),
    st.lists(st.one_of(st.sampled_from(UGLY), st.text(max_size=3)), max_size=6).map("".join),
)
TEXTS = [
    "The quick brown fox isn't afraid of 12345 dogs; they'll see. Aaa aaaa abab baba banana.\n" * 3,
    "你是谁？我是一个小助手。今天是2026年。你好世界，我们学习语言模型。\n" * 3,
    "def f(x):\n    return x ** 2  # naïve café\n" * 3,
]


def _same(ours: Tokenizer, reference, texts) -> None:
    for text in texts:
        assert ours.encode(text) == reference(text), ascii(text)


# -- tokenizer.json ------------------------------------------------------------------------------------------

DEFINITIONS = ("minimind/tokenizer.json", "torchtune/tokenizer.json", "torchtune/tiny_bpe_tokenizer.json")


@pytest.fixture(scope="module", params=DEFINITIONS)
def definition_pair(request, kit):
    transformers = pytest.importorskip("transformers")
    file = kit / "tokenizers" / request.param
    return Tokenizer.load(file), transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))


@settings(max_examples=120)
@given(text=ugly)
def test_tokenizer_json_ids(definition_pair, text: str) -> None:
    ours, theirs = definition_pair
    ids = ours.encode(text)
    if not any(special in text for special in ours.special):  # typed text is text here
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode_many([text]) == [ids]
    if all(bytes([b]) in ours._bytes for b in text.encode()):  # one of the three lacks control characters
        composed = (theirs.backend_tokenizer.normalizer or normalizers.Sequence([])).normalize_str(text)
        assert ours.decode(ids) == composed


def test_qwen2_files_are_not_taken_for_gpt2s(kit, tmp_path) -> None:
    """The same two names of files, another split and normalisation: only the class tells."""
    transformers = pytest.importorskip("transformers")
    source = kit / "tokenizers/torchtune"
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((source / f"tiny_bpe_{name}").read_bytes())
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added = {str(2000 + i): {"content": text, "special": True} for i, text in enumerate(specials)}
    said = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    ours, whole = Tokenizer.load(tmp_path), Tokenizer.load(source / "tiny_bpe_tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*UGLY, *TEXTS):
        assert ours.encode(text) == whole.encode(text), ascii(text)
        if not any(special in text for special in specials):
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], ascii(text)
    assert ours.special == whole.special and ours.split_name == "qwen2"


def test_gpt2_files_may_ask_for_a_space_in_front(kit, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((kit / "tokenizers/gpt2" / name).read_bytes())
    said = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("it's 12", " it", "\n", "你好"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    (tmp_path / "vocab.json").write_text('{"a": 0, "a</w>": 1}')
    (tmp_path / "merges.txt").write_text("a </w>")
    with pytest.raises(UserError, match="marks ends of words"):
        Tokenizer.load(tmp_path)


# -- SentencePiece -------------------------------------------------------------------------------------------

VARIANTS = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "split_digits": True,
              "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
              "allow_whitespace_only_pieces": True},
    "bpe": {"model_type": "bpe", "user_defined_symbols": ["<sep>", "aab"]},
    "unigram_bytes": {"model_type": "unigram", "byte_fallback": True, "control_symbols": ["<x>"]},
    "unigram": {"model_type": "unigram", "add_dummy_prefix": False, "split_by_whitespace": False,
                    "normalization_rule_name": "nfkc_cf", "user_defined_symbols": ["<sep>"]},
    "no_prefix": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False,
                      "normalization_rule_name": "nmt_nfkc_cf"},
}  # fmt: skip


def sentencepiece_model(**settings) -> bytes:
    library = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TEXTS).splitlines()), model_writer=written, vocab_size=450,
        hard_vocab_limit=False, num_threads=1, minloglevel=2, **settings,
    )  # fmt: skip
    return written.getvalue()


@pytest.fixture(scope="module", params=VARIANTS)
def sentencepiece_pair(request, tmp_path_factory):
    library = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp(request.param)
    data = sentencepiece_model(**VARIANTS[request.param])
    (folder / "tokenizer.model").write_bytes(data)
    return Tokenizer.load(folder), library.SentencePieceProcessor(model_proto=data)


@settings(max_examples=120)
@given(text=ugly)
def test_sentencepiece_ids(sentencepiece_pair, text: str) -> None:
    ours, theirs = sentencepiece_pair
    mine, ids = ours.encode(text), theirs.encode(text)
    # Of equally likely segmentations ("aa a" or "a aa") a unigram model takes either: float32 sums decide.
    tie = ours.kind == "Unigram" and sorted(mine) == sorted(ids)
    assert mine == ids or tie
    assert ours.encode_many([text, "x"]) == [mine, theirs.encode("x")]


def test_sentencepiece_ids_of_long_text(sentencepiece_pair) -> None:
    ours, theirs = sentencepiece_pair
    text = " ".join([*UGLY, *TEXTS]) * 3
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    if not set(ids) & {theirs.unk_id()}:
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.bos, ours.eos, ours.vocab_size) == (theirs.bos_id(), theirs.eos_id(), theirs.vocab_size())


def test_saved_sentencepiece_is_the_same_here_and_in_transformers(sentencepiece_pair, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, reference = sentencepiece_pair
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*UGLY, *TEXTS):
        assert again.encode(text) == reference.encode(text)
        typed = text.startswith("<") or "<sep>" in text
        # With marks behind a character the library differs from SentencePiece: vocabulary/normaliser.py.
        if not typed and not set(text) & set("\u0300\u0301ﾞﾟ"):
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), ascii(text)


def test_kit_model_of_sentencepiece(kit) -> None:
    library = pytest.importorskip("sentencepiece")
    file = kit / "tokenizers/torchtune/m.model"
    reference = library.SentencePieceProcessor(model_file=str(file))
    ours = Tokenizer.load(file)
    book = next(iter(sorted((kit / "pretrain/en_books").glob("*")))).read_text(encoding="utf-8")[:50_000]
    _same(ours, reference.encode, [*UGLY, "½\u0300", "a\u0301b</s>c", book])
    assert (ours.bos, ours.eos, ours.vocab_size) == (1, 2, 2000)


def test_what_sentencepiece_cannot_be_read_is_said(tmp_path) -> None:
    data = sentencepiece_model(**VARIANTS["llama"])
    for broken in (data[: len(data) // 2 + 1], b"\x0a\x05ab", b"", b"\xff" * 40, b"hello world"):
        (tmp_path / "tokenizer.model").write_bytes(broken)
        with pytest.raises(UserError, match="SentencePiece"):
            Tokenizer.load(tmp_path)
    for settings_ in ({"model_type": "char"}, {"model_type": "bpe", "treat_whitespace_as_suffix": True}):
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**settings_))
        with pytest.raises(UserError, match="not supported"):
            Tokenizer.load(tmp_path)


def test_pieces_with_one_score_are_not_guessed_about(tmp_path) -> None:
    """As in vocabularies that were joined by appending pieces with score 0."""
    data = sentencepiece_model(**VARIANTS["llama"])
    entries = [b"\x0a" + bytes([len(t)]) + t + b"\x15" + bytes(4) for t in (b"kq", b"qk", b"kqk")]
    joined = data + b"".join(b"\x0a" + bytes([len(e)]) + e for e in entries)
    (tmp_path / "tokenizer.model").write_bytes(joined)
    with pytest.raises(UserError, match="share their score"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"ties": "by_id"}')
    tok = Tokenizer.load(tmp_path)
    assert tok.decode(tok.encode("kqkq")) == "kqkq"
    assert tok.encode_continuation("kqk") == [tok.vocab_size - 1]


# -- tiktoken ------------------------------------------------------------------------------------------------


def _ranks(kit: Path) -> dict[bytes, int]:
    import base64

    lines = (kit / "tokenizers/torchtune/tiktoken_small.model").read_bytes().split(b"\n")
    return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}


@pytest.fixture(scope="module", params=SPLITS)
def tiktoken_pair(request, kit, tmp_path_factory):
    tiktoken = pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    source = kit / "tokenizers/torchtune/tiktoken_small.model"
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    config = {
        "split": request.param,
        "added_tokens_decoder": {"2005": {"content": "<|end|>", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = tiktoken.Encoding(
        "small", pat_str=SPLITS[request.param], mergeable_ranks=_ranks(kit), special_tokens={"<|end|>": 2005}
    )
    return Tokenizer.load(folder), theirs


@settings(max_examples=120)
@given(text=ugly)
def test_tiktoken_ids(tiktoken_pair, text: str) -> None:
    ours, theirs = tiktoken_pair
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_tiktoken_of_a_book_and_its_special_token(tiktoken_pair, kit, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = tiktoken_pair
    book = (kit / "pretrain/web/wiki_demo.txt").read_text(encoding="utf-8")[:50_000]
    _same(ours, theirs.encode_ordinary, [*UGLY, book, "<|end|>"])
    assert ours.special == {"<|end|>": 2005} and ours.vocab_size == 2006
    ours.save(tmp_path)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert hf("a<|end|>b", add_special_tokens=False)["input_ids"] == theirs.encode(
        "a<|end|>b", allowed_special="all"
    )


def test_original_patterns_split_alike() -> None:
    """The published patterns have possessive repeats, which ours are written without."""
    tiktoken = pytest.importorskip("tiktoken")
    published = {
        "gpt-2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        "llama-bpe": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
        r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    }
    ranks = {bytes([b]): b for b in range(256)} | {b"  ": 256, b"ab": 257, b"\n\n": 258, b" \n": 259}
    for name, pattern in published.items():
        one = tiktoken.Encoding("a", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        two = tiktoken.Encoding("b", pat_str=SPLITS[name], mergeable_ranks=ranks, special_tokens={})
        for text in UGLY:
            assert one.encode_ordinary(text) == two.encode_ordinary(text)


def test_words_that_merges_cannot_reach_are_tokens_all_the_same() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([b]): b for b in range(256)} | {b"abc": 256, b"bc": 257, b"aabc": 258}
    theirs = tiktoken.Encoding("x", pat_str=SPLITS["qwen2"], mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer(tiktoken_ranks.definition(ranks, SPLITS["qwen2"], {}), {})
    for text in ("abc", "aabc", "xabc", "abcabc", "abc abc", "bc"):
        assert ours.encode(text) == theirs.encode_ordinary(text)


def test_ranks_of_gpt2_give_its_own_merges(kit) -> None:
    vocab = json.loads((kit / "tokenizers/gpt2/vocab.json").read_text(encoding="utf-8"))
    ranks = {merges.as_bytes(text): i for text, i in vocab.items() if i != 50256}
    lines = (kit / "tokenizers/gpt2/merges.txt").read_text(encoding="utf-8").split("\n")
    expected = [list(line.split(" ")) for line in lines if line]
    made = tiktoken_ranks.definition(ranks, SPLITS["gpt-2"], {"<|endoftext|>": 50256})
    assert made["model"]["merges"] == expected and len(expected) == 50_000


def test_tiktoken_without_a_known_split_is_refused(kit, tmp_path) -> None:
    source = kit / "tokenizers/torchtune/tiktoken_small.model"
    with pytest.raises(UserError, match="2000 ranks") as refused:
        Tokenizer.load(source)
    assert "qwen2" in (refused.value.hint or "")
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes()[:900] + b"!!! x\n")
    with pytest.raises(UserError, match="line"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(source.read_bytes().splitlines(True)[:200]))
    with pytest.raises(UserError, match="no rank for byte 200"):
        Tokenizer.load(tmp_path)


def test_specials_of_published_vocabularies() -> None:
    llama3 = tiktoken_ranks.KNOWN[128000].special
    assert llama3["<|eot_id|>"] == 128009 and llama3["<|start_header_id|>"] == 128006
    assert llama3["<|reserved_special_token_0|>"] == 128002 and len(llama3) == 256
    assert llama3["<|reserved_special_token_247|>"] == 128255
    assert max(tiktoken_ranks.KNOWN[151643].special.values()) == 151850


# -- GPT-2, RWKV ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_pair(kit):
    tiktoken = pytest.importorskip("tiktoken")
    vocab = json.loads((kit / "tokenizers/gpt2/vocab.json").read_text(encoding="utf-8"))
    ranks = {merges.as_bytes(text): i for text, i in vocab.items() if i != 50256}
    theirs = tiktoken.Encoding("gpt2", pat_str=SPLITS["gpt-2"], mergeable_ranks=ranks, special_tokens={})
    return Tokenizer.load(kit / "tokenizers/gpt2"), theirs


@settings(max_examples=120)
@given(text=ugly)
def test_gpt2_ids(gpt2_pair, text: str) -> None:
    ours, theirs = gpt2_pair
    assert ours.encode(text) == theirs.encode_ordinary(text)


def _greedy(table: dict[bytes, int], data: bytes) -> list[int]:
    """As the definition says: the longest entry that the rest begins with."""
    ids = []
    while data:
        size = next(n for n in range(min(len(data), 200), 0, -1) if data[:n] in table)
        ids.append(table[data[:size]])
        data = data[size:]
    return ids


@pytest.fixture(scope="module")
def rwkv_pair(kit):
    import ast

    table = {}
    for line in (kit / "tokenizers/rwkv_vocab_v20230424.txt").read_text(encoding="utf-8").splitlines():
        literal = ast.literal_eval(line[line.index(" ") : line.rindex(" ")].strip())
        table[literal.encode() if isinstance(literal, str) else literal] = int(line[: line.index(" ")])
    return Tokenizer.load(kit / "tokenizers/rwkv_vocab_v20230424.txt"), table


@settings(max_examples=120)
@given(text=ugly)
def test_rwkv_ids(rwkv_pair, text: str) -> None:
    ours, table = rwkv_pair
    ids = ours.encode(text)
    assert ids == _greedy(table, text.encode())
    assert ours.decode(ids) == text and b"".join(map(ours.bytes_of, ids)) == text.encode()


def test_rwkv_folder_in_transformers(rwkv_pair, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, _ = rwkv_pair
    assert (ours.eos, ours.vocab_size) == (0, 65530)
    ours.save(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for text in (*UGLY, *TEXTS):
        assert again.encode(text) == ours.encode(text)
        if "<|endoftext|>" not in text:
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), ascii(text)
            assert theirs.decode(ours.encode(text)) == text


def test_broken_rwkv_vocabulary_is_refused(tmp_path) -> None:
    lines = [f"{b + 1} {bytes([b])!r} 1" for b in range(256)]
    for text, words in (
        ("\n".join(lines[:200]), "no entry for byte 200"),
        ("\n".join([*lines, "257 'ab' 3"]), "3 bytes were promised"),
        ("\n".join([*lines, "257 __import__('os') 3"]), "line 257"),
    ):
        (tmp_path / "rwkv_vocab.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            Tokenizer.load(tmp_path)
    (tmp_path / "rwkv_vocab.txt").write_text("\n".join([*lines, "300 'ab' 2"]))
    assert Tokenizer.load(tmp_path).encode("aab") == [98, 300]

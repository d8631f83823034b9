"""Training, extending and pruning vocabularies, each against what it promises."""

import io
import itertools
import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from caravan import stage
from caravan.data import records
from caravan.data.tokenizer import QWEN2_SPLIT, SPECIALS, Tokenizer, train
from caravan.data.vocabulary import extending, merges, pruning, training
from caravan.data.vocabulary.report import Report, script
from caravan.stages import corpus, tokenizer
from caravan.store import Store
from caravan.types import Document, UserError

EN = [
    "The quick brown fox isn't afraid of 12345 dogs; they'll see “it” — naïve café, 5 €…\n" * 3,
    "def split(text, sep=None):\n    '''Return the words of a text.'''\n    return text.split(sep)\n" * 3,
]
ZH = [
    "你是谁？我是一个小助手。今天是2026年，你好世界！我们学习语言模型。`x` 和 y_1。\n" * 4,
    "人工智能语言模型可以写代码：print('你好')。\n我们的模型是小模型，“学习”语言。耙子€\n" * 4,
    "Это небольшая модель языка. Модель учится.\n" * 4,
]

# -- training ------------------------------------------------------------------------------------------------


def slow_bpe(texts: list[str], count: int, min_count: int) -> list[tuple[str, str]]:
    """The definition: count every adjacent pair anew for each merge. Ties go to the smaller left id, then the
    smaller right id; ids are special tokens, bytes by stand-in, merges."""
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for word, _ in split.pre_tokenize_str(text):
            words[tuple(merges.CHARACTER_OF[b] for b in word.encode())] += 1
    ids = {c: len(SPECIALS) + n for n, c in enumerate(sorted(merges.BYTE_OF))}
    made: list[tuple[str, str]] = []
    while len(made) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], ids[p[0]], ids[p[1]]))
        if pairs[best] < min_count:
            break
        made.append(best)
        ids.setdefault("".join(best), len(SPECIALS) + 256 + len(made) - 1)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, n in words.items():
            new: list[str] = []
            for piece in word:
                # leftmost first, as in "aaa" -> "aa" "a"
                if new and (new[-1], piece) == best:
                    new[-1] += piece
                else:
                    new.append(piece)
            merged[tuple(new)] += n
        words = merged
    return made


@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_merges_are_those_of_a_slow_trainer(min_count: int) -> None:
    texts = [*EN, *ZH, "abab baba aaaa aaa banana bandana aab\n" * 3]
    made = train(texts, 256 + 4 + 150, min_count)
    expected = slow_bpe(texts, 150, min_count)
    assert merges.pairs_of(made._definition["model"]["merges"]) == expected
    assert len(expected) > 100


def test_bytes_are_a_tokenizer() -> None:
    tok = train([], 0, kind="bytes")
    text = "a你<|im_end|>\n"
    assert tok.encode(text) == list(text.encode()) and tok.decode(tok.encode(text)) == text
    assert (tok.eos, tok.pad, tok.end_of_turn, tok.vocab_size) == (256, 257, 259, 260)
    assert training.patches([1, 2, 3], 2, 256) == [[1, 2], [3, 256], [256, 256]]
    assert training.patches([], 2) == [[256, 256]]


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    pytest.importorskip("sentencepiece")
    return train([*EN, *ZH], 500, kind="sentencepiece")


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_sentencepiece_training(kind, tmp_path) -> None:
    library = pytest.importorskip("sentencepiece")
    tok = train([*EN, *ZH], 500, kind=kind)
    assert tok._definition == train(iter([*EN, *ZH]), 500, kind=kind)._definition
    assert (tok.bos, tok.eos, tok.pad, tok.end_of_turn) == (1, 2, 3, 5)
    reference = library.SentencePieceProcessor(model_proto=tok.original)
    for text in (*EN, *ZH, "🙂 unseen ж\t x  ", "<|im_end|></s>"):
        assert tok.encode(text) == reference.encode(text)
        assert tok.decode(tok.encode(text)) == text
        assert not {1, 2, 3, 4, 5} & set(tok.encode(text))
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(ZH[0]) == tok.encode(ZH[0]) and again.original == tok.original
    with pytest.raises(UserError, match="sentencepiece refuses"):
        train(ZH, 30, kind=kind)


# -- extending -----------------------------------------------------------------------------------------------

latin = st.text(
    alphabet=st.one_of(st.sampled_from(" \n'“”’–—…€ñéüß123aeThis"), st.characters(max_codepoint=0x24F)),
    max_size=30,
)


PROTECTED_BYTES = re.compile(
    rb"[\x80-\xbf]{0,2}(?:[\x00-\x7f]|[\xc2-\xc9][\x80-\xbf]|\xe2[\x80-\x83][\x80-\xbf])*"
    rb"(?:[\xc2-\xc9]|\xe2[\x80-\x83]?)?",
    re.DOTALL,
)
"""Any stretch of bytes that Latin text can hold."""


def _bases() -> dict[str, Tokenizer]:
    made = {"bytes": train(EN, 400)}
    made["other split"] = Tokenizer(*training.byte_bpe(EN, 400, SPECIALS, split="gpt-2"))
    try:
        made["sentencepiece"] = train(EN, 420, kind="sentencepiece")
    except UserError:
        pytest.skip("sentencepiece is not installed")
    return made


BASES: dict[str, tuple[Tokenizer, Tokenizer]] = {}


def extended(name: str) -> tuple[Tokenizer, Tokenizer]:
    if not BASES:
        BASES.update({k: (base, base.extended(ZH, 150)) for k, base in _bases().items()})
    return BASES[name]


NAMES = ["bytes", "other split", "sentencepiece"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150)
@given(text=latin)
def test_extending_leaves_latin_text_alone(name: str, text: str) -> None:
    base, more = extended(name)
    assert more.encode(text) == base.encode(text)


@pytest.mark.parametrize("name", NAMES)
def test_extending_keeps_ids_and_makes_reachable_pieces(name: str) -> None:
    base, more = extended(name)
    assert base.vocab_size + 50 < more.vocab_size <= base.vocab_size + 150
    assert [more.bytes_of(i) for i in range(base.vocab_size)] == [
        base.bytes_of(i) for i in range(base.vocab_size)
    ]
    assert more.special == base.special and more.stop_ids == base.stop_ids
    whole = 0
    for token in range(base.vocab_size, more.vocab_size):
        assert not PROTECTED_BYTES.fullmatch(more.bytes_of(token)), more.bytes_of(token)
        try:
            text = more.bytes_of(token).decode()
        except UnicodeDecodeError:
            assert name != "sentencepiece"
            continue
        whole += 1
        assert more.encode_continuation(text) == [token], text
        assert extending.PROTECTED.sub("", text)
    assert whole > 50
    for text in (*ZH, *EN, "生僻字：龘 😀"):
        assert more.decode(more.encode(text)) == text
    size = [sum(map(len, tok.encode_many(ZH))) for tok in (base, more)]
    assert size[1] < size[0] / 3


def test_extended_sentencepiece_is_what_the_library_does() -> None:
    library = pytest.importorskip("sentencepiece")
    _, more = extended("sentencepiece")
    reference = library.SentencePieceProcessor(model_proto=more.original)
    assert reference.vocab_size() == more.vocab_size
    scores = [reference.get_score(i) for i in range(260 + 6, more.vocab_size)]
    assert scores == sorted(scores, reverse=True), "new pieces are merged after all old ones"
    for text in (*ZH, *EN, "我们是模型模型语言", "学习 学习"):
        assert more.encode(text) == reference.encode(text)


def test_extending_learns_single_characters_first() -> None:
    _, more = extended("bytes")
    counts = Counter(c for text in ZH for c in text if extending.PROTECTED.sub("", c))
    for character, _ in counts.most_common(10):
        assert len(more.encode(character)) == 1


def test_what_cannot_be_extended_is_refused(pieces: Tokenizer) -> None:
    with pytest.raises(UserError, match="Unigram vocabulary cannot be extended"):
        train([*EN, *ZH], 500, kind="unigram").extended(ZH, 10)
    model = {**pieces._definition["model"], "byte_fallback": False}
    with pytest.raises(UserError, match="byte fallback"):
        Tokenizer({**pieces._definition, "model": model}, pieces._config).extended(ZH, 10)
    assert pieces.extended(["only English here"], 10).vocab_size == pieces.vocab_size


# -- pruning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "unigram"])
def test_pruned_tokenizer_gives_the_same_under_its_map(kind, tmp_path) -> None:
    if kind != "bpe":
        pytest.importorskip("sentencepiece")
    tok = train([*EN, *ZH], 600, kind=kind)
    small, kept = tok.pruned(EN)
    assert len(kept) == small.vocab_size < tok.vocab_size - 50
    for text in (*EN, *EN[0].splitlines()[:1]):
        assert [kept[i] for i in small.encode(text)] == tok.encode(text)
    assert [small.bytes_of(i) for i in range(small.vocab_size)] == [tok.bytes_of(i) for i in kept]
    assert {t: kept[i] for t, i in small.special.items()} == tok.special
    if kind == "unigram":  # what an unknown character costs depends on it
        assert min(s for _, s in small._definition["model"]["vocab"]) == min(
            s for _, s in tok._definition["model"]["vocab"]
        )
    for text in ZH:  # bytes remain: nothing is lost, only longer
        assert small.decode(small.encode(text)) == text
    small.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode(EN[0]) == small.encode(EN[0])


def test_pruning_renumbers_what_names_ids() -> None:
    tok = train(EN, 400)
    after = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [3], "tokens": ["<|im_end|>"]}},
    }
    definition = {**tok._definition, "post_processor": after}
    used = set(range(4)) | {300}
    made, kept = pruning.prune(definition, used)
    assert made["post_processor"]["special_tokens"]["<|im_end|>"]["ids"] == [kept.index(3)]
    assert 300 in kept
    bert = {"type": "BertProcessing", "sep": ["<|im_end|>", 3], "cls": ["<|pad|>", 1]}
    made, kept = pruning.prune({**definition, "post_processor": bert}, used)
    assert made["post_processor"]["sep"] == ["<|im_end|>", kept.index(3)]


def test_greedy_vocabulary_can_be_pruned(kit) -> None:
    tok = Tokenizer.load(kit / "tokenizers/rwkv_vocab_v20230424.txt")
    small, kept = tok.pruned(EN)
    assert small.vocab_size < 500
    assert [kept[i] for i in small.encode(EN[0])] == tok.encode(EN[0])


# -- many texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "unigram", "bytes"])
@settings(max_examples=25)
@given(texts=st.lists(st.text(max_size=20), max_size=5))
def test_many_texts_at_once_are_the_texts_one_by_one(kind, texts: list[str]) -> None:
    tok = _trained(kind)
    texts = [*texts, "a\ud800<|im_end|>", "", "<0x41> </s>"]
    assert tok.encode_many(texts) == [tok.encode(t) for t in texts]


_TRAINED: dict[str, Tokenizer] = {}


def _trained(kind) -> Tokenizer:
    if kind in ("sentencepiece", "unigram"):
        pytest.importorskip("sentencepiece")
    if kind not in _TRAINED:
        _TRAINED[kind] = train([*EN, *ZH], 500, kind=kind)
    return _TRAINED[kind]


def test_long_texts_are_cut_where_words_end() -> None:
    text = "ab cd\n" * 40_000
    parts = list(training.pieces([text, "", "x" * 200_000]))
    assert "".join(parts) == text + "x" * 200_000 and max(map(len, parts)) <= 1 << 16
    assert all(p.endswith("\n") for p in parts[:4])
    assert io.StringIO(parts[0]).readline() == "ab cd\n"


# -- what it costs -------------------------------------------------------------------------------------------


def test_report_counts_by_hand() -> None:
    spelt = {0: b"ab ", 1: "你".encode(), 2: "好".encode()[:2], 3: "好".encode()[2:], 4: b"?"}
    report = Report(spelt.__getitem__, unknown=4)
    report.add("ab 你好", [0, 1, 2, 3], "zh")
    report.add("ab ", [0, 4], "")
    assert report.by_script() == {
        "Latin": {"characters": 4, "tokens_per_character": 0.3333, "whole": 1.0},
        "Han": {"characters": 2, "tokens_per_character": 1.5, "whole": 0.5},
        "Space": {"characters": 2, "tokens_per_character": 0.3333, "whole": 1.0},
    }
    assert report.by_language() == {
        "none": {"bytes_per_token": 1.5, "tokens_per_word": 2.0, "tokens_per_character": 0.667, "whole": 1.0},
        "zh": {"bytes_per_token": 2.25, "tokens_per_word": 2.0, "tokens_per_character": 0.8, "whole": 0.8},
    }
    assert report.unknown() == round(1 / 6, 6) and report.bytes_per_token() == 2.0


def test_the_first_language_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caravan.data.vocabulary.report.LOOKED_AT", 4)
    report = Report({0: b"ab ", 1: "你".encode(), 2: "好".encode()[:2], 3: "好".encode()[2:]}.__getitem__)
    for _ in range(3):
        report.add("ab ab ", [0, 0], "en")
        report.add("你好", [1, 2, 3], "zh")
    assert [report.by_script()[s]["characters"] for s in ("Han", "Latin")] == [4, 3]
    assert {k: v["whole"] for k, v in report.by_language().items()} == {"en": 1.0, "zh": 0.5}


def test_every_language_of_a_large_corpus_is_measured(tmp_path) -> None:
    """What is measured is a sample of all documents, not the first ones; of a book a part."""
    store = Store(tmp_path / "store")
    rows = [("en", f"{n} the {EN[0]}") for n in range(300)] + [("zh", f"{n} 的{ZH[0]}") for n in range(300)]
    rows += [("ru", ZH[2] * 400)]
    (tmp_path / "raw.jsonl").write_text("\n".join(json.dumps({"text": t}) for _, t in rows))
    cfg = corpus.Config(heldout_share=0, near_duplicates=0, repetition=False)
    made = stage.execute(store, "corpus", cfg, {"raw": store.add(tmp_path / "raw.jsonl")})
    assert made.facts["documents_out"] == 601
    facts = stage.execute(
        store, "tokenizer", tokenizer.Config(kind="bytes", measure_bytes=60_000), {"corpus": made}
    ).facts
    assert set(facts["whole_by_language"]) == set(facts["tokens_per_character_by_language"]) >= {"zh"}
    assert set(facts["by_script"]) >= {"Latin", "Han", "Cyrillic"}
    characters = sum(v["characters"] for v in facts["by_script"].values())
    assert 20_000 < characters < 80_000
    assert facts["whole_by_language"]["zh"] < 0.5 and facts["tokens_per_character_by_language"]["zh"] > 2


@pytest.mark.parametrize(
    ("character", "name"),
    [("a", "Latin"), ("你", "Han"), ("ж", "Cyrillic"), ("か", "Kana"), ("한", "Hangul"), ("ا", "Arabic"),
     ("7", "Digit"), ("\n", "Space"), ("。", "Other"), ("\u0301", "Mark"), ("क", "Devanagari")],
)  # fmt: skip
def test_scripts(character: str, name: str) -> None:
    assert script(character) == name


def test_a_new_vocabulary_has_its_templates_tokens_and_those_asked_for(tmp_path) -> None:
    store = Store(tmp_path / "store")
    (tmp_path / "corpus").mkdir()
    for split in records.SPLITS:
        with records.packed_writer(tmp_path / "corpus" / f"{split}.jsonl.zst") as file:
            file.write(records.dump(Document("1", " ".join(EN))))
    inputs = {"corpus": store.add(tmp_path / "corpus", kind="corpus")}
    for kind in ("bpe", "bytes"):
        cfg = tokenizer.Config(vocab=300, kind=kind, template="llama-3", special=("<think>", "<|im_end|>"))
        tok = Tokenizer.load(stage.execute(store, "tokenizer", cfg, inputs).path)
        more = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<think>"]
        first = tok.special["<|im_end|>"] + 1
        assert [tok.special[t] for t in more] == [first + k for k in range(4)] and len(tok.special) == 8
        assert tok.end_of_turn == tok.special["<|eot_id|>"]
    base = {**inputs, "base": stage.execute(store, "tokenizer", cfg, inputs)}
    for wrong, said in (({"special": ("<x>",)}, "new vocabularies"), ({"template": "phi-3"}, "needs tokens")):
        with pytest.raises(UserError, match=said):
            stage.execute(store, "tokenizer", tokenizer.Config(vocab=400, **wrong), base)
    for wrong in ({"special": ("a b ",)}, {"template": "encoder"}):
        with pytest.raises(UserError, match="not for a new vocabulary"):
            stage.execute(store, "tokenizer", tokenizer.Config(vocab=300, **wrong), inputs)


def test_stage_extends_and_prunes(tmp_path) -> None:
    store = Store(tmp_path / "store")
    (tmp_path / "corpus").mkdir()
    for split in records.SPLITS:
        with records.packed_writer(tmp_path / "corpus" / f"{split}.jsonl.zst") as file:
            for n, text in enumerate((*EN, *ZH)):
                file.write(records.dump(Document(str(n), text)))
    text = store.add(tmp_path / "corpus", kind="corpus")
    first = stage.execute(store, "tokenizer", tokenizer.Config(vocab=300), {"corpus": text})
    inputs = {"corpus": text, "base": first}
    more = stage.execute(store, "tokenizer", tokenizer.Config(vocab=400), inputs)
    assert more.facts["vocab"] == 400 and more.facts["added"] == 100 == 400 - more.facts["vocab_of_base"]
    assert more.facts["by_script"]["Han"]["whole"] > first.facts["by_script"]["Han"]["whole"]
    less = stage.execute(store, "tokenizer", tokenizer.Config(change="prune"), {"corpus": text, "base": more})
    kept = json.loads((less / "kept_ids.json").read_text())
    assert len(kept) == less.facts["vocab"] <= 400
    small, large = Tokenizer.load(less.path), Tokenizer.load(more.path)
    assert [kept[i] for i in small.encode(EN[1])] == large.encode(EN[1])
    with pytest.raises(UserError, match="no room for more"):
        stage.execute(store, "tokenizer", tokenizer.Config(vocab=300), inputs)
    for kind in ("bytes", "unigram"):
        made = stage.execute(store, "tokenizer", tokenizer.Config(kind=kind, vocab=420), {"corpus": text})
        assert made.facts["texts_changed"] == 0 and made.facts["unknown"] == 0
        assert (made / "tokenizer.model").exists() == (kind == "unigram")


def test_the_same_vocabulary_in_files_of_two_formats_is_one(pieces, tmp_path) -> None:
    """A checkpoint with its SentencePiece file alone, and what a stage writes from it."""
    assert pieces.original is not None
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/tokenizer.model").write_bytes(pieces.original)
    raw = Tokenizer.load(tmp_path / "raw")
    raw.save(tmp_path / "written")
    assert raw.alike(Tokenizer.load(tmp_path / "written"))
    assert not raw.alike(train([*EN, *ZH], 420)) and not raw.alike(raw.extended(["δοκιμή δοκιμή δοκιμή"], 3))

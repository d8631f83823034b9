"""CPM-Bee's and CPM-Ant's vocab.txt against the published algorithm, and bGPT's bytes."""

from __future__ import annotations

import json
import random
import re
import sys
import types
from pathlib import Path

import pytest

from caravan.data import template
from caravan.data.render import render
from caravan.data.tokenizer import Tokenizer
from caravan.data.vocabulary import cpm
from caravan.data.vocabulary.codec import backend
from caravan.types import Message, UserError
from tests.vocabularies import CHINESE, WORDS, cpm_lines, write_cpm

BEE = {"model_type": "cpmbee"}


def folder_of(at: Path, config: dict | None = None, lines: list[str] | None = None) -> Path:
    write_cpm(at, lines)
    (at / "config.json").write_text(json.dumps(config or BEE))
    return at


@pytest.fixture(scope="module")
def bee(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(folder_of(tmp_path_factory.mktemp("bee")))


def published(lines: list[str], text: str) -> list[int]:
    """The algorithm as published, slowly: the longest entry that the rest of the text begins with; special
    entries do not count; characters without one gather to one unknown. Every `<` counts as escaped."""
    ids = {line: at for at, line in enumerate(lines)}
    table = {t: i for t, i in ids.items() if not (t[0] == "<" and t[-1] == ">" and len(t) > 1)}
    table |= {" ": ids["</_>"], "\n": ids["</n>"]}
    longest, found, gathered = max(map(len, table)), [], ""
    while text:
        for size in range(min(longest, len(text)), 0, -1):
            if text[:size] in table:
                found += ([ids["<unk>"]] if gathered else []) + [table[text[:size]]]
                gathered, text = "", text[size:]
                break
        else:
            gathered, text = gathered + text[0], text[1:]
    return found + ([ids["<unk>"]] if gathered else [])


def texts(count: int, seed: int) -> list[str]:
    """Chinese, English, both, spaces, special tokens' texts, and characters that no vocabulary has."""
    rng = random.Random(seed)
    letters = [*CHINESE, *"abcdefghijklmnopqrstuvwxyz 0123456789.,<>/_+=\n", "\t", "é", "龘", "🙂", "\u2581"]
    pieces = [
        *letters,
        *WORDS,
        *cpm.WRITTEN.values(),
        "<s>",
        "</s>",
        "<ans>",
        "<unk>",
        "<mask>",
        "龘龘",
        " the ",
    ]
    return ["".join(rng.choices(pieces, k=rng.randrange(25))) for _ in range(count)]


def test_ids_are_those_of_the_published_algorithm(bee: Tokenizer) -> None:
    lines, cases = cpm_lines(), texts(10_000, 0)
    expected = [published(lines, text) for text in cases]
    assert bee.encode_many(cases) == expected
    assert [bee.encode(text) for text in cases[:1000]] == expected[:1000]
    assert sum(1 in ids for ids in expected) > 1000  # the unknown was met


def test_an_id_is_the_number_of_entries_before(bee: Tokenizer) -> None:
    lines = cpm_lines()
    assert bee.encode("a")[0] == lines.index("a") and bee.vocab_size == len(lines)
    assert (bee.bos, bee.eos, bee.pad, bee.unknown) == tuple(
        map(lines.index, ("<s>", "</s>", "<pad>", "<unk>"))
    )
    assert bee.encode(" \n") == [lines.index("</_>"), lines.index("</n>")]
    assert bee.encode("语言模型x语言") == [lines.index(t) for t in ("语言模型", "x", "语言")]
    assert bee.bytes_of(lines.index("\u2581the")) == "\u2581the".encode()  # a sign here, no space
    assert bee.bytes_of(lines.index("</n>")) == b"\n"


def test_texts_of_known_characters_come_back(bee: Tokenizer) -> None:
    for text in texts(500, 1):
        back = bee.decode(bee.encode(text))
        assert back == "".join(c for c in text if c not in "\té龘🙂")  # <unk> is special, and says nothing


def test_no_text_becomes_a_special_token(bee: Tokenizer) -> None:
    control = set(bee.special.values()) - {bee.unknown}
    assert set(bee.special) == {t for t in cpm_lines() if t[0] == "<" and t[-1] == ">" and len(t) > 2} - {
        "</n>",
        "</_>",
    }
    assert all(control.isdisjoint(bee.encode(text)) for text in [*bee.special, *texts(500, 2)])


def test_the_work_grows_with_the_text_and_not_faster(bee: Tokenizer, monkeypatch) -> None:
    looked = 0

    class Counted(dict):
        def get(self, key, *otherwise):
            nonlocal looked
            looked += 1
            return super().get(key, *otherwise)

    match = bee._codec._match
    monkeypatch.setattr(match, "_table", Counted(match._table))
    counts = []
    for times in (50, 200):
        looked = 0
        bee.encode("今天天气 the 龘" * times)
        counts.append(looked)
    assert counts[1] == 4 * counts[0]


def test_saved_and_loaded_it_is_the_same(bee: Tokenizer, tmp_path) -> None:
    bee.save(tmp_path)
    again, cases = Tokenizer.load(tmp_path), texts(300, 3)
    assert again.encode_many(cases) == bee.encode_many(cases)
    assert again.chat_template == bee.chat_template and again.stop_ids == bee.stop_ids
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n") == [*cpm_lines(), ""]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(BEE))
    assert Tokenizer.load(tmp_path).encode_many(cases) == bee.encode_many(cases)


def test_a_model_folder_is_completed(bee: Tokenizer, tmp_path) -> None:
    bee.complete(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    bee.complete(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt",
    }  # fmt: skip


def test_transformers_opens_what_we_save(bee: Tokenizer, tmp_path) -> None:
    """To the same ids, since each character of this vocabulary is an entry too."""
    transformers = pytest.importorskip("transformers")
    bee.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(1000, 4):
        plain = text.replace("<", "(")  # there, special tokens are read out of text
        ids = bee.encode(plain)
        assert theirs.encode(plain, add_special_tokens=False) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == bee.decode(ids)


def test_pruned_it_keeps_its_ways(bee: Tokenizer, tmp_path) -> None:
    text = "今天天气真好 the user\n龘"
    small, kept = bee.pruned([text])
    assert small.vocab_size == len(kept) < bee.vocab_size
    assert [kept[i] for i in small.encode(text)] == bee.encode(text)
    assert small.encode("界") == [small.unknown]
    library = backend(small._definition, small.special)
    assert [library.encode(t).ids for t in (text, "界", "天x界界")] == [
        small.encode(t) for t in (text, "界", "天x界界")
    ]
    for kept_text in (text, "今天"):  # whose vocab.txt is one again, though it has no space
        small, _ = bee.pruned([kept_text])
        small.save(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps(BEE))
        assert Tokenizer.load(tmp_path).encode(kept_text) == small.encode(kept_text)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([*cpm_lines(), "the"], "line 2.. repeats 'the'"),
        ([t for t in cpm_lines() if t != "</_>"], "has no entry </_>"),
        ([t for t in cpm_lines() if t != "<unk>"], "has no entry <unk>"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, lines: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Tokenizer.load(folder_of(tmp_path, lines=lines))


def test_berts_file_of_that_name_is_not_taken_for_it(tmp_path) -> None:
    folder = folder_of(tmp_path, {"model_type": "bert"})
    with pytest.raises(UserError, match="no tokenizer in"):
        Tokenizer.load(folder)
    with pytest.raises(UserError, match="BERT's are not read"):
        Tokenizer.load(folder / "vocab.txt")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CpmBeeTokenizer"}')
    assert Tokenizer.load(folder).encode("the") == Tokenizer.load(folder / "vocab.txt").encode("the")


# -- its template --------------------------------------------------------------------------------------------

CHAT = [Message("system", "翻译"), Message("user", "你好</s><s>"), Message("assistant", "hello")]


def test_a_chat_is_the_native_object(bee: Tokenizer) -> None:
    assert bee.chat_template == template.builtin("cpm-bee") and bee.stop_ids == {bee.eos}
    made = render(CHAT, bee)
    shown = "<s><root></s><s>prompt</s><s>翻译</s><s>input</s><s>你好</s><s></s><s><ans></s><s>hello</s>"
    assert bee.decode(made.ids, skip_special=False) == shown
    assert made.ids.count(bee.bos) == 7  # what the user typed is text
    learnt = [i for i, carries in zip(made.ids, made.mask, strict=True) if carries]
    assert learnt == [*bee.encode("hello"), bee.eos]
    prompt = render(CHAT[:2], bee, generation_prompt=True).ids
    assert made.ids[: len(prompt)] == prompt and prompt[-4:] == [
        bee.bos, bee.special["<ans>"], bee.eos, bee.bos,
    ]  # fmt: skip


# -- CPM-Ant -------------------------------------------------------------------------------------------------


def ant_folder(at: Path) -> Path:
    lines = [t for t in cpm_lines() if t not in ("<root>", "<ans>")]
    return folder_of(at, {"model_type": "cpmant"}, [*lines, "<d>", "</d>"])


def test_cpm_ants_words_need_jieba(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    cpm.jieba.cache_clear()
    with pytest.raises(UserError, match="jieba") as refused:
        Tokenizer.load(ant_folder(tmp_path))
    assert "caravan-llm[jieba]" in str(refused.value.hint)


def test_cpm_ant_matches_within_words_and_each_unknown_counts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cpm, "jieba", lambda: lambda text: text.split("|"))
    ours = Tokenizer.load(ant_folder(tmp_path))
    texts_of = {i: t for t, i in ours._vocabulary.items()}
    shown = [texts_of[i] for i in ours.encode("语言|模型龘龘|" + "a" * 201)]
    assert shown == ["语言", "模型", "<unk>", "<unk>", "<unk>"]
    assert ours.chat_template == template.PLAIN and ours.eos == ours.special["</s>"]
    lines = (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert "" in lines[:-1] and ours.encode("语言") == [lines.index("语言")]  # an empty line counts
    ours.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode("语言|模型") == ours.encode("语言|模型")


def words_of(text: str) -> list[str]:
    """A stand-in for jieba: letters, digits and Chinese in runs of at most three, all else alone."""
    return re.findall(r"[a-z]{1,3}|[0-9]{1,3}|[\u4e00-\u9fff]{1,3}|.", text, re.DOTALL)


def test_cpm_ant_is_that_of_transformers(tmp_path, monkeypatch) -> None:
    """Given the same words: its class has them cut by another library, and otherwise."""
    module = pytest.importorskip("transformers.models.cpmant.tokenization_cpmant")
    monkeypatch.setattr(module, "requires_backends", lambda *_: None)
    cut = types.SimpleNamespace(cut=lambda text, hmm: words_of(text))
    monkeypatch.setattr(module, "rjieba", cut, raising=False)
    monkeypatch.setattr(cpm, "jieba", lambda: words_of)
    ours = Tokenizer.load(ant_folder(tmp_path))
    ours.save(tmp_path / "saved")
    theirs = module.CpmAntTokenizer.from_pretrained(tmp_path / "saved")
    for text in texts(1000, 5):
        plain = text.replace("<", "(")
        assert theirs.convert_tokens_to_ids(theirs.tokenize(plain)) == ours.encode(plain)


def test_cpm_ant_takes_the_words_of_the_release(tmp_path) -> None:
    jieba = pytest.importorskip("jieba")
    tok = Tokenizer.load(ant_folder(tmp_path))
    text = "他来到了网易杭研大厦，我们说语言模型。"
    assert "杭研" in jieba.lcut(text)  # found by the hidden Markov model alone
    assert tok.encode(text) == [i for word in jieba.cut(text) for i in tok._codec._word(word)]


# -- bGPT ----------------------------------------------------------------------------------------------------


def bgpt_folder(at: Path, **more: object) -> Path:
    (at / "config.json").write_text(json.dumps({"model_type": "bgpt", **more}))
    return at


def test_bgpts_ids_are_bytes(tmp_path) -> None:
    tok = Tokenizer.load(bgpt_folder(tmp_path, patch_size=16))
    text = "héllo 世界\n\0<|endoftext|>"
    assert tok.encode(text) == list(text.encode()) and tok.decode(tok.encode(text)) == text
    assert [tok.bytes_of(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert tok.vocab_size == 257 and tok.bos is None
    assert tok.eos == tok.pad == tok.end_of_turn == 256 and tok.stop_ids == {256}
    tok.complete(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(text) == tok.encode(text) and again.chat_template == tok.chat_template


@pytest.mark.parametrize(("given", "size"), [({}, 16), ({"patch_size": 16}, 16), ({"patch_size": 4}, 4)])
def test_bgpts_chats_begin_with_the_kind_of_file(tmp_path, given: dict, size: int) -> None:
    tok = Tokenizer.load(bgpt_folder(tmp_path, **given))
    made = render([Message("user", "2+3"), Message("assistant", "5")], tok)
    assert made.ids[:size] == [*b"txt", *[256] * (size - 3)]
    assert bytes(made.ids[size:-4]) == b"### User:\n2+3\n\n### Assistant:\n"
    assert made.ids[-4:] == [ord("5"), 256, 10, 10] and made.mask[-5:] == [False, True, True, False, False]


def test_bgpt_with_files_of_its_own_is_left_alone(tmp_path) -> None:
    folder = bgpt_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert Tokenizer.load(folder).chat_template == "{{ messages[0]['content'] }}"
    for wrong in ("x", 0):
        bgpt_folder(tmp_path, patch_size=wrong)
        with pytest.raises(UserError, match=f"patch_size is {wrong!r}"):
            Tokenizer.load(folder)

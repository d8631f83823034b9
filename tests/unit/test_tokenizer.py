"""Text to ids and back, and what the special tokens of a checkpoint are."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caravan.data.tokenizer import QWEN2_SPLIT, SPECIALS, Tokenizer, train
from caravan.store import Store
from caravan.types import UserError

TEXTS = [
    "def split(text, sep=None):\n    '''Return the words of a text.'''\n    return text.split(sep)\n" * 3,
    "12+29=41\n你是谁？我是一个小助手。The year 2026 isn't over; they'll see.\r\n" * 3,
]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return train(TEXTS, 400)


def test_specials_have_the_first_ids(tok: Tokenizer) -> None:
    assert [tok.special[t] for t in SPECIALS] == [0, 1, 2, 3]
    assert (tok.eos, tok.bos, tok.pad, tok.end_of_turn) == (0, 0, 1, 3)
    assert tok.stop_ids == {0, 3}
    assert tok.vocab_size <= 400


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_text_comes_back_whole(text: str) -> None:
    assert _shared().decode(_shared().encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SPECIALS, "<|im_", "end|>", " ", "\n", "a"]), max_size=8).map("".join))
def test_no_text_becomes_a_special_token(text: str) -> None:
    ids = _shared().encode(text)
    assert not set(ids) & {0, 1, 2, 3}
    assert _shared().decode(ids) == text
    assert _shared().encode_many([text, "x"]) == [ids, _shared().encode("x")]


def test_text_of_a_special_token_is_split_as_if_there_were_none() -> None:
    tok = train(["<|a|> <|b|> <|pa" * 9], 300)  # knows "<|" as one piece
    bare = Tokenizer({**tok._definition, "added_tokens": []}, {})
    unmarked = [{**t, "special": False} for t in tok._definition["added_tokens"] if t["id"] < 2]
    forgotten = Tokenizer({**tok._definition, "added_tokens": unmarked}, tok._config)
    for text in ("a<|endoftext|>b", "<|pad|>"):
        assert tok.encode(text) == bare.encode(text) == forgotten.encode(text)


_TOK: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _TOK:
        _TOK.append(train(TEXTS, 400))
    return _TOK[0]


def test_digits_stand_alone(tok: Tokenizer) -> None:
    assert [tok.decode([i]) for i in tok.encode("2026")] == ["2", "0", "2", "6"]
    assert "p{N}|" in QWEN2_SPLIT


def test_bytes_of_ids_spell_the_text(tok: Tokenizer) -> None:
    text = "naïve 你好 \x00\x7f 🙂"
    assert b"".join(tok.bytes_of(i) for i in tok.encode(text)) == text.encode()
    assert tok.bytes_of(3) == b"<|im_end|>"


def test_lone_surrogate_is_replaced(tok: Tokenizer) -> None:
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert tok.encode_many(["a\ud800b"]) == [tok.encode("a\ud800b")]


def test_training_twice_gives_one_tokenizer() -> None:
    assert train(TEXTS, 330)._definition == train(iter(TEXTS), 330)._definition


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="260"):
        train(TEXTS, 200)


def test_saved_and_loaded_is_the_same(tok: Tokenizer, tmp_path) -> None:
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    text = "def split(text): 12 你是谁 <|im_end|>"
    assert again.encode(text) == tok.encode(text)
    assert (again.eos, again.pad, again.end_of_turn, again.chat_template) == (0, 1, 3, tok.chat_template)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text()


def test_stops_of_generation_config_count(tok: Tokenizer, tmp_path) -> None:
    tok.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    assert Tokenizer.load(tmp_path).stop_ids == {0, 3, 7}


def test_names_missing_from_the_config_come_from_the_model(tok: Tokenizer, tmp_path) -> None:
    tok.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 0, "pad_token_id": 1}')
    again = Tokenizer.load(tmp_path)
    assert (again.eos, again.pad, again.bos, again.end_of_turn) == (0, 1, None, 3)


def test_control_token_not_marked_special_stays_out_of_text(tok: Tokenizer, tmp_path) -> None:
    """Some checkpoints forget the flag on their end-of-text token."""
    tok.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    for token in definition["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(definition))
    again = Tokenizer.load(tmp_path)
    assert again.eos not in again.encode("a<|endoftext|>b")


def test_missing_or_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_gpt2_files_give_the_known_ids(kit) -> None:
    tok = Tokenizer.load(kit / "tokenizers/gpt2")
    vectors = [json.loads(line) for line in (kit / "tokenizers/gpt2/vectors_30.jsonl").open(encoding="utf-8")]
    assert len(vectors) == 30
    for v in vectors:
        if "<|endoftext|>" not in v["text"]:
            assert tok.encode(v["text"]) == v["ids"]
    assert tok.eos == 50256 and tok.end_of_turn == 50256


def test_minimind_tokens_are_found(kit) -> None:
    tok = Tokenizer.load(kit / "tokenizers/minimind")
    assert (tok.pad, tok.bos, tok.eos, tok.end_of_turn, tok.vocab_size) == (0, 1, 2, 2, 6400)


def test_unigram_piece_that_spells_a_special_token_is_not_used(tmp_path) -> None:
    """A unigram model may hold `</s>` among its pieces, where matching it would be plain encoding."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0)] + [(c, -3.0) for c in "</s>ab▁"]
    backend = Backend(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tok = Tokenizer.load(tmp_path)
    assert tok.eos == 1
    assert 1 not in tok.encode("a</s>b")
    assert tok.decode(tok.encode("a</s>b")) == "a</s>b"
    assert tok.decode(tok.encode_continuation("b")) == "b"
    assert len(tok.encode("b")) == 2 and len(tok.encode_continuation("b")) == 1


def test_a_copied_folder_is_completed(tok: Tokenizer, kit, tmp_path) -> None:
    tok.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    tok.complete(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before, "nothing is lacking"
    other = Tokenizer.load(tmp_path, chat="alpaca")
    other.complete(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == other.chat_template != tok.chat_template
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    (tmp_path / "gpt2").mkdir()
    gpt2 = Tokenizer.load(kit / "tokenizers/gpt2")
    gpt2.complete(tmp_path / "gpt2")
    assert (tmp_path / "gpt2/tokenizer.json").exists()
    assert Tokenizer.load(tmp_path / "gpt2").encode("it's 12 你") == gpt2.encode("it's 12 你")


@pytest.mark.parametrize("name", ["m.model", "tiny_bpe_tokenizer.json", "../rwkv_vocab_v20230424.txt"])
def test_one_file_can_be_a_tokenizer_of_the_store(kit, tmp_path, name: str) -> None:
    """The folder it lies in may hold others."""
    file = kit / "tokenizers/torchtune" / name
    art = Store(tmp_path / "store").add(file, "tokenizer")
    text = "it's 12 of 3 naïve 你"
    assert Tokenizer.load(art.path).encode(text) == Tokenizer.load(file).encode(text)
    with pytest.raises(UserError, match="is a file; a model is a folder"):
        Store(tmp_path / "store").add(file, "model")


def test_several_tokenizers_in_one_folder_are_not_guessed_between(tmp_path) -> None:
    for name in ("a.model", "b.tiktoken"):
        (tmp_path / name).write_bytes(b"AA== 0\n")
    with pytest.raises(UserError, match=r"several tokenizers in .*: a\.model, b\.tiktoken"):
        Tokenizer.load(tmp_path)


def test_split_is_named_as_gguf_readers_know_it(tok: Tokenizer, kit) -> None:
    assert tok.split_name == "qwen2"
    assert Tokenizer.load(kit / "tokenizers/gpt2").split_name == "gpt-2"
    assert Tokenizer.load(kit / "tokenizers/torchtune/tokenizer.json").split_name == "llama-bpe"


def test_tokens_that_a_checkpoints_class_adds_get_their_ids(kit, tmp_path) -> None:
    """ChatGLM 3 keeps nine special tokens in code, behind the pieces of its `.model`."""
    (tmp_path / "tokenizer.model").write_bytes((kit / "tokenizers/torchtune/m.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    tok = Tokenizer.load(tmp_path, chat="chatglm3")
    assert [tok.special[t] for t in ("[MASK]", "[gMASK]", "sop", "<|user|>", "<|observation|>")] == [
        2000, 2001, 2003, 2006, 2008,
    ]  # fmt: skip
    assert tok.vocab_size == 2009 and tok.end_of_turn == tok.eos == 2
    tok.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.special == tok.special and again.encode("a <|user|> b") == tok.encode("a <|user|> b")

"""Our tokenizer folders in transformers: the same ids, the same chat rendering."""

import pytest

from caravan.data.render import render
from caravan.data.tokenizer import Tokenizer, train
from caravan.types import Message

transformers = pytest.importorskip("transformers")

TEXTS = [
    "def f(x):\n    return x + 12\n\nWhat does textwrap.dedent do? It's a function; they'll use it.\r\n" * 4,
    "你是谁？我是一个小助手。今天是2026年。\n" * 4,
]
PIECES = [
    "hello world",
    "  two spaces\n\n\nand lines\t\ttabs ",
    "12+29=41, it's 3.14",
    "你好，世界！🙂 naïve",
    "",
    "a",
    "\n",
    "def f(x):\r\n\treturn {'a': [1, 2]}",
]
CHATS = [
    [("user", "What does textwrap.dedent do?"), ("assistant", "It removes indentation.")],
    [
        ("system", "Be brief."),
        ("user", "12+29=?"),
        ("assistant", "41"),
        ("user", "你是谁？"),
        ("assistant", "助手。"),
    ],
]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train(TEXTS, 420).save(folder)
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


def same_chats(tok, theirs) -> None:
    for chat in CHATS:
        messages = [Message(role, content) for role, content in chat]
        dicts = [{"role": role, "content": content} for role, content in chat]
        expected = theirs.apply_chat_template(dicts, tokenize=True, return_dict=False)
        assert render(messages, tok).ids == expected
        expected = theirs.apply_chat_template(
            dicts[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert render(messages[:-1], tok, generation_prompt=True).ids == expected


def test_ids_are_the_same(ours) -> None:
    tok, theirs = ours
    for text in PIECES:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tok.encode(text)
        assert theirs.decode(tok.encode(text)) == text == tok.decode(tok.encode(text))


def test_special_tokens_are_the_same(ours) -> None:
    tok, theirs = ours
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (tok.bos, tok.eos, tok.pad)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == tok.end_of_turn
    assert len(theirs) == tok.vocab_size


def test_chats_are_the_same(ours) -> None:
    same_chats(*ours)


def test_a_real_checkpoints_chats_are_the_same(kit) -> None:
    folder = kit / "tokenizers/minimind"
    same_chats(Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder))


def test_saving_a_loaded_tokenizer_keeps_it(kit, tmp_path) -> None:
    tok = Tokenizer.load(kit / "tokenizers/minimind")
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in PIECES:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tok.encode(text)
    same_chats(tok, theirs)

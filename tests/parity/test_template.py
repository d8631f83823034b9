"""Our tokenizer folders in transformers: the same ids, the same chat rendering."""

from datetime import datetime

import pytest

from caravan.data import template
from caravan.data.render import render
from caravan.data.tokenizer import Tokenizer, train
from caravan.types import Message, UserError

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


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Über <b>weather</b> & "wind"',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALLS = [
    {"role": "user", "content": "Wie wird's in Köln?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 1.5}}}
        ],
    },
    {"role": "tool", "name": "weather", "content": '{"degrees": 12}'},
    {"role": "assistant", "content": "12°"},
    {"role": "user", "content": "Danke <3"},
]
DOCUMENTS = [{"title": "a", "text": "b\n"}, {"title": "ü", "text": ""}]
HAIRY = """
{%- set ns = namespace(seen=0, last=none) %}
{%- macro show(thing, deep=false) %}[{{ thing | tojson(indent=2 if deep else none) }}]{% endmacro %}
    {%- if tools is not none %}
    {{- show(tools, true) }}{{ tools | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}
{%- endif %}
{% if documents %}
  {% for d in documents %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}{{ d.title ~ d.text }}
  {% endfor %}
{% endif %}
{{ strftime_now('%d %b %Y') }} {{ extra | default('none') }} {{ dict(a=1).a }} {{ missing is defined }}
{% for m in messages recursive %}
{%- set ns.seen = ns.seen + 1 %}
{% generation %}{% set inner = m.role %}{{ inner | upper }}{% endgeneration %}{{ inner is defined }}
{%- if m.tool_calls %}{{ show(m.tool_calls[0].function.arguments) }}{% endif %}
{{- (m.content or '') | trim | replace('<', '(') }}{{ m['content'][:3] }}|{{ m.content.split(' ')[-1] }}
{%- if ns.seen == 4 %}{% break %}{% endif %}
{% endfor %}
{{- messages | map(attribute='role') | list | join(',') }}
{{- messages | selectattr('role', 'eq', 'user') | list | length }}
{{- bos_token }}{{ eos_token }}{% if add_generation_prompt %}?{% endif %}
"""


@pytest.mark.parametrize("source", [HAIRY, *map(template.builtin, template.names())])
@pytest.mark.parametrize("prompt", [True, False])
def test_template_language_is_the_same(ours, source: str, prompt: bool) -> None:
    tok, theirs = ours
    now = {"strftime_now": lambda form: datetime.now().strftime(form)}
    for tools, documents, more in ((None, None, {}), (TOOLS, DOCUMENTS, {"extra": [1, "ü"]})):
        expected = theirs.apply_chat_template(
            CALLS,
            tools=tools,
            documents=documents,
            chat_template=source,
            add_generation_prompt=prompt,
            tokenize=False,
            **more,
        )
        made = template.fill(source, CALLS, prompt, tok.token_texts, tools, documents, {**more, **now})
        assert made == expected


def test_real_template_with_tools(kit) -> None:
    folder = kit / "tokenizers/minimind"
    tok, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        for more in ({}, {"open_thinking": True}, {"enable_thinking": False}):
            expected = theirs.apply_chat_template(
                CALLS, tools=TOOLS, add_generation_prompt=prompt, tokenize=False, **more
            )
            made = template.fill(tok.chat_template, CALLS, prompt, tok.token_texts, TOOLS, None, more)
            assert made == expected


def test_refusals_are_the_same(ours) -> None:
    tok, theirs = ours
    for source in (
        "{{ raise_exception('no such role') }}",
        "{{ missing.attribute }}",
        "{{ messages.append(1) }}",
        "{{ namespace(_x=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ dict.__class__ }}{{ dict.mro() }}",
    ):
        with pytest.raises(Exception) as refused:  # whatever theirs is called
            theirs.apply_chat_template(CALLS, chat_template=source, tokenize=False)
        with pytest.raises(UserError):
            template.fill(source, CALLS, False, tok.token_texts)
        assert "no such role" in str(refused.value) or "no such role" not in source


@pytest.mark.parametrize("name", ["vicuna", "alpaca", "llama-2", "mistral", "chatml", "zephyr", "deepseek"])
def test_builtin_templates_give_the_same_ids(ours, name: str, tmp_path) -> None:
    """A served prompt is what transformers makes of the folder we write."""
    ours[0].save(tmp_path)
    tok = Tokenizer.load(tmp_path, chat=name)
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for chat in CHATS:
        messages = [Message(role, content) for role, content in chat]
        dicts = [{"role": m.role, "content": m.content} for m in messages]
        text = theirs.apply_chat_template(dicts[:-1], tokenize=False, add_generation_prompt=True)
        made = render(messages[:-1], tok, generation_prompt=True).ids
        assert tok.decode(made, skip_special=False) == text
        if len(chat) == 2:  # further turns: we put a seam in front of every answer, they encode in one go
            assert made == theirs(text, add_special_tokens=False)["input_ids"]
